"""The checks of kernels refuse an error of 1% in every result, dtype and case, and accept correct rounding."""

import math
from dataclasses import replace

import pytest
import torch

from kernels import linear_cross_entropy_reference, masks
from tests import decode_checks, loss_checks
from tests.attention_checks import Case, assert_close, make_inputs, root_mean_square, truth_and_plain
from tests.rounding import attention_deviation, sum_variance

FEATURES = ("softcap", "alibi", "bias", "sinks", "segments", "dropout")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
CASES = [
    Case(1, 1),
    Case(1, 129),
    Case(129, 1, mask=masks.FULL),
    Case(63, 200, H=1),
    Case(200, 63, H=1),
    Case(129, 129, mask=masks.sliding_window(20)),
    Case(70, 70, H=1, D=256),
    Case(70, 70, D=24, Dv=40, B=2, H=4, H_kv=2),
    Case(100, 100, gain=5.0),
    Case(100, 100, gain=0.1),
    Case(70, 90, scale=-0.5),
    *(Case(70, 90, features=(feature,)) for feature in FEATURES),
    *(Case(70, 90, B=2, features=("bias",), bias_axes=axes) for axes in ("bhqk", "qk", "bk", "q", "")),
    Case(65, 80, D=24, Dv=8, features=FEATURES),
    Case(65, 80, D=24, Dv=8, mask=masks.sliding_window(30), features=FEATURES),
]


def refuse_one_percent(results: dict, plain: dict, truth: dict, dtypes: dict, deviations: dict) -> None:
    """Check that `results` pass, and fail when 1% larger or smaller."""
    for name in truth:
        arguments = plain[name], truth[name], dtypes[name], deviations[name]
        assert_close(name, results[name], *arguments)
        if not (torch.isfinite(truth[name]) & (truth[name] != 0)).any():
            continue
        for factor in (1.01, 0.99):
            wrong = (results[name].float() * factor).to(results[name].dtype)
            with pytest.raises(AssertionError, match=f"^{name}: "):
                assert_close(name, wrong, *arguments)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention_off_by_one_percent_is_refused(case, dtype):
    """Perturbs the truth, stored in the dtype."""
    case = replace(case, dtype=dtype)
    inputs = make_inputs(case, "cpu")
    truth, plain = truth_and_plain(inputs)
    results = {name: truth[name].to(plain[name].dtype) for name in truth}
    dtypes = dict.fromkeys(truth, dtype)
    refuse_one_percent(results, plain, truth, dtypes, attention_deviation(inputs, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("case", decode_checks.CASES, ids=str)
def test_decoding_off_by_one_percent_is_refused(case, dtype):
    inputs = decode_checks.make_inputs(replace(case, dtype=dtype), "cpu")
    truth, plain, deviation = decode_checks.truth_plain_and_deviation(inputs)
    for results in (truth, plain, deviation):
        del results["k_cache"], results["v_cache"]
    results = {name: truth[name].to(plain[name].dtype) for name in truth}
    refuse_one_percent(results, plain, truth, dict.fromkeys(truth, dtype), deviation)


@pytest.mark.parametrize("terms", loss_checks.TERMS, ids=loss_checks.name_of)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("sizes", [(1, 65, 16), (17, 300, 40), (9, 1023, 96), (130, 65, 24), (5, 256, 16)], ids=str)
def test_a_loss_off_by_one_percent_is_refused(sizes, dtype, terms):
    inputs = loss_checks.make_inputs(*sizes, dtype, "cpu")
    truth = loss_checks.run(linear_cross_entropy_reference, inputs, torch.float64, **terms)
    plain = loss_checks.run(linear_cross_entropy_reference, inputs, **terms)
    results = {name: truth[name].to(plain[name].dtype) for name in truth}
    refuse_one_percent(results, plain, truth, dict.fromkeys(truth, dtype), loss_checks.deviations(inputs, **terms))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_correct_float32_passes_even_if_plain_pytorch_were_exact(case):
    inputs = make_inputs(case, "cpu")
    truth, plain = truth_and_plain(inputs)
    deviations = attention_deviation(inputs, torch.float32)
    for name, expected in truth.items():
        assert_close(name, plain[name], expected, expected, torch.float32, deviations[name])


@pytest.mark.parametrize("n", [1, 16, 1000, 30000])
@pytest.mark.parametrize("signs", ["either", "one"])
def test_a_sum_in_any_order_is_within_its_deviation(n, signs):
    """Compares float32 sums with float64: one number after the other, which loses most, and a tree."""
    terms = torch.randn(n, generator=torch.Generator().manual_seed(n))
    terms = terms.abs() if signs == "one" else terms
    exact = terms.double()
    deviation = 2.0**-24 * sum_variance(n, exact.square().sum(), exact.sum()).sqrt()
    for total in (terms.numpy().cumsum()[-1].item(), terms.sum().item(), terms.flip(0).numpy().cumsum()[-1].item()):
        assert abs(total - exact.sum()) <= 2 * deviation
    assert deviation <= 2.0**-24 * n**0.5 * exact.abs().sum() * 2**0.5


def test_deviations_are_small_beside_the_truth():
    """In an ordinary case a deviation is a few rounding steps, so float32 errors above 1e-5 of the truth fail."""
    inputs = make_inputs(Case(129, 129, mask=masks.sliding_window(20), features=FEATURES), "cpu")
    truth, _ = truth_and_plain(inputs)
    for name, deviation in attention_deviation(inputs, torch.float32).items():
        seen = truth[name].masked_fill(truth[name].isinf(), 0.0)
        assert deviation.shape == seen.shape
        assert 1e-7 <= root_mean_square(deviation) / root_mean_square(seen) <= 1e-5, name


def test_an_exact_reference_does_not_tighten_the_bound():
    truth = torch.randn(100, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    ours = (truth + 4e-6 * truth.flip(0)).float()
    with pytest.raises(AssertionError, match="out: error"):
        assert_close("out", ours, truth, truth, torch.float32)
    assert_close("out", ours, truth, truth, torch.float32, torch.full_like(truth, 4e-6))
    with pytest.raises(AssertionError, match=r"off by a factor of 1\.0[01]"):
        assert_close("out", (1.01 * truth).bfloat16(), truth + 0.05, truth, torch.bfloat16)
    assert_close("lse", torch.tensor([math.inf]), torch.tensor([math.inf]), torch.tensor([math.inf]), torch.float32)
