"""Rows of tokens that grow: a model with the keys and values of what each row holds so far.

A step computes what GPT.forward does (gpt/model.py is the specification), for a few tokens, with as few operations as
it can: at this size an operation costs more in being called than in its arithmetic.
"""

import functools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt.linear import PlainLinear, prepare_linear
from gpt.model import GPT, Block, CausalSelfAttention
from gpt.quantize import Int8Linear
from kernels import attention, attention_decode

CHUNK = 256  # tokens of a row that go through the model at once: it bounds the memory of a long prompt
SLACK = 64  # tokens that a row with a window can be taken back by, at least
TILES = (8, 4, 2)  # rows computed together when batch-invariant, the first that serves
FEW = 16  # new tokens of a row that attention_decode is made for
ALIGNED = 16  # a row's cache is this many tokens or a multiple, so that every row starts at a multiple of 64 bytes


def decode_impl(device: torch.device) -> str | None:
    """Which attention_decode attends for a few new tokens: the fastest on a GPU; None on a CPU, see _Group."""
    return "auto" if device.type == "cuda" else None


def _plainly(method: Callable) -> Callable:
    """No gradients, and no autocast: the decoder's weights have their dtype already."""

    @functools.wraps(method)
    def wrapped(self, *args, **kwargs):
        with torch.inference_mode():
            if not torch.is_autocast_enabled(self.device.type):
                return method(self, *args, **kwargs)
            with torch.autocast(self.device.type, enabled=False):
                return method(self, *args, **kwargs)

    return wrapped


class Decoder:
    """B rows, each with tokens of its own length, at most `capacity` of them and no more than the model's context.

    lengths: how many tokens each row holds. Rows do not see one another. Token i of a row stands at position i.
    Logits are float32. Weights are taken (on a CPU mostly copied, in a faster layout) when the decoder is made: later
    changes of the model are not seen. Dropout is never applied.

    dtype: of matrices and cache; by default autocast's where that is on, else the model's. The residual stream and the
    norms stay in the model's own dtype, as under autocast.
    quantize: "int8" for 8-bit weights (gpt/quantize.py), with bfloat16 as the default dtype.
    batch_invariant: a row's logits are the same bits whatever other rows there are, for equal calls on that row;
    for that, rows go through the matrices in tiles of one size, and through attention one by one.

    With config.window the cache holds some 2 * window + 320 tokens of a row, however long it grows. Raises ValueError
    where a row would pass the capacity or the context.
    """

    def __init__(
        self,
        model: GPT,
        rows: int,
        capacity: int,
        *,
        dtype: torch.dtype | None = None,
        quantize: str | None = None,
        batch_invariant: bool = False,
    ):
        if quantize not in (None, "int8"):
            raise ValueError(f"quantize is int8 or None, not {quantize!r}")
        config, self.device = model.config, model.embed.weight.device
        if dtype is None and torch.is_autocast_enabled(self.device.type):
            dtype = torch.get_autocast_dtype(self.device.type)
        dtype = dtype or (torch.bfloat16 if quantize else model.embed.weight.dtype)
        self.config, self.dtype, self.capacity = config, dtype, capacity
        # A window's buffer slides once in `window` tokens or more, so that sliding costs little for each.
        size = min(capacity, config.seq_len, 2 * config.window + CHUNK + SLACK if config.window else capacity)
        self._size = -(-size // ALIGNED) * ALIGNED
        self._starts, self._lengths = [0] * rows, [0] * rows  # a row's cache holds tokens start to length
        self._batch_invariant = batch_invariant
        self._prepare(model, TILES[0] if batch_invariant else rows, quantize)
        self._tile = next((n for n in TILES if self._same_in_every_place(n)), 1) if batch_invariant else 0

    @_plainly
    def _prepare(self, model: GPT, rows: int, quantize: str | None) -> None:
        def linear(layer: nn.Linear) -> PlainLinear:
            return Int8Linear(layer, self.dtype) if quantize else prepare_linear(layer, self.dtype, rows)

        config = self.config
        self._embed, self._embed_scale = model.embed.weight.detach(), model.embed_scale
        self._table, self._rotary = None, None
        if config.position == "learned":
            self._table = model.position_embed.weight.detach()
        elif config.position == "sinusoidal":
            self._table = model.position_table
        elif config.position == "rotary":
            self._rotary = tuple(table.to(self.dtype).unsqueeze(-2) for table in (model.cos, model.sin))
        self._slopes = model.blocks[0].attn.slopes  # (H,) or None
        self._mask = model.blocks[0].attn.mask
        self._blocks = [_Block(block, linear, self.dtype) for block in model.blocks]
        self._norm = model.norm if isinstance(model.norm, nn.Identity) else _norm(model.norm)
        self._head, self._softcap = linear(model.head), config.logit_softcap
        # Zeros and not empty: what is masked still meets a weight of 0, and 0 * NaN is NaN.
        shape = (config.n_layer, len(self._lengths), 2, config.kv_heads, self._size, config.head_width)
        self._cache = torch.zeros(shape, dtype=self.dtype, device=self.device)  # (n_layer, B, 2, H_kv, size, D)

    @property
    def lengths(self) -> list[int]:
        return list(self._lengths)

    @_plainly
    def prefill(self, row: int, tokens: Sequence[int]) -> Tensor:
        """Append tokens, one at least, to one row; logits (V,) after the last of them."""
        new = torch.tensor([list(tokens)], dtype=torch.int64, device=self.device)
        if new.shape[1] == 0:
            raise ValueError("prefill takes one token or more")
        for chunk in new.split(CHUNK, dim=1):
            hidden = self._hidden(chunk, _Span(self, range(row, row + 1), chunk.shape[1]))
        return self._read(hidden[-1:])[0]

    @_plainly
    def step(self, tokens: Tensor) -> Tensor:
        """Append tokens (B, T) int64, T to each row; logits (B, T, V) after each of them."""
        B, T = tokens.shape
        if B != len(self._lengths):
            raise ValueError(f"step takes tokens of {len(self._lengths)} rows, not {B}")
        if T > CHUNK:
            return torch.cat([self.step(chunk) for chunk in tokens.split(CHUNK, dim=1)], dim=1)
        if not self._batch_invariant:
            return self._logits(tokens, range(B), B)
        # Several tokens of one row are as many rows of a matrix, whatever other rows there are.
        tile = self._tile if T == 1 else 1
        return torch.cat(
            [self._logits(tokens[i : i + tile], range(i, min(i + tile, B)), tile) for i in range(0, B, tile)]
        )

    def _logits(self, tokens: Tensor, rows: range, tile: int) -> Tensor:
        """Logits of these rows' tokens (R, T), computed as `tile` rows."""
        R, T = tokens.shape
        span = _Span(self, rows, T, padding=tile - R)
        hidden = self._hidden(F.pad(tokens, (0, 0, 0, tile - R)) if R < tile else tokens, span)
        return self._read(hidden).view(tile, T, -1)[:R]

    def _read(self, hidden: Tensor) -> Tensor:
        """The head: logits (M, V), float32, of hidden (M, C)."""
        logits = self._head(hidden).float()
        return logits if self._softcap is None else torch.tanh_(logits.div_(self._softcap)).mul_(self._softcap)

    @_plainly
    def truncate(self, row: int, length: int) -> None:
        """Forget a row's tokens from `length` on. ValueError where the window has gone past it: see SLACK."""
        start, old = self._starts[row], self._lengths[row]
        if not 0 <= length <= old:
            raise ValueError(f"row {row} has {old} tokens and cannot be cut to {length}")
        if length == 0:
            self._cache[:, row, :, :, : old - start] = 0
            self._starts[row] = self._lengths[row] = 0
            return
        if start and length - start < self.config.window - 1:
            raise ValueError(f"row {row} cannot go back to {length} tokens: its window has moved past them")
        self._cache[:, row, :, :, length - start : old - start] = 0
        self._lengths[row] = length

    @_plainly
    def fork(self, source: int, rows: Sequence[int]) -> None:
        """Make these rows hold what row `source` holds."""
        used = self._lengths[source] - self._starts[source]
        for row in rows:
            if row == source:
                continue
            self._cache[:, row, :, :, :used] = self._cache[:, source, :, :, :used]
            self._cache[:, row, :, :, used : max(used, self._lengths[row] - self._starts[row])] = 0
            self._lengths[row], self._starts[row] = self._lengths[source], self._starts[source]

    @_plainly
    def keep(self, rows: Sequence[int]) -> None:
        """Leave out all rows but these; they are counted anew, in this order."""
        rows = list(rows)
        self._cache = self._cache[:, rows]
        self._lengths = [self._lengths[row] for row in rows]
        self._starts = [self._starts[row] for row in rows]

    def _hidden(self, tokens: Tensor, span: "_Span | _NoAttention") -> Tensor:
        """What the head reads, (R * T, C), for tokens (R, T)."""
        R, T = tokens.shape
        x = F.embedding(tokens, self._embed)  # (R, T, C)
        if self._embed_scale != 1.0:
            x *= self._embed_scale
        if self._table is not None:
            x += self._table[span.at]
        rotary = None if self._rotary is None else tuple(table[span.at] for table in self._rotary)
        x = x.view(R * T, -1)
        for layer, block in enumerate(self._blocks):
            x = block(x, (R, T), rotary, functools.partial(span.attend, layer))
        return self._norm(x)

    def _make_room(self, row: int, T: int) -> None:
        """Check that T more tokens fit; where a window's buffer is full, move what is still in sight to its front."""
        length, start, window = self._lengths[row], self._starts[row], self.config.window
        if length + T > min(self.capacity, self.config.seq_len):
            raise ValueError(
                f"{length + T} tokens are more than row {row} can hold: the capacity is {self.capacity}, "
                f"the model's context {self.config.seq_len}"
            )
        if length + T - start > self._size:
            kept = window - 1 + SLACK
            moved = self._cache[:, row, :, :, length - start - kept : length - start].clone()
            self._cache[:, row, :, :, :kept] = moved
            self._cache[:, row, :, :, kept : length - start] = 0
            self._starts[row] = length - kept

    @_plainly
    def _same_in_every_place(self, tile: int) -> bool:
        """Whether equal rows of a tile come out equal, wherever in the tile they stand."""
        hidden = self._hidden(
            torch.zeros(tile, 1, dtype=torch.int64, device=self.device), _NoAttention(self.config.n_head)
        )
        logits = self._head(hidden)
        return bool((logits == logits[:1]).all() and (hidden == hidden[:1]).all())


class _NoAttention:
    """Stands in for a _Span: each token sees itself alone."""

    at = slice(0, 1)

    def __init__(self, n_head: int):
        self.n_head = n_head

    def attend(self, layer: int, qkv: Tensor) -> Tensor:
        return qkv[:, :, : self.n_head].flatten(2)


class _Span:
    """Where the next T tokens of some rows go, and what they see: worked out once for all layers.

    at: their positions, for a table's rows. Rows of equal length go through attention together; rows of different
    lengths too when T is 1, the longest row's keys masked for the others; otherwise one by one. On a GPU a kernel takes
    all rows as they are. `padding` rows more are carried along that have no cache and attend to nothing.
    """

    def __init__(self, decoder: Decoder, rows: range, T: int, padding: int = 0):
        for row in rows:
            decoder._make_room(row, T)
        self.n_head, self.mask, self.slopes = decoder.config.n_head, decoder._mask, decoder._slopes
        self.padding = padding
        first, end = rows.start, rows.stop
        lengths = decoder._lengths[first:end]
        filled = [n - start for n, start in zip(lengths, decoder._starts[first:end])]
        if len(set(lengths)) == 1 and not padding:
            self.at = slice(lengths[0], lengths[0] + T)
        else:
            starts = torch.tensor(lengths + [0] * padding, device=decoder.device)
            self.at = starts[:, None] + torch.arange(T, device=decoder.device)  # (R, T)
        decoder._lengths[first:end] = [n + T for n in lengths]
        self.impl = decode_impl(decoder.device) if T <= FEW else None
        if self.impl is not None:
            self.cache = decoder._cache[:, first:end]
            self.filled = torch.tensor(filled, dtype=torch.int32, device=decoder.device)
            return
        together = not decoder._batch_invariant and (T == 1 or len(set(filled)) == 1)
        bounds = [(0, len(rows))] if together else [(i, i + 1) for i in range(len(rows))]
        self.groups = [
            _Group(slice(a, b), decoder._cache[:, first + a : first + b], filled[a:b], T, decoder.config.window)
            for a, b in bounds
        ]
        if T == 1:
            for group in self.groups:
                group.bias = group.bias_for(self.slopes, decoder.config.kv_heads, decoder.device)

    def attend(self, layer: int, qkv: Tensor) -> Tensor:
        """Attention of one layer for qkv (R, T, H + 2 H_kv, D), whose keys and values are stored; (R, T, H * D)."""
        if self.impl is None:
            outputs = [group.attend(layer, qkv, self.n_head, self.mask, self.slopes) for group in self.groups]
        else:
            outputs = [self._attend_in_one(layer, qkv[: len(self.filled)])]
        if self.padding:
            outputs.append(outputs[0].new_zeros(self.padding, *outputs[0].shape[1:]))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _attend_in_one(self, layer: int, qkv: Tensor) -> Tensor:
        """The same by attention_decode, which stores keys and values and knows rows of different lengths."""
        q, new = qkv[:, :, : self.n_head], qkv[:, :, self.n_head :]
        k_new, v_new = new.chunk(2, dim=2)  # (R, T, H_kv, D) each
        k, v = self.cache[layer].transpose(2, 3).unbind(1)  # (R, size, H_kv, D) each
        options = {"mask": self.mask, "alibi_slopes": self.slopes, "impl": self.impl}
        return attention_decode(q, k, v, self.filled, k_new=k_new, v_new=v_new, **options).flatten(2)


class _Group:
    """Rows that go through attention together: their part of the cache, and views of what it is and will be.

    cache (n_layer, R, 2, H_kv, size, D); filled: how many of its tokens are each row's.
    """

    def __init__(self, rows: slice, cache: Tensor, filled: list[int], T: int, window: int | None):
        self.rows, self.filled, self.window, self.bias = rows, filled, window, None
        self.is_even = len(set(filled)) == 1
        self.begin = 0 if window is None else max(0, min(filled) + 1 - window)  # the first key that any of them sees
        self.end = max(filled) + T
        if self.is_even:
            self.targets = cache[..., filled[0] : self.end, :].unbind(0)
        else:
            self.targets = cache.unbind(0)
            at = torch.tensor(filled, device=cache.device)
            self.where = (torch.arange(len(filled), device=cache.device), slice(None), slice(None), at)
        self.k, self.v = (part.unbind(0) for part in cache[..., self.begin : self.end, :].unbind(2))

    def bias_for(self, slopes: Tensor | None, kv_heads: int, device: torch.device) -> Tensor | None:
        """What a lone query of each row adds to its scores, (R or 1, H_kv or 1, G or 1, Tk): ALiBi and the mask."""
        if self.is_even and slopes is None:
            return None
        at = torch.tensor(self.filled[:1] if self.is_even else self.filled, device=device).view(-1, 1, 1, 1)
        distance = at - torch.arange(self.begin, self.end, device=device)  # (R or 1, 1, 1, Tk)
        bias = torch.zeros(distance.shape, device=device)
        if slopes is not None:
            bias = -slopes.view(kv_heads, -1, 1) * distance
        if self.is_even:
            return bias
        hidden = distance < 0 if self.window is None else (distance < 0) | (distance >= self.window)
        return bias.masked_fill_(hidden, float("-inf"))

    def attend(self, layer: int, qkv: Tensor, n_head: int, mask, slopes: Tensor | None) -> Tensor:
        """Store the keys and values of qkv's rows, and let the queries see all of theirs: (R, T, H * D)."""
        qkv = qkv[self.rows]
        R, T, _, D = qkv.shape
        new = qkv[:, :, n_head:].unflatten(2, (2, -1))  # (R, T, 2, H_kv, D)
        if self.is_even:
            self.targets[layer].copy_(new.permute(0, 2, 3, 1, 4))
        else:
            self.targets[layer][self.where] = new[:, 0]
        q, k, v = qkv[:, :, :n_head], self.k[layer], self.v[layer]  # (R, T, H, D), (R, H_kv, Tk, D) twice
        if T > 1:
            y = attention(q, k.transpose(1, 2), v.transpose(1, 2), mask=mask, alibi_slopes=slopes)
            return y.reshape(R, T, n_head * D)
        if self.rows.start:
            # To where a first row's queries would stand, in bytes past a multiple of 64: products round by that too.
            q = q.clone()
        # One query: the heads of a group are queries of one head, and no key is read twice.
        q = q.view(R, k.shape[1], n_head // k.shape[1], D)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias)  # (R, H_kv, G, D)
        return y.reshape(R, 1, n_head * D)


class _Block:
    """A Block of the model for x (R * T, C), its weights prepared."""

    def __init__(self, block: Block, linear: Callable[[nn.Linear], PlainLinear], dtype: torch.dtype):
        self.pre_norm, self.activation = block.pre_norm, block.mlp.activation
        self.attn_norm, self.mlp_norm = _norm(block.attn_norm), _norm(block.mlp_norm)
        self.c_qkv, self.attn_proj = linear(block.attn.c_qkv), linear(block.attn.c_proj)
        self.c_fc, self.mlp_proj = linear(block.mlp.c_fc), linear(block.mlp.c_proj)
        self.n_head, self.head_dim = block.attn.n_head, block.attn.head_dim
        self.turned = self.n_head + block.attn.n_kv_head  # heads with a norm and a rotation: queries and keys
        self.qk_weight = _qk_weight(block.attn, dtype)
        self.eps = block.attn_norm.eps

    def __call__(self, x: Tensor, shape: tuple[int, int], rotary: tuple | None, attend: Callable) -> Tensor:
        if self.pre_norm:
            x = self.attn_proj(self._attention(self.attn_norm(x), shape, rotary, attend), residual=x)
            h = self.c_fc(self.mlp_norm(x), self.activation)
            return self.mlp_proj(h, residual=x)
        x = self.attn_norm(self.attn_proj(self._attention(x, shape, rotary, attend), residual=x))
        return self.mlp_norm(self.mlp_proj(self.c_fc(x, self.activation), residual=x))

    def _attention(self, x: Tensor, shape: tuple[int, int], rotary: tuple | None, attend: Callable) -> Tensor:
        qkv = self.c_qkv(x).view(*shape, -1, self.head_dim)  # (R, T, H + 2 H_kv, D)
        qk = qkv[:, :, : self.turned]
        if self.qk_weight is not None:
            torch.mul(F.rms_norm(qk, (self.head_dim,), None, self.eps), self.qk_weight, out=qk)
        if rotary is not None:
            swapped = qk.roll(self.head_dim // 2, -1)
            qk.mul_(rotary[0]).addcmul_(swapped, rotary[1])
        return attend(qkv).view(x.shape[0], -1)


def _norm(norm: nn.Module) -> Callable[[Tensor], Tensor]:
    """The norm as a function: less is called than through a module."""
    shape, eps, weight = norm.normalized_shape, norm.eps, norm.weight.detach()
    if isinstance(norm, nn.LayerNorm):
        bias = None if norm.bias is None else norm.bias.detach()
        return lambda x: F.layer_norm(x, shape, weight, bias, eps)
    return lambda x: F.rms_norm(x, shape, weight, eps)


def _qk_weight(attn: CausalSelfAttention, dtype: torch.dtype) -> Tensor | None:
    """The weights of the queries' and keys' norms, one row a head, (H + H_kv, D), or None without such norms."""
    if attn.q_norm is None:
        return None
    weights = [attn.q_norm.weight.expand(attn.n_head, -1), attn.k_norm.weight.expand(attn.n_kv_head, -1)]
    return torch.cat(weights).detach().to(dtype)
