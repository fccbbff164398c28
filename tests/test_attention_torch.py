"""The operators under opcheck, torch.compile, autocast, activation checkpointing and double backward."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from kernels import attention, masks
from kernels.attention_arguments import Arguments
from kernels.operators import call_of

WINDOW_AND_SINKS = masks.CAUSAL & (masks.sliding_window(5) | masks.sink_tokens(2))


def qkv(device, T=20, H=2, H_kv=1, D=16, **options):
    return [torch.randn(1, T, heads, D, device=device, requires_grad=True, **options) for heads in (H, H_kv, H_kv)]


@pytest.mark.parametrize("name", ["triton_attention", "chunked_attention"])
@pytest.mark.parametrize("features", [False, True], ids=["plain", "features"])
def test_opcheck(features, name, device):
    arguments = {"mask": WINDOW_AND_SINKS}
    if features:
        lengths = torch.tensor([3], dtype=torch.int32, device=device)
        arguments |= {
            "mask": masks.CAUSAL & masks.strided(2) | masks.prefix(lengths) | masks.Mask(in_prefix, lengths),
            "segment_ids": torch.zeros(1, 20, dtype=torch.int32, device=device),
            "softcap": 3.0,
            "alibi_slopes": torch.rand(2, device=device),
            "bias": torch.randn(2, 20, 1, device=device, requires_grad=True),
            "sinks": torch.randn(2, device=device, requires_grad=True),
            "dropout_p": 0.2,
            "seed": 5,
        }
    args = tuple(call_of(Arguments(*qkv(device), **arguments)))
    operators = getattr(torch.ops, name)
    torch.library.opcheck(operators.forward.default, args)
    out, lse, shift = operators.forward(*args)
    detached = [x.detach() if isinstance(x, torch.Tensor) else x for x in args]
    results = [x.detach() for x in (out, lse, shift)]
    backward_args = (torch.randn_like(out), torch.randn_like(lse), *results, features, *detached)
    torch.library.opcheck(operators.backward.default, backward_args)


def in_prefix(q, k, length):
    return k < length


@pytest.mark.parametrize("impl", ["triton", "auto", "chunked", "reference"])
def test_compile_fullgraph(impl, device):
    """One graph, also for changing lengths, with the same numbers as eager mode."""
    torch._dynamo.reset()

    def loss(q, k, v, sinks):
        out, lse = attention(q, k, v, mask=WINDOW_AND_SINKS, sinks=sinks, return_lse=True, impl=impl)
        return out.square().sum() + lse.sum() + attention(q, k, v, impl=impl).sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for T in (20, 33):
        inputs = [*qkv(device, T), torch.randn(2, device=device, requires_grad=True)]
        ours = compiled(*inputs)
        expected = loss(*inputs)
        torch.testing.assert_close(ours, expected)
        for a, b in zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(expected, inputs)):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("impl", ["triton", "auto", "reference"])
def test_autocast_casts_q_k_v_only(impl, device):
    q, k, v = qkv(device)
    bias = torch.randn(20, 20, device=device)
    sinks = torch.randn(2, device=device)
    with torch.autocast(device, torch.bfloat16):
        out = attention(q, k, v, bias=bias, sinks=sinks, impl=impl)
    assert out.dtype == torch.bfloat16
    half = [x.to(torch.bfloat16) for x in (q, k, v)]
    assert torch.equal(out, attention(*half, bias=bias, sinks=sinks, impl=impl))
    out.float().sum().backward()
    assert q.grad.dtype == torch.float32


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_activation_checkpointing(dropout_p, device):
    """The second forward pass draws the same dropout seed as the first."""
    grads = []
    inputs = qkv(device)
    for wrap in (lambda f, *x: f(*x), lambda f, *x: checkpoint(f, *x, use_reentrant=False)):
        torch.manual_seed(3)
        out = wrap(lambda q, k, v: attention(q, k, v, dropout_p=dropout_p, impl="triton"), *inputs)
        grads.append(torch.autograd.grad(out.square().sum(), inputs))
    assert all(torch.equal(a, b) for a, b in zip(*grads))


def test_only_tensors_that_require_a_gradient_get_one(device):
    q, k, v = qkv(device)
    v.requires_grad_(False)
    attention(q, k, v, impl="triton").sum().backward()
    assert q.grad is not None and k.grad is not None and v.grad is None
    with torch.no_grad():
        assert not attention(q, k, v, impl="triton").requires_grad


def test_double_backward_names_the_alternative(device):
    q, k, v = qkv(device)
    (grad,) = torch.autograd.grad(attention(q, k, v, impl="triton").square().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match='impl="reference"'):
        grad.sum().backward()
    (grad,) = torch.autograd.grad(attention(q, k, v, impl="reference").square().sum(), q, create_graph=True)
    grad.sum().backward()
    assert torch.isfinite(q.grad).all()
