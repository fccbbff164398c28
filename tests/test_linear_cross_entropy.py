"""The fused loss: agrees with the reference in float64 by the rule for attention, and keeps its other promises."""

from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from kernels import cross_entropy_triton, dispatch, linear_cross_entropy, linear_cross_entropy_reference
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


@pytest.mark.parametrize("terms", [*TERMS, {"z_loss": 1.0}], ids=str)
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
    """Values and gradients of the chunked path and of F.cross_entropy, in float64."""
    inputs = make_inputs(17, 65, 16, torch.float64, "cpu")

    def torch_own(x, weight, targets, **options):
        return F.cross_entropy(F.linear(x, weight), targets, **options)

    ours = run(linear_cross_entropy, inputs, impl="chunked", label_smoothing=0.2)
    for name, expected in run(torch_own, inputs, label_smoothing=0.2).items():
        torch.testing.assert_close(ours[name], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradients_equal_finite_differences(reduction):
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


@pytest.mark.parametrize("impl", [*IMPLEMENTATIONS, "reference", "auto"])
def test_ignore_index_may_be_a_token(impl, device):
    inputs = make_inputs(12, 5, 16, torch.float32, device)
    targets = inputs.targets.clamp(min=0)
    assert (targets == 3).any()
    ours = linear_cross_entropy(inputs.x, inputs.weight, targets, ignore_index=3, impl=impl)
    torch.testing.assert_close(ours, F.cross_entropy(inputs.x @ inputs.weight.T, targets, ignore_index=3))


@pytest.mark.parametrize("impl", [*IMPLEMENTATIONS, "reference"])
@pytest.mark.parametrize("wrong", [65, -1])
def test_targets_out_of_range_raise_on_a_cpu(impl, wrong):
    if impl == "triton" and not dispatch.runs_on(torch.device("cpu")):
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
def test_repeated_calls_give_the_same_bits(impl, device):
    inputs = make_inputs(17, 300, 16, torch.bfloat16, device)
    with small_pieces(7 * 300 * 2):
        one, two = (run(linear_cross_entropy, inputs, impl=impl, **ALL_TERMS) for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_backward_can_run_twice():
    inputs = make_inputs(4, 65, 16, torch.float32, "cpu")
    x = inputs.x.detach().requires_grad_()
    loss = linear_cross_entropy(x, inputs.weight, inputs.targets, impl="chunked")
    (one,) = torch.autograd.grad(loss, x, retain_graph=True)
    (two,) = torch.autograd.grad(loss * 2, x)
    torch.testing.assert_close(2 * one, two)


def test_the_upstream_gradient_is_not_rounded(device):
    """16 bits cannot represent 1 / N for many tokens, so the product is in float32."""
    inputs = make_inputs(4, 65, 16, torch.bfloat16, device)
    x = inputs.x.detach().requires_grad_()
    loss = linear_cross_entropy(x, inputs.weight, inputs.targets, reduction="sum", impl="chunked")
    one, third = (torch.autograd.grad(loss / n, x, retain_graph=True)[0] for n in (1, 3))
    assert torch.equal(third, (one.float() * torch.tensor(1 / 3, device=device)).bfloat16())


def test_unneeded_gradients_are_not_computed():
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
    """x and weight are cast, but dweight, summed in float32 for a float32 weight, is not rounded to 16 bits."""
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
def test_second_derivatives_are_refused(reduction):
    inputs = make_inputs(4, 65, 16, torch.float32, "cpu")
    x = inputs.x.detach().requires_grad_()
    loss = linear_cross_entropy(x, inputs.weight, inputs.targets, reduction=reduction, impl="chunked").square().sum()
    (dx,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative"):
        dx.sum().backward()


def path_of(x, weight, targets) -> str:
    """Return the path of auto."""
    return public.__globals__["_choose"](x, weight, targets)


def test_auto_uses_the_reference_for_few_logits():
    """Up to 4 x 65 logits here, for any axes of x; 2^24 by default."""
    inputs = make_inputs(4, 65, 16, torch.float32, "cpu")
    inputs.x = inputs.x.contiguous()
    for x, targets in ((inputs.x, inputs.targets), (inputs.x.view(2, 2, 16), inputs.targets.reshape(2, 2))):
        for most, path in ((260, "reference"), (259, "chunked")):
            with mock.patch.dict(public.__globals__, MOST_LOGITS=most):
                assert path_of(x, inputs.weight, targets) == path
    with mock.patch.dict(public.__globals__, MOST_LOGITS=260):
        assert path_of(inputs.x[:, :1], inputs.weight[:, :1], inputs.targets) == "reference"
        assert path_of(inputs.x[:0], inputs.weight, inputs.targets[:0]) == "reference"
    large = torch.empty(4097, 8, device="meta")
    for rows, path in ((4096, "reference"), (4097, "chunked")):
        assert path_of(large[:rows], large[:4096], large[:rows, 0].long()) == path


def test_auto_runs_the_path_that_it_chooses():
    inputs = make_inputs(4, 65, 16, torch.float32, "cpu")
    args = inputs.x, inputs.weight, inputs.targets
    for reduction in ("mean", "sum", "none"):
        options = {"reduction": reduction, "ignore_index": int(inputs.targets[0]), **ALL_TERMS}
        with_its_own = args[0], args[1], inputs.targets.clamp(min=0)
        expected = linear_cross_entropy_reference(*with_its_own, **options)
        for impl in ("auto", "reference"):
            assert torch.equal(linear_cross_entropy(*with_its_own, **options, impl=impl), expected)
    with mock.patch.object(chunks, "_losses", side_effect=ZeroDivisionError) as chunked:
        linear_cross_entropy(*args)
        with mock.patch.dict(public.__globals__, MOST_LOGITS=4 * 65 - 1):
            for axes in ((4,), (2, 2)):
                with pytest.raises(ZeroDivisionError):
                    linear_cross_entropy(args[0].reshape(*axes, 16), args[1], args[2].reshape(axes))
    assert chunked.call_count == 2


def test_auto_uses_the_kernels_on_a_supported_gpu():
    x = mock.MagicMock(is_cuda=True, shape=(4, 16))
    x.numel.return_value = 64
    changes = {"is_transformed": lambda *tensors: False, "MOST_LOGITS": 0}
    for why_not, path in ((None, "triton"), ("too old", "chunked")):
        with mock.patch.dict(public.__globals__, changes, why_not_triton=lambda x, why=why_not: why):
            assert path_of(x, torch.empty(65, 16), torch.empty(4)) == path


def test_the_choice_of_auto_is_logged_once(caplog):
    inputs = make_inputs(4, 65, 16, torch.float32, "cpu")
    args = inputs.x, inputs.weight, inputs.targets
    with (
        mock.patch.dict(public.__globals__, MOST_LOGITS=0),
        mock.patch.object(dispatch, "_announced", set()),
        caplog.at_level("INFO", logger="kernels"),
    ):
        with mock.patch.object(torch.compiler, "is_compiling", return_value=True):
            linear_cross_entropy(*args)
        assert not caplog.records
        for _ in range(2):
            linear_cross_entropy(*args)
        public.__globals__["MOST_LOGITS"] = 260
        linear_cross_entropy(*args)
    said = [(record.name, record.getMessage()) for record in caplog.records]
    assert said == [("kernels", f"linear_cross_entropy runs on {path}: no GPU") for path in ("chunked", "reference")]


def test_without_triton_the_kernels_are_refused():
    inputs = make_inputs(4, 65, 16, torch.float32, "cpu")
    with (
        mock.patch.object(dispatch, "why_no_triton", "triton does not import here: no wheel"),
        pytest.raises(NotImplementedError, match="cannot do this call: triton does not import here"),
    ):
        linear_cross_entropy(inputs.x, inputs.weight, inputs.targets, impl="triton")


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("impl", [*IMPLEMENTATIONS, "reference", "auto"])
def test_autocast_casts_x_and_weight(impl, reduction, device):
    """The bits are equal; float64 keeps its precision."""
    inputs = make_inputs(5, 65, 16, torch.float32, device)
    cast = inputs.x.bfloat16(), inputs.weight.bfloat16(), inputs.targets
    with torch.autocast(device, torch.bfloat16):
        ours = linear_cross_entropy(inputs.x, inputs.weight, inputs.targets, reduction=reduction, impl=impl)
        if impl != "triton":
            double = linear_cross_entropy(
                inputs.x.double(), inputs.weight.double(), inputs.targets, reduction=reduction, impl=impl
            )
            assert double.dtype == torch.float64
    expected = linear_cross_entropy(*cast, reduction=reduction, impl=impl)
    assert ours.dtype == torch.float32 and torch.equal(ours, expected)
    if impl != "triton":
        exact = linear_cross_entropy_reference(
            inputs.x.double(), inputs.weight.double(), inputs.targets, reduction=reduction
        )
        torch.testing.assert_close(double, exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
def test_the_reference_sums_in_float32(dtype):
    """Its logits have x's dtype; the rest is float32."""
    inputs = make_inputs(17, 300, 16, dtype, "cpu")
    args = inputs.x, inputs.weight, inputs.targets
    losses = linear_cross_entropy_reference(*args, reduction="none")
    logits = F.linear(inputs.x, inputs.weight).double()
    expected = F.cross_entropy(logits, inputs.targets, reduction="none")
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses.double(), expected, rtol=1e-6, atol=1e-6)


def test_the_reference_refuses_two_dtypes():
    """Unless autocast makes them equal."""
    inputs = make_inputs(4, 65, 16, torch.float32, "cpu")
    args = inputs.x.bfloat16(), inputs.weight, inputs.targets
    with pytest.raises(TypeError, match="x and weight must have one dtype"):
        linear_cross_entropy_reference(*args)
    with torch.autocast("cpu", torch.bfloat16):
        linear_cross_entropy_reference(*args)


def test_meta_tensors_give_a_meta_loss():
    x, weight = (torch.empty(n, 8, device="meta", requires_grad=True) for n in (4, 65))
    for impl in ("auto", "chunked", "reference"):
        loss = linear_cross_entropy(x, weight, torch.empty(4, dtype=torch.int64, device="meta"), impl=impl)
        assert loss.device.type == "meta" and loss.shape == ()
        loss.backward()
        assert x.grad.shape == x.shape and weight.grad.shape == weight.shape
