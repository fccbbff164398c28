"""Unusual calls of linear_cross_entropy: no targets, torch.func, arguments of other types."""

import contextlib
import itertools
import math
import re

import numpy as np
import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from gpt.config import PRESETS
from kernels import linear_cross_entropy, linear_cross_entropy_reference
from kernels import linear_cross_entropy_chunks as chunks
from tests.loss_checks import ALL_TERMS, TERMS, make_inputs, name_of
from tests.test_decode import VOCAB, model_of

KERNELS = ["triton", "chunked"]
EVERY = [*KERNELS, "reference", "auto"]


@pytest.mark.parametrize("terms", TERMS, ids=name_of)
@pytest.mark.parametrize("impl", EVERY)
@pytest.mark.parametrize("N", [0, 3], ids="N{}".format)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
def test_over_no_target_the_loss_is_zero(dtype, N, impl, terms, device):
    """Its gradients are zero too, even if a logit of an ignored row overflows."""
    inputs = make_inputs(N, 65, 16, dtype, device)
    targets = torch.full_like(inputs.targets, -100)
    for reduction in ("sum", "mean", "none"):
        x, weight = (t.detach().requires_grad_() for t in (inputs.x, inputs.weight))
        loss = linear_cross_entropy(x, weight, targets, reduction=reduction, impl=impl, **terms)
        assert loss.shape == (targets.shape if reduction == "none" else ()) and (loss == 0).all()
        loss.sum().backward()
        assert (x.grad == 0).all() and (weight.grad == 0).all()


@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
@pytest.mark.parametrize("impl", EVERY)
def test_ignored_rows_may_hold_any_values(impl, reduction, device):
    inputs = make_inputs(5, 65, 16, torch.float32, device)
    clean = linear_cross_entropy(inputs.x, inputs.weight, inputs.targets, reduction=reduction, impl=impl, **ALL_TERMS)
    for wrong in (math.nan, math.inf, 1e38):
        x = inputs.x.clone()
        x[inputs.targets < 0] = wrong
        loss = linear_cross_entropy(x, inputs.weight, inputs.targets, reduction=reduction, impl=impl, **ALL_TERMS)
        torch.testing.assert_close(loss, clean, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_a_models_loss_over_no_target_is_zero(softcap):
    model = model_of(**PRESETS["modern"], logit_softcap=softcap)
    tokens = torch.randint(VOCAB, (2, 12))
    loss = model.loss(tokens, torch.full_like(tokens, -100), z_loss=0.1, label_smoothing=0.1)
    loss.backward()
    assert loss == 0 and all((p.grad == 0).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("impl", EVERY)
def test_one_position(impl, device):
    """x (C,) and a single target without axes."""
    inputs = make_inputs(2, 65, 16, torch.float32, device)
    rows = linear_cross_entropy(inputs.x, inputs.weight, inputs.targets, reduction="none", impl=impl)
    for reduction in ("none", "sum", "mean"):
        one = linear_cross_entropy(inputs.x[1], inputs.weight, inputs.targets[1], reduction=reduction, impl=impl)
        assert one.shape == ()
        torch.testing.assert_close(one, rows[1])


def function_of(name: str, impl: str, reduction: str, device: str):
    """Return the loss as a function of x or of the weight, and that tensor."""
    inputs = make_inputs(5, 11, 8, torch.float32, device)
    tensors = {"x": inputs.x.clone(), "weight": inputs.weight.clone(), "targets": inputs.targets}

    def loss(value):
        found = linear_cross_entropy(**(tensors | {name: value}), reduction=reduction, impl=impl, softcap=5.0)
        return found.square().sum()

    return loss, tensors[name]


def in_forward_mode(loss, x, tangent):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(loss(forward_ad.make_dual(x, tangent))).tangent


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", ["x", "weight"])
@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_torch_func_is_right(impl, name, reduction, device):
    loss, x = function_of(name, impl, reduction, device)
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf), leaf)
    tangent = torch.randn_like(x)
    for found in (grad(loss)(x), jacrev(loss)(x), jacfwd(loss)(x), vjp(loss, x)[1](torch.ones((), device=device))[0]):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    for found in (jvp(loss, (x,), (tangent,))[1], in_forward_mode(loss, x, tangent)):
        torch.testing.assert_close(found, (expected * tangent).sum(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(vmap(loss)(torch.stack([x, 2 * x])), torch.stack([loss(x), loss(2 * x)]))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", ["x", "weight"])
@pytest.mark.parametrize("impl", KERNELS)
def test_kernels_refuse_torch_func_and_tangents(impl, name, reduction, device):
    loss, x = function_of(name, impl, reduction, device)
    for wants_grad in (False, True):
        x = x.detach().requires_grad_(wants_grad)
        for call in (
            lambda x=x: jvp(loss, (x,), (x,)),
            lambda x=x: in_forward_mode(loss, x, x.detach()),
            lambda x=x: grad(loss)(x),
            lambda x=x: hessian(loss)(x),
            lambda x=x: vmap(loss)(x[None]),
        ):
            with pytest.raises(NotImplementedError, match='impl="reference" has both'):
                call()


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("impl", KERNELS)
def test_kernels_refuse_tangents_of_upstream_gradients(impl, reduction, device):
    loss, x = function_of("x", impl, reduction, device)
    x.requires_grad_()
    value, one = loss(x), torch.ones((), device=device)
    with pytest.raises(NotImplementedError, match='impl="reference" has both'):
        in_forward_mode(lambda flows: torch.autograd.grad(value, x, flows)[0], one, one)


@pytest.mark.parametrize("impl", KERNELS)
def test_vmap_over_targets_alone_is_refused(impl, device):
    _, x = function_of("x", impl, "mean", device)
    weight, targets = torch.zeros(11, 8, device=device), torch.zeros(2, 5, dtype=torch.int64, device=device)
    with pytest.raises(NotImplementedError, match='impl="reference" has both'):
        vmap(lambda t: linear_cross_entropy(x, weight, t, impl=impl))(targets)
    expected = torch.full((2,), math.log(11), device=device)
    torch.testing.assert_close(vmap(lambda t: linear_cross_entropy(x, weight, t))(targets), expected)


@pytest.mark.parametrize("impl", [*KERNELS, "auto"])
def test_compiled_code_drops_no_tangent(impl, device):
    torch._dynamo.reset()
    loss, x = function_of("x", impl, "mean", device)
    compiled = torch.compile(loss, backend="eager")
    if impl == "auto":
        # torch may refuse, but its results must be correct.
        with contextlib.suppress(NotImplementedError):
            found = in_forward_mode(compiled, x, x)
            torch.testing.assert_close(found, (grad(loss)(x) * x).sum(), rtol=1e-4, atol=1e-5)
    else:
        with pytest.raises(NotImplementedError):
            in_forward_mode(compiled, x, x)


def test_a_models_loss_has_forward_mode_derivatives():
    """Along random weights they agree with the gradient: on a CPU, auto drops none."""
    model = model_of(**PRESETS["gpt2"])
    tokens = torch.randint(VOCAB, (2, 9))
    weights = {name: p.detach() for name, p in model.named_parameters()}
    tangents = {name: torch.randn_like(p) for name, p in weights.items()}

    class Loss(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self):
            return self.model.loss(tokens, tokens)

    def loss(weights):
        return functional_call(Loss(), {f"model.{name}": p for name, p in weights.items()}, ())

    gradients = grad(loss)(weights)
    expected = sum((gradients[name] * tangents[name]).sum() for name in weights)
    torch.testing.assert_close(jvp(loss, (weights,), (tangents,))[1], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"softcap": 0.0}, ValueError, "softcap must be a positive number"),
        ({"z_loss": -1.0}, ValueError, "z_loss must be a number .*at least 0"),
        ({"label_smoothing": 1.5}, ValueError, "label_smoothing must be a number between 0 and 1"),
        ({"reduction": "all"}, ValueError, "unknown reduction 'all': choose mean, sum or none"),
        ({"impl": "cuda"}, ValueError, "unknown impl 'cuda': choose"),
        ({"x": torch.zeros(4, 9)}, ValueError, "do not fit"),
        ({"targets": torch.zeros(5, dtype=torch.int64)}, ValueError, "targets must have the shape"),
        ({"targets": torch.zeros(4, dtype=torch.int32)}, TypeError, "targets must be int64"),
        ({"weight": torch.zeros(6, 8, dtype=torch.float64)}, TypeError, "one dtype"),
        ({"x": torch.zeros(4, 8).double(), "weight": torch.zeros(6, 8).double(), "impl": "triton"},
         NotImplementedError, "cannot do this call"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_refused(changes, error, message):
    arguments = {"x": torch.zeros(4, 8), "weight": torch.zeros(6, 8), "targets": torch.zeros(4, dtype=torch.int64)}
    with pytest.raises(error, match=message):
        linear_cross_entropy(**arguments | changes)


TENSORS = [
    None, "text", 3, 2.5, True, [1.0, 2.0], {}, np.zeros((4, 8)), object(),
    *(torch.zeros(4, 8).to(dtype) for dtype in (torch.complex64, torch.int64, torch.bool, torch.float8_e4m3fn)),
    torch.zeros(4, 8, device="meta"), torch.zeros(4, 8).to_sparse(), torch.nested.nested_tensor([torch.zeros(4, 8)]),
    *(torch.zeros(shape) for shape in ((), (0,), (4, 0), (0, 8), (6, 8, 1))),
    *(torch.zeros(4, dtype=dtype) for dtype in (torch.float32, torch.int32, torch.bool, torch.complex64)),
    torch.zeros(4, dtype=torch.int64, device="meta"),
]  # fmt: skip
SCALARS = [
    None, "text", True, [1.0], (), {}, 1j, object(), torch.ones(()), torch.ones(3), np.ones(2), b"x", len,
    math.nan, math.inf, -math.inf, -1.0, 1e39, -1e39, 1e308, 10**400, 10**9999, 1e-320, 2**63, -(2**64), 0.5, 0, 1,
    np.float32(0.5), np.int64(3), "mean", "auto", "nonsense",
]  # fmt: skip
FUZZED = [
    *itertools.product(("x", "weight", "targets"), TENSORS),
    *itertools.product(("softcap", "z_loss", "label_smoothing", "ignore_index", "reduction", "impl"), SCALARS),
]


@pytest.mark.parametrize("impl", ["auto", "chunked", "triton", "reference", None], ids=str)
@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
def test_arguments_of_any_type_are_accepted_or_refused(autocast, impl):
    """impl None calls linear_cross_entropy_reference."""
    call = linear_cross_entropy if impl else linear_cross_entropy_reference
    taken = 0
    for name, value in FUZZED:
        arguments = {"x": torch.zeros(4, 8), "weight": torch.zeros(6, 8), "targets": torch.zeros(4, dtype=torch.int64)}
        if impl:
            arguments["impl"] = impl
        elif name == "impl":
            continue
        try:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = call(**arguments | {name: value})
        except (ValueError, TypeError, NotImplementedError) as error:
            message = str(error)
            assert message and "\n" not in message and len(message) < 250, (name, value)
            assert re.search(rf"\b{name}\b", message) or (name, impl) == ("impl", "triton"), (name, value, message)
        else:
            taken += 1
            assert loss.isfinite().all() or name in ("z_loss", "softcap"), (name, value, loss)
    assert taken >= 10


def test_a_target_outside_the_vocabulary_is_an_index_error():
    for impl in EVERY:
        with pytest.raises(IndexError):
            linear_cross_entropy(torch.zeros(4, 8), torch.zeros(6, 8), torch.full((4,), 2**62), impl=impl)


@pytest.mark.parametrize("impl", EVERY)
@pytest.mark.parametrize("softcap", [torch.finfo(torch.float32).tiny, 1e30])
def test_extreme_softcaps_are_finite(softcap, impl, device):
    inputs = make_inputs(5, 65, 16, torch.float32, device)
    loss = linear_cross_entropy(inputs.x, inputs.weight, inputs.targets, softcap=softcap, impl=impl)
    plain = linear_cross_entropy(inputs.x, inputs.weight, inputs.targets, impl=impl)
    expected = plain if softcap > 1 else torch.full_like(plain, math.log(65))
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)


def test_operators_keep_their_names():
    """Saved compiled graphs refer to these names."""
    for name in ("total", "losses", "scaled", "losses_backward"):
        assert hasattr(torch.ops.linear_cross_entropy, name)
    assert chunks.guarded_total is not chunks.total_of
