"""The fused loss against the reference in float64, by the rule that attention is held to, and what it promises."""

from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from kernels import cross_entropy_triton, linear_cross_entropy, linear_cross_entropy_reference
from kernels import linear_cross_entropy as public
from kernels import linear_cross_entropy_chunks as chunks
from tests.attention_checks import assert_close
from tests.loss_checks import ALL_TERMS, TERMS, check, deviations, make_inputs, name_of, run, small_pieces

IMPLEMENTATIONS = ["triton", "chunked"]


@pytest.fixture(autouse=True)
def small_tiles():
    with mock.patch.object(cross_entropy_triton, "MOST_COLUMNS", 256):
        yield


@pytest.mark.parametrize("terms", TERMS, ids=name_of)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_terms_and_dtypes(impl, dtype, terms, device):
    check(make_inputs(17, 300, 40, dtype, device), impl, **terms)


@pytest.mark.parametrize(
    ("N", "V", "C"),
    [(1, 1, 16), (1, 1023, 200), (17, 65, 16), (9, 1000, 33), (9, 1023, 96), (130, 65, 24), (5, 256, 16)],
    ids=str,
)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_sizes(impl, N, V, C, device):
    check(make_inputs(N, V, C, torch.float32, device), impl, **ALL_TERMS)
    check(make_inputs(N, V, C, torch.bfloat16, device), impl)


@pytest.mark.parametrize("terms", TERMS, ids=name_of)
def test_the_reference_is_the_formula(terms):
    inputs = make_inputs(17, 65, 16, torch.float64, "cpu")
    cap, z, e = (terms.get(name, 0.0) for name in ALL_TERMS)
    s = inputs.x @ inputs.weight.T
    s = cap * torch.tanh(s / cap) if cap else s
    lse = s.exp().sum(1).log()
    target = s[torch.arange(17), inputs.targets.clamp(min=0)]
    expected = lse - (1 - e) * target - e * s.mean(1) + z * lse**2
    losses = linear_cross_entropy_reference(inputs.x, inputs.weight, inputs.targets, reduction="none", **terms)
    torch.testing.assert_close(losses, expected.where(inputs.targets >= 0, 0.0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        linear_cross_entropy_reference(inputs.x, inputs.weight, inputs.targets, **terms),
        expected[inputs.targets >= 0].mean(),
        rtol=1e-12,
        atol=1e-12,
    )


def test_equals_torch_in_float64():
    """Chunked, in float64, beside F.cross_entropy itself: values and gradients."""
    inputs = make_inputs(17, 65, 16, torch.float64, "cpu")

    def torch_own(x, weight, targets, **options):
        return F.cross_entropy(F.linear(x, weight), targets, **options)

    ours = run(linear_cross_entropy, inputs, impl="chunked", label_smoothing=0.2)
    for name, expected in run(torch_own, inputs, label_smoothing=0.2).items():
        torch.testing.assert_close(ours[name], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradients_are_those_of_finite_differences(reduction):
    inputs = make_inputs(5, 7, 4, torch.float64, "cpu")
    x, weight = (t.detach().requires_grad_() for t in (inputs.x, inputs.weight))

    def loss(x, weight):
        return linear_cross_entropy(x, weight, inputs.targets, reduction=reduction, impl="chunked", **ALL_TERMS)

    with small_pieces(2 * 7 * 8):
        assert torch.autograd.gradcheck(loss, (x, weight))


@pytest.mark.parametrize("impl", [*IMPLEMENTATIONS, "reference"])
def test_leading_axes_and_reductions(impl, device):
    inputs = make_inputs(12, 65, 16, torch.float32, device)
    x, targets = inputs.x.view(3, 4, 16), inputs.targets.reshape(3, 4)
    results = {
        reduction: linear_cross_entropy(x, inputs.weight, targets, reduction=reduction, impl=impl)
        for reduction in ("none", "sum", "mean")
    }
    assert results["none"].shape == (3, 4)
    torch.testing.assert_close(results["sum"], results["none"].sum())
    torch.testing.assert_close(results["mean"], results["none"].sum() / (targets >= 0).sum())


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_ignore_index_may_be_a_token(impl, device):
    inputs = make_inputs(12, 5, 16, torch.float32, device)
    targets = inputs.targets.clamp(min=0)
    assert (targets == 3).any()
    ours = linear_cross_entropy(inputs.x, inputs.weight, targets, ignore_index=3, impl=impl)
    torch.testing.assert_close(ours, F.cross_entropy(inputs.x @ inputs.weight.T, targets, ignore_index=3))


@pytest.mark.parametrize("impl", [*IMPLEMENTATIONS, "reference"])
@pytest.mark.parametrize("wrong", [65, -1])
def test_targets_out_of_range_raise_on_a_cpu(impl, wrong):
    if impl == "triton" and not cross_entropy_triton.runs_on(torch.device("cpu")):
        pytest.skip("the kernels run on the GPU here")
    inputs = make_inputs(4, 65, 16, torch.float32, "cpu")
    inputs.targets[1] = wrong
    with pytest.raises(IndexError, match=f"{wrong} is out of bounds"):
        linear_cross_entropy(inputs.x, inputs.weight, inputs.targets, impl=impl)


def test_targets_out_of_range_are_nan_in_the_kernel(device):
    logits = torch.zeros(3, 65, device=device)
    targets = torch.tensor([65, 4, -1], device=device)
    losses, lse = torch.zeros(2, 3, device=device)
    terms = cross_entropy_triton.Terms(0.0, 0.0, 0.0, -100)
    cross_entropy_triton.loss_launch(logits, targets, losses, lse, terms, gradient=True).run()
    assert losses.isnan().tolist() == logits.isnan().any(1).tolist() == [True, False, True]


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_same_bits_again(impl, device):
    inputs = make_inputs(17, 300, 16, torch.bfloat16, device)
    with small_pieces(7 * 300 * 2):
        one, two = (run(linear_cross_entropy, inputs, impl=impl, **ALL_TERMS) for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_graph_can_be_gone_through_twice():
    inputs = make_inputs(4, 65, 16, torch.float32, "cpu")
    x = inputs.x.detach().requires_grad_()
    loss = linear_cross_entropy(x, inputs.weight, inputs.targets, impl="chunked")
    (one,) = torch.autograd.grad(loss, x, retain_graph=True)
    (two,) = torch.autograd.grad(loss * 2, x)
    torch.testing.assert_close(2 * one, two)


def test_the_upstream_gradient_is_not_rounded(device):
    """1 / N of many tokens has no 16-bit value: the product is float32's."""
    inputs = make_inputs(4, 65, 16, torch.bfloat16, device)
    x = inputs.x.detach().requires_grad_()
    loss = linear_cross_entropy(x, inputs.weight, inputs.targets, reduction="sum", impl="chunked")
    one, third = (torch.autograd.grad(loss / n, x, retain_graph=True)[0] for n in (1, 3))
    assert torch.equal(third, (one.float() * torch.tensor(1 / 3, device=device)).bfloat16())


def test_no_gradient_is_made_that_nobody_wants():
    inputs = make_inputs(4, 65, 16, torch.float32, "cpu")
    x, weight = (t.detach().requires_grad_() for t in (inputs.x, inputs.weight))
    with mock.patch.object(chunks, "_to_gradient", side_effect=AssertionError), torch.no_grad():
        without = linear_cross_entropy(x, weight, inputs.targets, impl="chunked")
    with mock.patch.object(chunks, "add_product", side_effect=AssertionError):
        for reduction in ("mean", "none"):
            loss = linear_cross_entropy(x, inputs.weight, inputs.targets, reduction=reduction, impl="chunked")
            loss.sum().backward()
    assert x.grad is not None and not without.requires_grad


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_autocast(impl, device):
    """x and weight are cast; dweight, summed in float32, is not rounded to 16 bits on its way to a float32 weight."""
    inputs = make_inputs(17, 65, 16, torch.float32, device)
    with torch.autocast(device, torch.bfloat16), small_pieces(7 * 65 * 2):
        ours = run(linear_cross_entropy, inputs, impl=impl)
    truth = run(linear_cross_entropy_reference, inputs, torch.float64)
    with torch.autocast(device, torch.bfloat16):
        plain = run(linear_cross_entropy_reference, inputs)
    deviation = deviations(inputs)
    for name in truth:
        assert ours[name].dtype == torch.float32
        assert_close(name, ours[name], plain[name], truth[name], torch.float32, deviation[name])
    assert not torch.equal(ours["dweight"], ours["dweight"].bfloat16().float())


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("impl", ["triton", "chunked", "auto"])
def test_compiles_as_one_graph(impl, reduction, device):
    inputs = make_inputs(5, 65, 16, torch.float32, device)

    def loss(x, weight, targets, **options):
        return linear_cross_entropy(x * 2, weight, targets, softcap=5.0, impl=impl, **options)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    x, weight = (t.detach().requires_grad_() for t in (inputs.x, inputs.weight))
    results = [f(x, weight, inputs.targets, reduction=reduction) for f in (loss, compiled)]
    torch.testing.assert_close(*results)
    for one, two in zip(*(torch.autograd.grad(r.sum(), (x, weight)) for r in results)):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("triton", [False, True], ids=["chunked", "triton"])
def test_operators(triton, device):
    inputs = make_inputs(5, 65, 16, torch.float32, device)
    x, weight = (t.detach().requires_grad_() for t in (inputs.x, inputs.weight))
    args = (x, weight, inputs.targets, 5.0, 0.1, 0.1, -100, triton)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(chunks.losses_of, args, test_utils=tests)
    for wants in ((True, True), (False, False)):
        torch.library.opcheck(chunks.total_of, (*args, *wants), test_utils=tests[:3])


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_no_second_derivative(reduction):
    inputs = make_inputs(4, 65, 16, torch.float32, "cpu")
    x = inputs.x.detach().requires_grad_()
    loss = linear_cross_entropy(x, inputs.weight, inputs.targets, reduction=reduction, impl="chunked").square().sum()
    (dx,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative"):
        dx.sum().backward()


def test_auto_takes_the_reference_where_logits_are_few():
    inputs = make_inputs(4, 65, 16, torch.float32, "cpu")
    args = inputs.x, inputs.weight, inputs.targets
    assert torch.equal(linear_cross_entropy(*args), linear_cross_entropy(*args, impl="reference"))
    with mock.patch.object(chunks, "_losses", side_effect=ZeroDivisionError) as chunked:
        linear_cross_entropy(*args)
        with mock.patch.dict(public.__globals__, MOST_LOGITS=4 * 65 - 1), pytest.raises(ZeroDivisionError):
            linear_cross_entropy(*args)
    assert chunked.call_count == 1
