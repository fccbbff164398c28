"""Decoder attention: store new keys and values, then attend under each block's mask."""

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt.errors import UserError, require
from gpt.model import GPT
from kernels import attention, attention_decode, masks
from kernels.mask import evaluate

PIECE = 1 << 22  # pairs of positions of a mask that are checked at a time
FEW = 16  # most new tokens of a row for attention_decode


def decode_impl(device: torch.device) -> str | None:
    """The impl of attention_decode for a few new tokens; None on other devices than GPUs, which use TorchAttention."""
    return "auto" if device.type == "cuda" else None


class Visibility(NamedTuple):
    """What a block's queries see: its mask and ALiBi slopes (H,).

    window: the size of a mask that is exactly a sliding window, the query included; None for others. Such a mask
    depends on distances alone, so a cache may drop old keys. Any other mask may look at any position.
    """

    mask: masks.Mask
    window: int | None
    slopes: Tensor | None

    @property
    def is_full(self) -> bool:
        """Whether a query sees every key from its window's first to its own."""
        return self.window is not None or self.mask.key == masks.CAUSAL.key


def group_blocks(model: GPT) -> tuple[list[Visibility], list[int]]:
    """Find the distinct visibilities of a model's blocks, and the number of each block's."""
    found: dict[tuple, Visibility] = {}
    keys = []
    for mask, slopes in ((block.attn.mask, block.attn.slopes) for block in model.blocks):
        window = mask.ints[0] if mask.key == masks.sliding_window(1).key else None
        keys.append((mask.key, mask.operands, None if slopes is None else tuple(slopes.tolist())))
        found.setdefault(keys[-1], Visibility(mask, window, slopes))
    numbers = {key: n for n, key in enumerate(found)}
    return list(found.values()), [numbers[key] for key in keys]


def check_masks(model: GPT, length: int) -> None:
    """Raise UserError unless every block's mask allows a cache for texts of up to `length` tokens.

    Keys and values are computed once, so no token may see a later one. Rows come and go, so a mask cannot have a value
    for each row.
    """
    for layer, block in enumerate(model.blocks):
        mask = block.attn.mask
        require(isinstance(mask, masks.Mask), f"block {layer}: attn.mask must be a kernels.masks.Mask, not {mask!r}")
        require(
            not mask.tensors,
            f"block {layer}: a mask with a value for each row of a batch, such as masks.prefix, cannot generate: "
            "use a mask of integers",
        )
        ahead = _looks_ahead(mask.key, mask.bands, mask.ints, length)
        if ahead is not None:
            q, k = ahead
            raise UserError(
                f"block {layer}: the mask lets the token at position {q} see the later one at {k}: "
                "to generate, use masks.CAUSAL & mask"
            )


@functools.lru_cache(maxsize=64)
def _looks_ahead(key: str, bands: tuple, ints: tuple[int, ...], length: int) -> tuple[int, int] | None:
    """Find the first positions q < k < length at which query q sees key k; None if no query sees a later key."""
    if all(band.least >= 0 for band in bands):
        return None
    rows = max(1, PIECE // max(1, length))
    for first in range(0, length, rows):
        q = torch.arange(first, min(first + rows, length), dtype=torch.int32).unsqueeze(1)
        k = torch.arange(first, length, dtype=torch.int32)
        found = (evaluate(key, q, k, ints, ()) & (k > q)).nonzero()
        if len(found):
            return first + int(found[0, 0]), first + int(found[0, 1])
    return None


class CachedRows(NamedTuple):
    """R rows of a decoder's caches.

    kv: (layers, R, 2, H_kv, size, D) of each cache; visibilities: of each cache's blocks; of_block: the number of each
    block's cache, and the block's layer in it.
    """

    kv: list[Tensor]
    visibilities: list[Visibility]
    of_block: list[tuple[int, int]]


class NoAttention:
    """An attention without a cache, for comparing rows: each token sees itself alone."""

    positions = slice(0, 1)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # All three enter, so that a difference in any of them shows.
        return (q + (k.sum(-2, keepdim=True) + v.sum(-2, keepdim=True))).flatten(-2)


class KernelAttention:
    """Attention of one step by attention_decode, which takes rows of any lengths: the next T tokens of R rows.

    counts (1 + caches, R + padding): each row's tokens, and how many of them each cache holds. impl: of
    attention_decode. positions ((R + padding) * T,): the tokens' rows in the position tables. The `padding` rows store
    nothing and attend to nothing.
    """

    def __init__(self, cached: CachedRows, counts: Tensor, T: int, impl: str, padding: int = 0):
        self._cached, self._impl, self._padding, self._T = cached, impl, padding, T
        self.positions = (counts[0].unsqueeze(1) + torch.arange(T, device=counts.device)).flatten()
        self._rows = counts.shape[1] - padding
        self._filled = counts[1:, : self._rows].to(torch.int32).unbind(0)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store a layer's k and v ((R + padding) * T, H_kv, D), then attend: (..., H D) for q (..., H, D)."""
        number, layer_there = self._cached.of_block[layer]
        visibility = self._cached.visibilities[number]
        q, k_new, v_new = (x.view(-1, self._T, *x.shape[1:])[: self._rows] for x in (q, k, v))
        k, v = self._cached.kv[number][layer_there].transpose(2, 3).unbind(1)  # (R, size, H_kv, D) each
        options = {"mask": visibility.mask, "alibi_slopes": visibility.slopes, "impl": self._impl}
        y = attention_decode(q, k, v, self._filled[number], k_new=k_new, v_new=v_new, **options)
        y = y.flatten(2).flatten(0, 1)
        return F.pad(y, (0, 0, 0, self._padding * self._T)) if self._padding else y


class TorchAttention:
    """Attention of one step by torch, prepared once for all layers: the next T tokens of R rows.

    lengths: each row's tokens; filled: how many of them each cache holds. Rows of equal length go through attention
    together. So do rows of different lengths if T is 1: the shorter rows' missing keys are masked. Otherwise, or with
    one_by_one, each row goes alone. positions and padding are as in KernelAttention.
    """

    def __init__(
        self, cached: CachedRows, lengths: list[int], filled: list[list[int]], T: int, padding: int, *, one_by_one: bool
    ):
        self._of_block, self._padding, self._T = cached.of_block, padding, T
        if len(set(lengths)) == 1 and not padding and (T == 1 or len(lengths) == 1):
            self.positions = slice(lengths[0], lengths[0] + T)
        else:
            starts = torch.tensor(lengths + [0] * padding, device=cached.kv[0].device)
            self.positions = (starts[:, None] + torch.arange(T, device=starts.device)).flatten()
        R, self._groups = len(lengths), []
        for kv, visibility, held in zip(cached.kv, cached.visibilities, filled):
            together = not one_by_one and (T == 1 or len(set(held)) == 1)
            parts = [slice(0, R)] if together else [slice(i, i + 1) for i in range(R)]
            self._groups.append([_Group(kv, rows, visibility, held[rows], T) for rows in parts])
        self._is_one_group = not padding and all(len(groups) == 1 for groups in self._groups)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """As KernelAttention.attend."""
        number, layer_there = self._of_block[layer]
        if self._T > 1:
            q, k, v = (x.view(-1, self._T, *x.shape[1:]) for x in (q, k, v))  # (R, T, H or H_kv, D)
        if self._is_one_group:
            return self._groups[number][0].attend(layer_there, q, k, v)
        outputs = [group.attend(layer_there, q, k, v) for group in self._groups[number]]
        if self._padding:
            outputs.append(outputs[0].new_zeros(self._padding * self._T, outputs[0].shape[1]))
        return torch.cat(outputs)


class _Group:
    """Rows that go through attention together: where their keys and values lie, and where the new ones go.

    filled: how many tokens the cache holds of each row. bias and blind: see _bias_of_lone_queries.
    """

    def __init__(self, kv: Tensor, rows: slice, visibility: Visibility, filled: list[int], T: int):
        kv = kv[:, rows]
        self.visibility, self.rows, self.filled, self.T = visibility, rows, filled, T
        self.kv_heads, self.device = kv.shape[3], kv.device
        self.is_even = len(set(filled)) == 1
        # The keys from the first that any of them sees to the last new one.
        window = visibility.window
        self.begin = 0 if window is None else max(0, min(filled) + 1 - window)
        self.end = max(filled) + T
        self.k, self.v = (part.unbind(0) for part in kv.narrow(4, self.begin, self.end - self.begin).unbind(2))
        if self.is_even:
            new = kv.select(4, filled[0]) if T == 1 else kv.narrow(4, filled[0], T).transpose(3, 4)
        else:  # T is 1
            at = torch.tensor(filled, device=self.device)
            self.where = (torch.arange(len(filled), device=self.device), slice(None), at)
            new = kv
        self.k_new, self.v_new = (part.unbind(0) for part in new.unbind(2))  # of each layer: (R, [T,] H_kv, D), or all
        self.bias, self.blind = self._bias_of_lone_queries() if T == 1 else (None, None)

    def _bias_of_lone_queries(self) -> tuple[Tensor | None, Tensor | None]:
        """Make what ALiBi and the mask add to the scores of one query a row, (R or 1, H_kv or 1, G or 1, Tk).

        Also find the rows that see no key, (R or 1, 1, 1, 1); None if each sees one.
        """
        mask, _, slopes = self.visibility
        if self.is_even and slopes is None and self.visibility.is_full:
            return None, None
        at = torch.tensor(self.filled[:1] if self.is_even else self.filled, dtype=torch.int32, device=self.device)
        at = at.view(-1, 1, 1, 1)
        keys = torch.arange(self.begin, self.end, dtype=torch.int32, device=self.device)
        bias = torch.zeros(len(at), 1, 1, len(keys), device=self.device)
        if slopes is not None:
            bias = -slopes.view(self.kv_heads, -1, 1) * (at - keys)
        if self.is_even and self.visibility.is_full:
            return bias, None
        visible = mask.visible(at, keys)  # (R or 1, 1, 1, Tk)
        blind = None if mask.shows_itself else ~visible.any(-1, keepdim=True)
        return bias.masked_fill_(~visible, float("-inf")), blind

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store these rows' k and v (R, T, H_kv, D), then attend with q (R, T, H, D): (R * T, H D).

        Without the axis T if T is 1.
        """
        if q.shape[0] != len(self.filled):
            q, k, v = q[self.rows], k[self.rows], v[self.rows]
        if self.is_even:
            self.k_new[layer].copy_(k)
            self.v_new[layer].copy_(v)
        else:
            self.k_new[layer][self.where] = k
            self.v_new[layer][self.where] = v
        k, v = self.k[layer], self.v[layer]  # (R, H_kv, Tk, D) each
        if self.T > 1:
            options = {"mask": self.visibility.mask, "alibi_slopes": self.visibility.slopes}
            y = attention(q, k.transpose(1, 2), v.transpose(1, 2), **options)
            return y.flatten(2).flatten(0, 1)
        if self.rows.start:
            # Products round by their operand's address modulo 64 bytes: a copy has that of a first row's queries.
            q = q.clone()
        # With one query a row, the heads that share keys are the queries of one head: no key is read twice.
        R, n_head, D = q.shape
        q = q.view(R, self.kv_heads, n_head // self.kv_heads, D)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias)  # (R, H_kv, G, D)
        if self.blind is not None:
            y = y.masked_fill(self.blind, 0.0)
        return y.reshape(R, n_head * D)
