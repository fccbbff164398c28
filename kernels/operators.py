"""Attention as PyTorch operators, for eager mode, autograd, torch.compile and activation checkpointing.

`define` makes a forward and a backward operator from two functions: one pair for the kernels, one for the chunked path,
with the same arguments. `guarded` keeps an operator from dropping derivatives silently.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.autograd import forward_ad

from kernels.attention_arguments import Arguments, DecodeArguments
from kernels.mask import Mask
from kernels.tile_lists import Pattern


class Call(NamedTuple):
    """One call of `attention` as an operator takes it: without objects, so the mask comes as its operands.

    q (B, Tq, H, D), k (B, Tk, H_kv, D), v (B, Tk, H_kv, Dv), and the rest of `kernels.attention`'s arguments.

    key, indexed, bands, ints, rows   the mask: see Mask.from_operands
    softcap, dropout_p    0 for none
    seed        int64 (1,)
    """

    q: Tensor
    k: Tensor
    v: Tensor
    key: str
    indexed: bool
    bands: list[int]
    ints: list[int]
    rows: list[Tensor]
    segments_q: Tensor | None
    segments_k: Tensor | None
    scale: float
    softcap: float
    alibi_slopes: Tensor | None
    bias: Tensor | None
    sinks: Tensor | None
    dropout_p: float
    seed: Tensor | None

    def pattern(self) -> Pattern:
        return Pattern(
            self.key, self.indexed, tuple(self.bands), tuple(self.ints), tuple(self.rows), self.segments_q,
            self.segments_k,
        )  # fmt: skip


class DecodeCall(NamedTuple):
    """One call of `attention_decode` as an operator takes it: the mask as in `Call`; softcap 0 for none."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    cache_lens: Tensor
    k_new: Tensor | None
    v_new: Tensor | None
    cos: Tensor | None
    sin: Tensor | None
    block_table: Tensor | None
    key: str
    indexed: bool
    bands: list[int]
    ints: list[int]
    rows: list[Tensor]
    scale: float
    softcap: float
    alibi_slopes: Tensor | None
    sinks: Tensor | None

    def arguments(self, return_lse: bool) -> DecodeArguments:
        """Convert it back to the arguments that `decode_call_of` made it of."""
        rotary = None if self.cos is None else (self.cos, self.sin)
        mask = Mask.from_operands(*self[9:14])
        options = self.scale, self.softcap or None, self.alibi_slopes, self.sinks
        return DecodeArguments(*self[:6], rotary, mask, self.block_table, *options, return_lse)


_CALL = (
    "Tensor q, Tensor k, Tensor v, str key, bool indexed, SymInt[] bands, SymInt[] ints, Tensor[] rows, "
    "Tensor? segments_q, Tensor? segments_k, float scale, float softcap, Tensor? alibi_slopes, Tensor? bias, "
    "Tensor? sinks, float dropout_p, Tensor? seed"
)
_FORWARD = f"({_CALL}) -> (Tensor, Tensor, Tensor)"
_BACKWARD = (
    f"(Tensor dout, Tensor? dlse, Tensor out, Tensor lse, Tensor shift, bool wants_dbias, {_CALL})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def accumulated(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of sums: of lse and the gradients of bias and sinks."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def has_tangent(*tensors: Tensor | None) -> bool:
    """Say whether forward-mode differentiation tracks one of the tensors."""
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return False
    return any(
        x is not None and (is_functorch_wrapped_tensor(x) or forward_ad.unpack_dual(x).tangent is not None)
        for x in tensors
    )


def is_transformed(*tensors: Tensor | None) -> bool:
    """Say whether torch.func (grad, vjp, jvp, vmap) or forward-mode differentiation tracks one of the tensors."""
    if torch.compiler.is_compiling():
        return False
    return has_tangent(*tensors) or any(x is not None and is_functorch_wrapped_tensor(x) for x in tensors)


def guarded(operator: torch.library.CustomOpDef, message: str) -> Callable:
    """Define `<its name>_guarded`, which calls `operator` and gives the same result.

    It raises NotImplementedError(message), also in a compiled graph, for tensors that forward-mode differentiation or
    torch.func tracks: `operator` would silently drop their tangents.
    """
    schema = operator._opoverload._schema
    namespace, name = schema.name.split("::")

    @torch._disable_dynamo
    def call(*args):
        tensors = [x for arg in args for x in (arg if isinstance(arg, list) else (arg,)) if isinstance(x, Tensor)]
        if any(map(is_functorch_wrapped_tensor, tensors)) or has_tangent(*tensors):
            raise NotImplementedError(message)
        return operator(*args)

    def refuse_vmap(info, in_dims, *args):
        raise NotImplementedError(message)

    # Composite, so that it gets the caller's tensors, before autograd or torch.func unwraps them.
    library = torch.library.Library(namespace, "FRAGMENT")
    library.define(str(schema).replace(f"{namespace}::{name}(", f"{name}_guarded(", 1))
    library.impl(f"{name}_guarded", call, "CompositeImplicitAutograd")
    torch.library.register_vmap(f"{namespace}::{name}_guarded", refuse_vmap, lib=library)
    _libraries.append(library)
    return getattr(getattr(torch.ops, namespace), f"{name}_guarded")


NO_TRANSFORMS = (
    "the kernels and the chunked path of attention have no forward-mode derivatives and no torch.func transforms: "
    'impl="reference" has both'
)
_libraries: list[torch.library.Library] = []  # keeps the operators that they define alive


def define(name: str, forward: Callable, backward: Callable) -> Callable:
    """Define the operators `name`::forward and ::backward, differentiable once; return a function (*call) -> out, lse.

    forward(call) -> out (B, Tq, H, Dv), lse (B, H, Tq), shift
    backward(call, out, lse, shift, dout, dlse, wants_dbias) -> dq, dk, dv, dsinks, dbias; dlse, dsinks and dbias may be
    None.

    shift (B, H, Tq), which is not in lse, was subtracted from each row of the bias (kernels/bias.py); None without one.
    """

    def forward_op(*args):
        out, lse, shift = forward(Call(*args))
        return out, lse, out.new_empty(0) if shift is None else shift

    def backward_op(dout, dlse, out, lse, shift, wants_dbias, *args):
        call = Call(*args)
        shift = None if call.bias is None else shift
        *grads, dsinks, dbias = backward(call, out, lse, shift, dout, dlse, wants_dbias)
        # An operator must return tensors: empty ones for None.
        nothing = out.new_empty(0)
        return *grads, nothing if dsinks is None else dsinks, out.new_empty(0) if dbias is None else dbias

    def gradients(ctx, dout: Tensor | None, dlse: Tensor | None, _) -> tuple:
        out, lse, shift, *tensors = ctx.saved_tensors
        n_rows, constants = ctx.constants
        tensors, rows = tensors[: len(tensors) - n_rows], tensors[len(tensors) - n_rows :]
        call = Call(**dict(zip(_TENSORS, tensors)), **constants, rows=rows)
        if dout is None:
            dout = torch.zeros_like(out)
        wants_dbias = ctx.needs_input_grad[Call._fields.index("bias")]
        dq, dk, dv, dsinks, dbias = guarded_backward(dout, dlse, out, lse, shift, wants_dbias, *call)
        grads = {"q": dq, "k": dk, "v": dv, "rows": [None] * n_rows}
        if not call.ints:
            grads["ints"] = []  # torch takes an empty list of integers for a list of tensors
        if call.sinks is not None:
            grads["sinks"] = dsinks.to(call.sinks.dtype)
        if wants_dbias:
            grads["bias"] = dbias.to(call.bias.dtype)
        return tuple(grads.get(name) for name in Call._fields)

    forward_op = torch.library.custom_op(f"{name}::forward", forward_op, mutates_args=(), schema=_FORWARD)
    backward_op = torch.library.custom_op(f"{name}::backward", backward_op, mutates_args=(), schema=_BACKWARD)
    forward_op.register_fake(_fake_forward)
    backward_op.register_fake(_fake_backward)
    forward_op.register_autograd(gradients, setup_context=_save)
    backward_op.register_autograd(_no_second_gradient)
    guarded_backward = guarded(backward_op, NO_TRANSFORMS)
    guarded_forward = guarded(forward_op, NO_TRANSFORMS)

    def attend(*call) -> tuple[Tensor, Tensor]:
        out, lse, shift = guarded_forward(*call)
        return out, lse if Call(*call).bias is None else lse + shift

    return attend


_TENSORS = ("q", "k", "v", "segments_q", "segments_k", "alibi_slopes", "bias", "sinks", "seed")


def _save(ctx, inputs, output) -> None:
    call = Call(*inputs)._asdict()
    rows = call.pop("rows")
    tensors = [call.pop(name) for name in _TENSORS]
    ctx.save_for_backward(*output, *tensors, *rows)
    ctx.mark_non_differentiable(output[2])
    ctx.constants = len(rows), call
    # Pass None, not zeros, for the gradient of an unused output.
    ctx.set_materialize_grads(False)


def _no_second_gradient(ctx, *grads):
    raise NotImplementedError('attention has a second derivative only with impl="reference"')


def _fake_forward(*args):
    call = Call(*args)
    B, Tq, H, _ = call.q.shape
    lse = call.q.new_empty(B, H, Tq, dtype=accumulated(call.q.dtype))
    shift = call.q.new_empty(0) if call.bias is None else torch.empty_like(lse)
    return call.q.new_empty(B, Tq, H, call.v.shape[3]), lse, shift


def _fake_backward(dout, dlse, out, lse, shift, wants_dbias, *args):
    call = Call(*args)
    q, k, v = call[:3]
    real = accumulated(q.dtype)
    dsinks = q.new_empty(0) if call.sinks is None else q.new_empty(call.sinks.shape, dtype=real)
    dbias = q.new_empty(call.bias.shape, dtype=real) if wants_dbias else q.new_empty(0)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dsinks, dbias


def call_of(arguments: Arguments) -> Call:
    """Convert the arguments of `attention` to what an operator takes."""
    q, k, v, mask, segment_ids, scale, softcap, alibi_slopes, bias, sinks, dropout_p, seed, _ = arguments
    segments_q = segments_k = None
    if segment_ids is not None:
        segments_q, segments_k = segment_ids if isinstance(segment_ids, tuple) else (segment_ids, segment_ids)
    if dropout_p == 0:
        seed = None
    elif seed is None:
        seed = torch.randint(2**63 - 1, (1,), device=q.device)
    elif not isinstance(seed, Tensor):
        seed = torch.full((1,), int(seed), dtype=torch.int64, device=q.device)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    segments_q, segments_k, slopes, sinks = map(_packed, (segments_q, segments_k, alibi_slopes, sinks))
    return Call(
        q, k, v, *_operands(mask), segments_q, segments_k, scale, softcap or 0.0, slopes, bias, sinks, dropout_p, seed
    )


def decode_call_of(arguments: DecodeArguments) -> DecodeCall:
    """Convert the arguments of `attention_decode` to what an operator takes."""
    *tensors, rotary, mask, block_table, scale, softcap, alibi_slopes, sinks, _ = arguments
    cos, sin = (None, None) if rotary is None else rotary
    features = scale, softcap or 0.0, _packed(alibi_slopes), _packed(sinks)
    return DecodeCall(*tensors, cos, sin, block_table, *_operands(mask), *features)


def _operands(mask: Mask) -> tuple:
    """Return a mask's operands as lists, which operators that have a gradient require."""
    key, indexed, bands, ints, rows = mask.operands
    return key, indexed, list(bands), list(ints), [row.contiguous() for row in rows]


def _packed(small: Tensor | None) -> Tensor | None:
    """Make a small tensor contiguous, so that the kernels need no strides for it."""
    return None if small is None else small.contiguous()
