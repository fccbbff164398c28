"""The parts of the fused loss: chunks of rows, gradients on demand, operators and memory."""

import json
import math
import warnings
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from kernels import linear_cross_entropy, linear_cross_entropy_reference
from kernels import linear_cross_entropy_chunks as chunks
from tests.attention_checks import assert_close
from tests.loss_checks import ALL_TERMS, check, deviations, make_inputs, run, small_pieces

IMPLEMENTATIONS = ["triton", "chunked"]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("wanted", ["x", "weight"])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_one_gradient_alone_has_the_same_bits(impl, wanted, dtype, reduction, device):
    """Over three chunks; nothing is computed or scaled for the other gradient."""
    inputs = make_inputs(17, 65, 16, dtype, device)
    grads = []
    for names in (("x", "weight"), (wanted,)):
        tensors = {name: getattr(inputs, name).detach().requires_grad_(name in names) for name in ("x", "weight")}
        with small_pieces(7 * 65 * inputs.x.element_size()):
            loss = linear_cross_entropy(**tensors, targets=inputs.targets, reduction=reduction, impl=impl, **ALL_TERMS)
            with mock.patch.object(chunks, "_guarded_scaled", side_effect=chunks._guarded_scaled) as scaled:
                grads.append(torch.autograd.grad(loss.sum() / 3, tensors[wanted])[0])
        assert scaled.call_count == (reduction != "none") * len(names)
    assert torch.equal(*grads) and grads[0].any()


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_memory_behind_the_logits_does_not_reach_a_gradient(impl, reduction, device):
    """Rows of logits are padded, and a CPU with AMX reads the padding in bfloat16."""
    inputs = make_inputs(300, 131, 32, torch.bfloat16, device)
    x = inputs.x.requires_grad_()
    with small_pieces(1 << 20):
        loss = linear_cross_entropy(x, inputs.weight, inputs.targets, reduction=reduction, impl=impl)
        (dx,) = torch.autograd.grad(loss.sum(), x)
    assert dx.isfinite().all()


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("wanted", ["x", "weight"])
def test_one_gradient_alone_agrees_with_the_reference(wanted, reduction):
    inputs = make_inputs(17, 65, 16, torch.float64, "cpu")
    grads = []
    for options in ({"impl": "chunked"}, {"impl": "reference"}):
        tensors = {name: getattr(inputs, name).detach().requires_grad_(name == wanted) for name in ("x", "weight")}
        with small_pieces(7 * 65 * 8):
            loss = linear_cross_entropy(**tensors, targets=inputs.targets, reduction=reduction, **options)
            grads.append(torch.autograd.grad((loss * inputs.dlosses.double()).sum(), tensors[wanted])[0])
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-12)


def test_single_losses_get_gradients_only_in_the_backward_pass():
    inputs = make_inputs(4, 65, 16, torch.float32, "cpu")
    x, weight = (t.detach().requires_grad_() for t in (inputs.x, inputs.weight))
    with mock.patch.multiple(chunks, _to_gradient=None, add_product=None):
        losses = linear_cross_entropy(x, weight, inputs.targets, impl="chunked", reduction="none")
    assert losses.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_vocabulary_of_one_word(impl, dtype, device):
    """V = 1: every loss is z_loss * lse^2, and an ignored target is not a row."""
    check(make_inputs(5, 1, 16, dtype, device), impl)
    check(make_inputs(5, 1, 16, dtype, device), impl, z_loss=0.01, label_smoothing=0.5)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_the_kernels_run_only_on_request(impl, device):
    inputs = make_inputs(4, 65, 16, torch.float32, device)
    weight = inputs.weight.detach().requires_grad_()
    kernels = chunks.cross_entropy_triton
    with (
        mock.patch.object(kernels, "loss_launch", side_effect=kernels.loss_launch) as loss_launch,
        mock.patch.object(kernels, "gradient_launch", side_effect=kernels.gradient_launch) as gradient_launch,
    ):
        for reduction in ("mean", "none"):
            linear_cross_entropy(inputs.x, weight, inputs.targets, impl=impl, reduction=reduction).sum().backward()
    assert (loss_launch.call_count, gradient_launch.call_count) == ((2, 1) if impl == "triton" else (0, 0))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_the_mean_under_autocast_keeps_the_weights_precision(impl, device):
    inputs = make_inputs(17, 65, 16, torch.float32, device)
    with torch.autocast(device, torch.bfloat16), small_pieces(7 * 65 * 2):
        ours = run(linear_cross_entropy, inputs, impl=impl)["dweight of the mean"]
    truth = run(linear_cross_entropy_reference, inputs, torch.float64)["dweight of the mean"]
    with torch.autocast(device, torch.bfloat16):
        plain = run(linear_cross_entropy_reference, inputs)["dweight of the mean"]
    assert ours.dtype == torch.float32 and not torch.equal(ours, ours.bfloat16().float())
    deviation = deviations(inputs)["dweight of the mean"]
    assert_close("dweight of the mean", ours, plain, truth, torch.float32, deviation)


@pytest.mark.parametrize(("N", "V"), [(17, 65), (14, 64), (3, 129), (0, 5)])
def test_chunks_share_one_buffer(N, V):
    """Rows begin at multiples of 64 elements; every row occurs once."""
    x, weight = torch.randn(N, 8), torch.randn(V, 8)
    seen, places = [], set()
    with mock.patch.dict(chunks.CHUNK_BYTES, cpu=7 * V * 4), warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns where a product does not fit the memory that it is given
        for at, logits in chunks._chunks(x, weight):
            torch.testing.assert_close(logits, x[at] @ weight.T)
            assert logits.shape[0] <= 7 and (logits.stride(0), logits.stride(1)) == (-(-V // 64) * 64, 1)
            seen += range(at.start, at.stop)
            places.add(logits.data_ptr())
    assert seen == list(range(N)) and len(places) == min(N, 1)


def test_memory_is_allocated_on_the_device_and_in_the_dtype():
    x = torch.empty(1, device="meta", dtype=torch.bfloat16)
    for options, dtype in (({}, torch.bfloat16), ({"dtype": torch.float32}, torch.float32)):
        made = chunks._empty(2, 3, like=x, **options)
        assert (made.shape, made.device.type, made.dtype) == ((2, 3), "meta", dtype)


@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize("hip", [None, "6.0"])
def test_products_of_16_bits_are_summed_in_float32_on_a_gpu(is_first, hip):
    """On CUDA by the product itself, on HIP as on a CPU; tested without a GPU."""
    total = mock.MagicMock(dtype=torch.float32, is_cuda=True)
    a, b = (mock.MagicMock(dtype=torch.bfloat16) for _ in range(2))
    with mock.patch.object(torch, "addmm") as addmm, mock.patch.object(torch, "version", SimpleNamespace(hip=hip)):
        chunks.add_product(total, a, b, is_first)
    if hip is None:
        addmm.assert_called_once_with(total, a, b, out_dtype=torch.float32, beta=int(not is_first), out=total)
    else:
        assert not addmm.called and total.copy_.called == is_first and total.add_.called != is_first


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=lambda dtype: str(dtype)[6:])
def test_operators_in_every_dtype(dtype):
    """The fakes agree with the operators, whichever gradients are wanted."""
    inputs = make_inputs(5, 65, 16, dtype, "cpu")
    args = inputs.x, inputs.weight, inputs.targets, 5.0, 0.1, 0.1, -100, False
    tests = ("test_schema", "test_faketensor")
    losses, lse = chunks.losses_of(*args)
    torch.library.opcheck(chunks.losses_of, args, test_utils=tests)
    for wants in ((True, True), (True, False), (False, True), (False, False)):
        torch.library.opcheck(chunks.total_of, (*args, *wants), test_utils=tests)
        torch.library.opcheck(chunks._losses_backward, (torch.ones_like(losses), lse, *args, *wants), test_utils=tests)
    for to in (torch.float32, torch.bfloat16):
        torch.library.opcheck(chunks._scaled, (inputs.x, losses[0], to), test_utils=tests)
        scaled = chunks._scaled(inputs.x, losses[0], to)
        assert scaled.dtype == to
        assert torch.equal(scaled, (inputs.x * losses[:1].view(1, 1)).to(to))


def peak_memory(fn, path) -> tuple[int, int]:
    """Return the peak of allocated bytes while fn runs, and the largest allocation, by torch's profile."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        fn()
    profiler.export_chrome_trace(str(path))
    events = [e for e in json.loads(path.read_text())["traceEvents"] if e["name"] == "[memory]"]
    sizes = [e["args"]["Bytes"] for e in sorted(events, key=lambda e: e["ts"])]
    held = peak = 0
    for size in sizes:
        held += size
        peak = max(peak, held)
    return peak, max(sizes)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_peak_memory_is_one_chunk(reduction, tmp_path):
    """Forward and backward hold a few chunks and the gradients, for any number of rows."""
    N, V, C, chunk = 2048, 3000, 8, 1 << 20
    x, weight, targets = torch.randn(N, C), torch.randn(V, C).requires_grad_(), torch.randint(V, (N,))
    x.requires_grad_()

    def step(impl):
        return lambda: torch.autograd.grad(
            linear_cross_entropy(x, weight, targets, impl=impl, reduction=reduction).sum(), (x, weight)
        )

    with mock.patch.dict(chunks.CHUNK_BYTES, cpu=chunk):
        peak, largest = peak_memory(step("chunked"), tmp_path / "chunked.json")
    gradients = 4 * (N + V) * C
    assert largest <= 1.1 * chunk
    assert peak <= 3 * chunk + 3 * gradients + 16 * 4 * N
    # The measurement does find more memory if more is used.
    peak, largest = peak_memory(step("reference"), tmp_path / "reference.json")
    assert largest >= 4 * N * V and peak >= 8 * N * V


@pytest.mark.parametrize(
    ("N", "V", "itemsize", "device", "rows"),
    [
        (16384, 50304, 2, "cuda", 8192),
        (524288, 50304, 2, "cuda", 10496),
        (1, 50304, 2, "cuda", 1),
        (300, 65, 4, "cpu", 300),
        (8192, 50304, 4, "cpu", 256),
        (10, 1 << 30, 4, "cpu", 1),
        (200, 1 << 17, 4, "cpu", 128),  # 128 rows fit, to the byte
        (200, (1 << 17) + 1, 4, "cpu", 100),  # 127 do
        (65, 1 << 18, 4, "cpu", 33),  # 64 do
        (8192, 50304, 4, "mps", 256),
        (300, 1 << 21, 4, "cuda", 128),  # 128 do
        (300, (1 << 21) + 1, 4, "cuda", 100),  # 127 do
    ],
)
def test_chunks(N, V, itemsize, device, rows):
    assert chunks.chunk_rows(N, V, itemsize, device) == rows
    assert rows == 1 or rows * V * itemsize <= chunks.CHUNK_BYTES.get(device, 64 << 20)


def test_the_backward_pass_holds_gradients_twice(tmp_path):
    """Before and after scaling, with no third tensor of the weight's size."""
    x, weight, targets = torch.randn(64, 256), torch.randn(2048, 256).requires_grad_(), torch.randint(2048, (64,))

    def step():
        torch.autograd.grad(linear_cross_entropy(x, weight, targets, impl="chunked"), weight)

    with mock.patch.dict(chunks.CHUNK_BYTES, cpu=1 << 16):
        peak, _ = peak_memory(step, tmp_path / "trace.json")
    assert 2 * weight.nbytes <= peak <= 2.2 * weight.nbytes


def test_float32_gradients_overwrite_their_logits(tmp_path):
    logits, targets = torch.randn(64, 2048), torch.randint(2048, (64,))
    lse, options = logits.logsumexp(1), chunks.Options(0.0, 0.0, 0.0, -100, False)
    expected = logits.softmax(1) - torch.nn.functional.one_hot(targets, 2048)

    def step():
        chunks._to_gradient(logits, targets, lse, torch.ones(64), options)

    peak, _ = peak_memory(step, tmp_path / "trace.json")
    assert peak < logits.nbytes / 2
    torch.testing.assert_close(logits, expected)
    assert math.isfinite(logits.sum())
