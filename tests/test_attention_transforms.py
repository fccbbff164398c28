"""Forward-mode derivatives and torch.func: correct in plain PyTorch, refused by operators, which would drop them."""

import contextlib

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap

from kernels import attention, attention_decode, attention_reference

FOLLOWED = ("q", "k", "v", "bias", "sinks", "alibi_slopes")
KERNELS = ("triton", "chunked")


def inputs_of(device: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    shapes = {
        "q": (1, 5, 2, 8),
        "k": (1, 5, 1, 8),
        "v": (1, 5, 1, 8),
        "bias": (5, 5),
        "sinks": (2,),
        "alibi_slopes": (2,),
    }
    return {name: torch.rand(shape, generator=generator).to(device) for name, shape in shapes.items()}


def function_of(name: str, device: str, impl: str, fn=attention):
    """Return attention as a function of one of its arguments, and that argument."""
    inputs = inputs_of(device)
    options = {} if fn is attention_reference else {"impl": impl}

    def call(x):
        return fn(**(inputs | {name: x}), **options).square().sum()

    return call, inputs[name]


def in_forward_mode(call, x: torch.Tensor, tangent: torch.Tensor) -> torch.Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(call(forward_ad.make_dual(x, tangent))).tangent


@pytest.mark.parametrize("name", FOLLOWED)
@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_tangents_agree_with_gradients(name, impl, device):
    call, x = function_of(name, device, impl)
    tangent = torch.randn(x.shape, device=device)
    expected = (grad(function_of(name, device, impl, attention_reference)[0])(x) * tangent).sum()
    found = [jvp(call, (x,), (tangent,))[1], in_forward_mode(call, x, tangent), linearize(call, x)[1](tangent)]
    found.append((jacfwd(call)(x) * tangent).sum())
    for value in found:
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", FOLLOWED)
@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("wants_grad", [False, True], ids=["plain", "requires grad"])
def test_kernels_refuse_tangents(name, impl, wants_grad, device):
    call, x = function_of(name, device, impl)
    x = x.requires_grad_(wants_grad and name != "alibi_slopes")
    for transformed in (lambda: jvp(call, (x,), (x,)), lambda: in_forward_mode(call, x, x.detach())):
        with pytest.raises(NotImplementedError, match='impl="reference" has both'):
            transformed()


@pytest.mark.parametrize("impl", KERNELS)
def test_kernels_refuse_tangents_of_upstream_gradients(impl, device):
    call, x = function_of("q", device, impl)
    x.requires_grad_()
    out = call(x)
    one = torch.ones((), device=device)
    with pytest.raises(NotImplementedError, match='impl="reference" has both'):
        in_forward_mode(lambda flows: torch.autograd.grad(out, x, flows)[0], one, one)


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("name", ["q", "v", "bias"])
def test_torch_func_is_right(name, impl, device):
    """grad, vjp, jacrev, hessian and vmap, alone and nested."""
    call, x = function_of(name, device, impl)
    reference, _ = function_of(name, device, impl, attention_reference)
    expected = grad(reference)(x)
    batch = torch.stack([x, 2 * x])
    pairs = [
        (grad(call)(x), expected),
        (vjp(call, x)[1](torch.ones((), device=device))[0], expected),
        (jacrev(call)(x), expected),
        (hessian(call)(x), hessian(reference)(x)),
        (vmap(call)(batch), torch.stack([reference(row) for row in batch])),
        (vmap(grad(call))(batch), torch.stack([grad(reference)(row) for row in batch])),
    ]
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize(
    "transform", [grad, jacrev, hessian, jacfwd, vmap], ids=["grad", "jacrev", "hessian", "jacfwd", "vmap"]
)
def test_kernels_refuse_torch_func(impl, transform, device):
    call, x = function_of("q", device, impl)
    with pytest.raises(NotImplementedError, match='impl="reference" has both'):
        transform(call)(x[None] if transform is vmap else x)


@pytest.mark.parametrize("impl", [*KERNELS, "auto"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_code_drops_no_tangent(impl, backend, device):
    """The function inside jvp inside torch.compile, and a compiled function on dual numbers."""
    torch._dynamo.reset()
    call, x = function_of("k", device, impl)
    tangent = torch.randn(x.shape, device=device)
    compiled = torch.compile(call, backend=backend)
    whole = torch.compile(lambda x: jvp(call, (x,), (tangent,))[1], backend=backend)
    for transformed in (lambda: whole(x), lambda: in_forward_mode(compiled, x, tangent)):
        if impl == "auto":
            # If the graph breaks, attention sees the tangents and uses the reference; otherwise torch may refuse.
            with contextlib.suppress(NotImplementedError):
                torch.testing.assert_close(transformed(), (grad(call)(x) * tangent).sum(), rtol=1e-4, atol=1e-5)
        else:
            with pytest.raises(NotImplementedError):
                transformed()
    if impl != "auto":
        with pytest.raises(RuntimeError, match="NotImplementedError"):
            torch.compile(lambda x: jvp(call, (x,), (tangent,))[1], backend=backend, fullgraph=True)(x)


def decode(device: str, **changes):
    caches = {name: torch.zeros(1, 16, 1, 8, device=device) for name in ("k_cache", "v_cache")}
    new = {name: torch.ones(1, 1, 1, 8, device=device) for name in ("k_new", "v_new")}
    lens = torch.tensor([3], dtype=torch.int32, device=device)
    return attention_decode(
        **({"q": torch.ones(1, 1, 2, 8, device=device), "cache_lens": lens} | caches | new | changes)
    )


@pytest.mark.parametrize("impl", ["triton", "torch", "reference", "auto"])
@pytest.mark.parametrize("name", ["q", "k_cache", "v_cache", "k_new", "v_new", "alibi_slopes", "sinks"])
def test_decoding_refuses_tensors_that_require_a_derivative(name, impl, device):
    """A gradient or tangent is never dropped silently; under no_grad, parameters are allowed."""
    shape = {"q": (1, 1, 2, 8), "k_cache": (1, 16, 1, 8), "v_cache": (1, 16, 1, 8)}.get(name, (1, 1, 1, 8))
    x = torch.ones((2,) if name in ("alibi_slopes", "sinks") else shape, device=device)

    def call(x):
        return decode(device, impl=impl, **{name: x})

    for transformed in (
        lambda: call(x.clone().requires_grad_()),
        lambda: in_forward_mode(call, x, x),
        lambda: jvp(call, (x,), (x,)),
        lambda: grad(lambda x: call(x).sum())(x),
        lambda: vmap(call)(x[None]),
    ):
        with pytest.raises(NotImplementedError, match="for inference and has no derivatives"):
            transformed()
    with torch.no_grad():
        assert call(x.clone().requires_grad_()).isfinite().all()


def test_compiled_decoding_drops_no_tangent(device):
    torch._dynamo.reset()
    compiled = torch.compile(lambda q: decode(device, q=q), backend="eager")
    q = torch.ones(1, 1, 2, 8, device=device)
    with pytest.raises(NotImplementedError, match="has no derivatives"):
        in_forward_mode(compiled, q, q)
