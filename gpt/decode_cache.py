"""What a Decoder's rows hold while they grow, and what their next tokens see: its cache and its attention."""

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import attention, attention_decode

if TYPE_CHECKING:
    from gpt.decode import Decoder

CHUNK = 256  # tokens of a row that go through the model at once: it bounds the memory of a long prompt
SLACK = 64  # tokens that a row with a window can be taken back by, at least
FEW = 16  # new tokens of a row that attention_decode is made for
ALIGNED = 16  # a row's cache is this many tokens or a multiple, so that every row starts at a multiple of 64 bytes


def decode_impl(device: torch.device) -> str | None:
    """Which attention_decode attends for a few new tokens: the fastest on a GPU; None on a CPU, see _Group."""
    return "auto" if device.type == "cuda" else None


class Store:
    """Keys and values of the blocks that have one window, or see all.

    cache (layers, B, 2, H_kv, size, D); of a row it holds tokens start to length. Where there is a window it is shorter
    than the text may be, and slides.
    """

    def __init__(self, decoder: "Decoder", window: int | None, mask: Any, layers: int):
        config, rows = decoder.config, len(decoder.lengths)
        self.window, self.mask, self.starts = window, mask, [0] * rows
        # A window's buffer slides once in `window` tokens or more, so that sliding costs little for each.
        size = min(decoder.capacity, config.seq_len, 2 * window + CHUNK + SLACK if window else decoder.capacity)
        self.size = -(-size // ALIGNED) * ALIGNED
        # Zeros and not empty: what is masked still meets a weight of 0, and 0 * NaN is NaN.
        shape = (layers, rows, 2, config.kv_heads, self.size, config.head_width)
        self.cache = torch.zeros(shape, dtype=decoder.dtype, device=decoder.device)

    def check_reaches(self, row: int, length: int) -> None:
        """ValueError unless a row can be cut to so many tokens."""
        start = self.starts[row]
        if length and start and length - start < self.window - 1:
            raise ValueError(f"row {row} cannot go back to {length} tokens: its window has moved past them")

    def truncate(self, row: int, length: int, old: int) -> None:
        """Forget a row's tokens from `length` on, of `old`."""
        start = self.starts[row]
        self.cache[:, row, :, :, max(0, length - start) : old - start] = 0
        if length == 0:
            self.starts[row] = 0

    def copy(self, source: int, row: int, lengths: list[int]) -> None:
        """Make a row hold what row `source` holds."""
        used, before = lengths[source] - self.starts[source], lengths[row] - self.starts[row]
        self.cache[:, row, :, :, :used] = self.cache[:, source, :, :, :used]
        self.cache[:, row, :, :, used : max(used, before)] = 0
        self.starts[row] = self.starts[source]

    def keep(self, rows: list[int]) -> None:
        """Leave out all rows but these."""
        self.cache, self.starts = self.cache[:, rows], [self.starts[row] for row in rows]

    def make_room(self, row: int, length: int, T: int) -> None:
        """Where T tokens more do not fit into a window's buffer, move what is still in sight to its front."""
        start = self.starts[row]
        if length + T - start > self.size:
            kept = self.window - 1 + SLACK
            moved = self.cache[:, row, :, :, length - start - kept : length - start].clone()
            self.cache[:, row, :, :, :kept] = moved
            self.cache[:, row, :, :, kept : length - start] = 0
            self.starts[row] = length - kept


class Span:
    """Where the next T tokens of some rows go, and what they see: worked out once for all layers.

    at: their positions, for a table's rows. Rows of equal length go through attention together; rows of different
    lengths too when T is 1, the longest row's keys masked for the others; otherwise one by one. On a GPU a kernel takes
    all rows as they are. `padding` rows more are carried along that have no cache and attend to nothing.
    """

    def __init__(self, decoder: "Decoder", rows: range, T: int, padding: int = 0):
        for row in rows:
            decoder.make_room(row, T)
        self.padding, self.place = padding, decoder.places
        lengths = decoder._lengths[rows.start : rows.stop]
        if len(set(lengths)) == 1 and not padding:
            self.at = slice(lengths[0], lengths[0] + T)
        else:
            starts = torch.tensor(lengths + [0] * padding, device=decoder.device)
            self.at = starts[:, None] + torch.arange(T, device=decoder.device)  # (R, T)
        self.parts = [_Part(decoder, store, rows, T) for store in decoder.stores]
        decoder._lengths[rows.start : rows.stop] = [n + T for n in lengths]

    def attend(self, layer: int, qkv: Tensor) -> Tensor:
        """Attention of one layer for qkv (R, T, H + 2 H_kv, D), whose keys and values are stored; (R, T, H * D)."""
        store, number = self.place[layer]
        outputs = self.parts[store].attend(number, qkv)
        if self.padding:
            outputs.append(outputs[0].new_zeros(self.padding, *outputs[0].shape[1:]))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


class _Part:
    """A _Span's rows in one Store."""

    def __init__(self, decoder: "Decoder", store: Store, rows: range, T: int):
        self.n_head, self.mask, self.slopes = decoder.config.n_head, store.mask, decoder.slopes
        first, end = rows.start, rows.stop
        filled = [n - start for n, start in zip(decoder._lengths[first:end], store.starts[first:end])]
        self.impl = decode_impl(decoder.device) if T <= FEW else None
        if self.impl is not None:
            self.cache = store.cache[:, first:end]
            self.filled = torch.tensor(filled, dtype=torch.int32, device=decoder.device)
            return
        together = not decoder.batch_invariant and (T == 1 or len(set(filled)) == 1)
        bounds = [(0, len(rows))] if together else [(i, i + 1) for i in range(len(rows))]
        self.groups = [
            _Group(slice(a, b), store.cache[:, first + a : first + b], filled[a:b], T, store.window) for a, b in bounds
        ]
        if T == 1:
            for group in self.groups:
                group.bias = group.bias_for(self.slopes, decoder.config.kv_heads, decoder.device)

    def attend(self, layer: int, qkv: Tensor) -> list[Tensor]:
        """Span.attend for the store's layer of this number, in parts that are to be put together."""
        if self.impl is None:
            return [group.attend(layer, qkv, self.n_head, self.mask, self.slopes) for group in self.groups]
        return [self._attend_in_one(layer, qkv[: len(self.filled)])]

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
