"""Decoder attention: store new keys and values, then attend to what each block's mask shows."""

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt.errors import UserError, require
from gpt.model import GPT, CausalSelfAttention
from kernels import attention, attention_decode, masks
from kernels.mask import evaluate

PIECE = 1 << 22  # pairs of positions at which a mask is looked at in one go
FEW = 16  # new tokens of a row that attention_decode is made for


def decode_impl(device: torch.device) -> str | None:
    """Which attention_decode attends for a few new tokens: the fastest on a GPU; None on a CPU, see _Group."""
    return "auto" if device.type == "cuda" else None


class Sight(NamedTuple):
    """What the queries of a block see: its mask and ALiBi slopes (H,).

    window: the keys that a query sees, itself included, where the mask is a sliding window and nothing else. Such a
    mask knows distances alone, so a store may drop old keys and count the others anew. Any other mask may look at any
    position, and its store keeps all keys.
    """

    mask: masks.Mask
    window: int | None
    slopes: Tensor | None

    @property
    def shows_all(self) -> bool:
        """Whether a query sees every key from its window's first to its own."""
        return self.window is not None or self.mask.key == masks.CAUSAL.key


def sight_of(attn: CausalSelfAttention) -> Sight:
    window = attn.mask.ints[0] if attn.mask.key == masks.sliding_window(1).key else None
    return Sight(attn.mask, window, attn.slopes)


def group_by_sight(model: GPT) -> tuple[list[Sight], list[int]]:
    """What is different of what the model's blocks see, and for each block which of these it has."""
    sights: dict[tuple, Sight] = {}
    keys = []
    for block in model.blocks:
        sight = sight_of(block.attn)
        slopes = None if sight.slopes is None else tuple(sight.slopes.tolist())
        keys.append((sight.mask.key, sight.mask.operands, slopes))
        sights.setdefault(keys[-1], sight)
    places = list(sights)
    return list(sights.values()), [places.index(key) for key in keys]


def check_masks(model: GPT, length: int) -> None:
    """UserError unless keys and values of up to `length` tokens can be kept under every block's mask.

    They are computed once, so no token may see a later one; and rows of a decoder come and go, so a mask cannot have a
    value for each row.
    """
    for layer, block in enumerate(model.blocks):
        mask = block.attn.mask
        require(isinstance(mask, masks.Mask), f"block {layer}: attn.mask is a Mask of kernels.masks, not {mask!r}")
        require(
            not mask.tensors,
            f"block {layer}: a mask with a value for each row of a batch, as masks.prefix has, cannot generate: "
            "use a mask of integers",
        )
        ahead = _looks_ahead(mask.key, mask.bands, mask.ints, length)
        if ahead is not None:
            q, k = ahead
            raise UserError(
                f"block {layer}: the mask lets the token at position {q} see the one at {k}, which comes later: "
                "to generate, use masks.CAUSAL & mask"
            )


@functools.lru_cache(maxsize=64)
def _looks_ahead(key: str, bands: tuple, ints: tuple[int, ...], length: int) -> tuple[int, int] | None:
    """The first positions q < k < length at which query q sees key k; None if no query sees a later key."""
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


class Blocks(NamedTuple):
    """What attention of all blocks needs besides queries: R rows of the stores, and each block's store and number.

    stored: (layers, R, 2, H_kv, size, D) of each store; sights: what the queries of its blocks see.
    """

    stored: list[Tensor]
    sights: list[Sight]
    places: list[tuple[int, int]]


class NoAttention:
    """Stands in for a Span: each token sees itself alone."""

    at = slice(0, 1)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # All of them, so that whoever compares rows sees each of these numbers.
        return q + (k.sum(-2, keepdim=True) + v.sum(-2, keepdim=True))


class KernelSpan:
    """The next T tokens of some rows, for a kernel that takes rows of any lengths.

    where (1 + stores, R + padding): the tokens that each row has, and how many of them each store holds. impl: that of
    attention_decode. at: positions (R * T,) for a table's rows. `padding` rows more are carried along that nothing is
    stored of and that attend to nothing.
    """

    def __init__(self, blocks: Blocks, where: Tensor, T: int, impl: str, padding: int = 0):
        self._blocks, self._impl, self._padding = blocks, impl, padding
        self.at = (where[0].unsqueeze(1) + torch.arange(T, device=where.device)).flatten()
        self._rows, self._T = where.shape[1] - padding, T
        self._filled = where[1:, : self._rows].to(torch.int32).unbind(0)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of one layer for q (R * T, H, D); k and v (R * T, H_kv, D) are stored. Returns (R * T, H, D)."""
        stored, sights, places = self._blocks
        store, number = places[layer]
        sight, filled = sights[store], self._filled[store]
        q, k_new, v_new = (x.view(-1, self._T, *x.shape[1:])[: self._rows] for x in (q, k, v))
        k, v = stored[store][number].transpose(2, 3).unbind(1)  # (R, size, H_kv, D) each
        options = {"mask": sight.mask, "alibi_slopes": sight.slopes, "impl": self._impl}
        y = attention_decode(q, k, v, filled, k_new=k_new, v_new=v_new, **options).flatten(0, 1)
        return F.pad(y, (0, 0, 0, 0, 0, self._padding * self._T)) if self._padding else y


class Span:
    """The next T tokens of some rows, worked out once for all layers; for a CPU.

    lengths: the tokens that each row has; filled: how many of them each store holds. Rows of equal length go through
    attention together; rows of different lengths too when T is 1, the longest row's keys masked for the others;
    otherwise, or where it is asked for, one by one. at and padding as in KernelSpan.
    """

    def __init__(
        self, blocks: Blocks, lengths: list[int], filled: list[list[int]], T: int, padding: int, *, one_by_one: bool
    ):
        self._blocks, self._padding, self._T, device = blocks, padding, T, blocks.stored[0].device
        if len(set(lengths)) == 1 and not padding and (T == 1 or len(lengths) == 1):
            self.at = slice(lengths[0], lengths[0] + T)
        else:
            starts = torch.tensor(lengths + [0] * padding, device=device)
            self.at = (starts[:, None] + torch.arange(T, device=device)).flatten()  # (R * T,)
        self._groups = [
            [_Group(part, rows, sight, held[part], T) for part in _together(held, T, one_by_one)]
            for rows, sight, held in zip(blocks.stored, blocks.sights, filled)
        ]
        self._alone = not padding and all(len(groups) == 1 for groups in self._groups)
        if T == 1:
            for group in (group for groups in self._groups for group in groups):
                group.bias, group.blind = group.bias_of_lone_queries()

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """As KernelSpan.attend."""
        store, number = self._blocks.places[layer]
        if self._T > 1:
            q, k, v = (x.view(-1, self._T, *x.shape[1:]) for x in (q, k, v))  # (R, T, H or H_kv, D)
        if self._alone:
            return self._groups[store][0].attend(number, q, k, v)
        outputs = [group.attend(number, q, k, v) for group in self._groups[store]]
        if self._padding:
            outputs.append(outputs[0].new_zeros(self._padding * self._T, *outputs[0].shape[1:]))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _together(filled: list[int], T: int, one_by_one: bool) -> list[slice]:
    """Which rows go through attention together."""
    R = len(filled)
    if not one_by_one and (T == 1 or len(set(filled)) == 1):
        return [slice(0, R)]
    return [slice(i, i + 1) for i in range(R)]


class _Group:
    """Rows that go through attention together: their part of a store, and views of what it is and will be.

    filled: how many tokens the store holds of each row. bias and blind: see bias_of_lone_queries.
    """

    def __init__(self, rows: slice, stored: Tensor, sight: Sight, filled: list[int], T: int):
        cache, self.sight = stored[:, rows], sight
        self.rows, self.filled, self.bias, self.blind = rows, filled, None, None
        self.kv_heads, self.device = cache.shape[3], cache.device
        self.is_even = len(set(filled)) == 1
        # The first key that any of them sees.
        window = self.sight.window
        self.begin = 0 if window is None else max(0, min(filled) + 1 - window)
        self.end = max(filled) + T
        self.T = T
        new = cache[..., filled[0] : self.end, :] if self.is_even else cache
        if self.is_even and T == 1:
            new = new.squeeze(-2)
        self.k_new, self.v_new = (part.unbind(0) for part in new.unbind(2))  # (R, H_kv, T or size, D) of each layer
        if not self.is_even:
            at = torch.tensor(filled, device=self.device)
            self.where = (torch.arange(len(filled), device=self.device), slice(None), at)
        self.k, self.v = (part.unbind(0) for part in cache[..., self.begin : self.end, :].unbind(2))

    def bias_of_lone_queries(self) -> tuple[Tensor | None, Tensor | None]:
        """What a lone query of each row adds to its scores, (R or 1, H_kv or 1, G or 1, Tk): ALiBi and the mask.

        Also which rows see no key, (R or 1, 1, 1, 1); None where each sees one.
        """
        mask, _, slopes = self.sight
        if self.is_even and slopes is None and self.sight.shows_all:
            return None, None
        at = torch.tensor(self.filled[:1] if self.is_even else self.filled, dtype=torch.int32, device=self.device)
        at = at.view(-1, 1, 1, 1)
        keys = torch.arange(self.begin, self.end, dtype=torch.int32, device=self.device)
        bias = torch.zeros(len(at), 1, 1, len(keys), device=self.device)
        if slopes is not None:
            bias = -slopes.view(self.kv_heads, -1, 1) * (at - keys)
        if self.is_even and self.sight.shows_all:
            return bias, None
        seen = mask.visible(at, keys)  # (R or 1, 1, 1, Tk)
        blind = None if mask.shows_itself else ~seen.any(-1, keepdim=True)
        return bias.masked_fill_(~seen, float("-inf")), blind

    def attend(self, number: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store these rows' k and v (R, T, H_kv, D), and let q (R, T, H, D) see all of theirs: (R * T, H, D).

        Where T is 1 none of them has that axis.
        """
        if q.shape[0] != len(self.filled):
            q, k, v = q[self.rows], k[self.rows], v[self.rows]
        if not self.is_even:
            self.k_new[number][self.where] = k
            self.v_new[number][self.where] = v
        elif self.T == 1:
            self.k_new[number].copy_(k)
            self.v_new[number].copy_(v)
        else:
            self.k_new[number].copy_(k.transpose(1, 2))
            self.v_new[number].copy_(v.transpose(1, 2))
        k, v = self.k[number], self.v[number]  # (R, H_kv, Tk, D) twice
        if self.T > 1:
            options = {"mask": self.sight.mask, "alibi_slopes": self.sight.slopes}
            return attention(q, k.transpose(1, 2), v.transpose(1, 2), **options).flatten(0, 1)
        if self.rows.start:
            # To where a first row's queries would be, in bytes past a multiple of 64: products round by that too.
            q = q.clone()
        # One query: the heads of a group are queries of one head, and no key is read twice.
        R, n_head, D = q.shape
        q = q.view(R, self.kv_heads, n_head // self.kv_heads, D)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias)  # (R, H_kv, G, D)
        if self.blind is not None:
            y = y.masked_fill(self.blind, 0.0)
        return y.reshape(R, n_head, D)
