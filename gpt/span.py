"""Where new tokens of a decoder's rows go in its stores, and what they see: the attention of gpt/decode.py."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt.decode_cache import StoredRows
from kernels import attention, attention_decode

FEW = 16  # new tokens of a row that attention_decode is made for


def decode_impl(device: torch.device) -> str | None:
    """Which attention_decode attends for a few new tokens: the fastest on a GPU; None on a CPU, see _Group."""
    return "auto" if device.type == "cuda" else None


class Blocks(NamedTuple):
    """What attention of all blocks needs besides queries: R rows of the stores, and each block's store and number."""

    stored: list[StoredRows]
    places: list[tuple[int, int]]
    n_head: int
    slopes: Tensor | None


class NoAttention:
    """Stands in for a Span: each token sees itself alone."""

    at = slice(0, 1)

    def __init__(self, n_head: int):
        self.n_head = n_head

    def attend(self, layer: int, qkv: Tensor) -> Tensor:
        # All of it, so that whoever compares rows sees each of these numbers.
        return (qkv[:, :, : self.n_head] + qkv[:, :, self.n_head :].sum(2, keepdim=True)).flatten(2)


class KernelSpan:
    """The next T tokens of some rows, for a kernel that takes rows of any lengths.

    where (1 + stores, R + padding): the tokens that each row has, and how many of them each store holds. impl: that of
    attention_decode. at: positions (R, T) for a table's rows. `padding` rows more are carried along that nothing is
    stored of and that attend to nothing.
    """

    def __init__(self, blocks: Blocks, where: Tensor, T: int, impl: str, padding: int = 0):
        self._blocks, self._impl, self._padding = blocks, impl, padding
        self.at = where[0].unsqueeze(1) + torch.arange(T, device=where.device)
        self._rows = where.shape[1] - padding
        self._filled = where[1:, : self._rows].to(torch.int32).unbind(0)

    def attend(self, layer: int, qkv: Tensor) -> Tensor:
        """Attention of one layer for qkv (R, T, H + 2 H_kv, D), whose keys and values are stored; (R, T, H * D)."""
        stored, places, n_head, slopes = self._blocks
        store, number = places[layer]
        qkv = qkv[: self._rows]
        q, new = qkv[:, :, :n_head], qkv[:, :, n_head:]
        k_new, v_new = new.chunk(2, dim=2)  # (R, T, H_kv, D) each
        k, v = stored[store].cache[number].transpose(2, 3).unbind(1)  # (R, size, H_kv, D) each
        options = {"mask": stored[store].mask, "alibi_slopes": slopes, "impl": self._impl}
        y = attention_decode(q, k, v, self._filled[store], k_new=k_new, v_new=v_new, **options).flatten(2)
        return F.pad(y, (0, 0, 0, 0, 0, self._padding)) if self._padding else y


class Span:
    """The next T tokens of some rows, worked out once for all layers; for a CPU.

    lengths: the tokens that each row has; filled: how many of them each store holds. Rows of equal length go through
    attention together; rows of different lengths too when T is 1, the longest row's keys masked for the others;
    otherwise, or where it is asked for, one by one. at and padding as in KernelSpan.
    """

    def __init__(
        self, blocks: Blocks, lengths: list[int], filled: list[list[int]], T: int, padding: int, *, one_by_one: bool
    ):
        self._blocks, self._padding, device = blocks, padding, blocks.stored[0].cache.device
        if len(set(lengths)) == 1 and not padding:
            self.at = slice(lengths[0], lengths[0] + T)
        else:
            starts = torch.tensor(lengths + [0] * padding, device=device)
            self.at = starts[:, None] + torch.arange(T, device=device)  # (R, T)
        self._groups = [
            [_Group(part, rows, held[part], T) for part in _together(held, T, one_by_one)]
            for rows, held in zip(blocks.stored, filled)
        ]
        if T == 1:
            for group in (group for groups in self._groups for group in groups):
                group.bias = group.bias_for(blocks.slopes)

    def attend(self, layer: int, qkv: Tensor) -> Tensor:
        """As KernelSpan.attend."""
        store, number = self._blocks.places[layer]
        outputs = [group.attend(number, qkv, self._blocks.n_head, self._blocks.slopes) for group in self._groups[store]]
        if self._padding:
            outputs.append(outputs[0].new_zeros(self._padding, *outputs[0].shape[1:]))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _together(filled: list[int], T: int, one_by_one: bool) -> list[slice]:
    """Which rows go through attention together."""
    R = len(filled)
    if not one_by_one and (T == 1 or len(set(filled)) == 1):
        return [slice(0, R)]
    return [slice(i, i + 1) for i in range(R)]


class _Group:
    """Rows that go through attention together: their part of a store, and views of what it is and will be.

    filled: how many tokens the store holds of each row.
    """

    def __init__(self, rows: slice, stored: StoredRows, filled: list[int], T: int):
        cache, self.window, self.mask = stored.cache[:, rows], stored.window, stored.mask
        self.rows, self.filled, self.bias = rows, filled, None
        self.kv_heads, self.device = cache.shape[3], cache.device
        self.is_even = len(set(filled)) == 1
        # The first key that any of them sees.
        self.begin = 0 if self.window is None else max(0, min(filled) + 1 - self.window)
        self.end = max(filled) + T
        if self.is_even:
            self.targets = cache[..., filled[0] : self.end, :].unbind(0)
        else:
            self.targets = cache.unbind(0)
            at = torch.tensor(filled, device=self.device)
            self.where = (torch.arange(len(filled), device=self.device), slice(None), slice(None), at)
        self.k, self.v = (part.unbind(0) for part in cache[..., self.begin : self.end, :].unbind(2))

    def bias_for(self, slopes: Tensor | None) -> Tensor | None:
        """What a lone query of each row adds to its scores, (R or 1, H_kv or 1, G or 1, Tk): ALiBi and the mask."""
        if self.is_even and slopes is None:
            return None
        at = torch.tensor(self.filled[:1] if self.is_even else self.filled, device=self.device).view(-1, 1, 1, 1)
        distance = at - torch.arange(self.begin, self.end, device=self.device)  # (R or 1, 1, 1, Tk)
        bias = torch.zeros(distance.shape, device=self.device)
        if slopes is not None:
            bias = -slopes.view(self.kv_heads, -1, 1) * distance
        if self.is_even:
            return bias
        hidden = distance < 0 if self.window is None else (distance < 0) | (distance >= self.window)
        return bias.masked_fill_(hidden, float("-inf"))

    def attend(self, number: int, qkv: Tensor, n_head: int, slopes: Tensor | None) -> Tensor:
        """Store the keys and values of qkv's rows, and let the queries see all of theirs: (R, T, H * D)."""
        qkv = qkv[self.rows]
        R, T, _, D = qkv.shape
        new = qkv[:, :, n_head:].view(R, T, 2, -1, D)  # (R, T, 2, H_kv, D)
        if self.is_even:
            self.targets[number].copy_(new.permute(0, 2, 3, 1, 4))
        else:
            self.targets[number][self.where] = new[:, 0]
        q, k, v = qkv[:, :, :n_head], self.k[number], self.v[number]  # (R, T, H, D), (R, H_kv, Tk, D) twice
        if T > 1:
            y = attention(q, k.transpose(1, 2), v.transpose(1, 2), mask=self.mask, alibi_slopes=slopes)
            return y.reshape(R, T, n_head * D)
        if self.rows.start:
            # To where a first row's queries would stand, in bytes past a multiple of 64: products round by that too.
            q = q.clone()
        # One query: the heads of a group are queries of one head, and no key is read twice.
        q = q.view(R, k.shape[1], n_head // k.shape[1], D)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias)  # (R, H_kv, G, D)
        return y.reshape(R, 1, n_head * D)
