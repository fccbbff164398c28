"""Speculative decoding: cheap proposals for the next tokens, which the model judges in one step.

The text has exactly the distribution of the model alone, filters included, whatever proposes (Leviathan et al. 2023;
Chen et al. 2023). At temperature 0 it is the same text.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gpt.inference.sampling import ACCEPT, PROPOSE, TOKEN, SamplingConfig, distribution, draw, pick, uniforms


@dataclass(frozen=True)
class Proposals:
    """Up to K proposed tokens for each of B rows.

    tokens (B, K) int64, padded; lengths (B,): how many of each row are proposals. probs (B, K, V): the distributions
    that they were drawn from; None if they were not drawn.
    """

    tokens: Tensor
    lengths: Tensor
    probs: Tensor | None = None


def judge(target: Tensor, proposals: Proposals, seeds: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Accept or refuse drawn proposals: returns tokens (B, K + 1), and how many of each row count (B,).

    target (B, K + 1, V): the model's distributions after 0 to K proposals. seeds (B, 1) and positions (B, K + 1), on
    the CPU, are those of the returned tokens.
    """
    K = proposals.tokens.shape[1]
    own, accepting = (uniforms(seeds, positions, stream).to(target.device) for stream in (TOKEN, ACCEPT))
    p, q = (x.gather(-1, proposals.tokens.unsqueeze(-1)).squeeze(-1) for x in (target[:, :K], proposals.probs))
    accepted = _leading((accepting[:, :K] * q < p), proposals.lengths)  # (B,)
    # After a refusal, draw from what the proposal did not cover of the model's distribution; else from all of it.
    row = torch.arange(len(target), device=target.device)
    p = target[row, accepted]  # (B, V)
    q, is_refused = proposals.probs[row, accepted.clamp(max=K - 1)], accepted < proposals.lengths
    rest = (p - torch.where(is_refused.unsqueeze(1), q, 0.0)).clamp_(min=0)
    rest = torch.where(rest.sum(-1, keepdim=True) > 0, rest, p)
    tokens = torch.cat((proposals.tokens, proposals.tokens[:, :1]), dim=1)
    tokens[row, accepted] = draw(rest, own[row, accepted])
    return tokens, accepted + 1


def agreeing(tokens: Tensor, proposals: Proposals) -> Tensor:
    """Count the model's own tokens (B, K + 1) that agree with proposals that were not drawn, and the one after: (B,).

    A proposal x is accepted with probability p(x), the general rule for q(x) = 1, and the tokens are those drawn
    without speculation.
    """
    return _leading(tokens[:, :-1] == proposals.tokens, proposals.lengths) + 1


def _leading(accepted: Tensor, lengths: Tensor) -> Tensor:
    """Count the flags (B, K) that are set before the first that is not, of each row's first `lengths`."""
    inside = torch.arange(accepted.shape[1], device=accepted.device) < lengths.unsqueeze(1)
    return (accepted & inside).long().cumprod(1).sum(1)


class Ngrams:
    """Looks up what followed a text's last tokens earlier in it (prompt lookup decoding, Saxena 2023)."""

    LENGTHS = (4, 3, 2)  # the longest match counts

    def __init__(self) -> None:
        self._after: dict[tuple[int, ...], int] = {}  # the position after an n-gram's latest occurrence
        self._known = 0

    def propose(self, text: Sequence[int], count: int) -> list[int]:
        """Propose at most count tokens to follow a text, which must begin with the previous call's."""
        for end in range(max(self._known, 1), len(text)):
            for n in self.LENGTHS:
                if n <= end:
                    self._after[tuple(text[end - n : end])] = end
        self._known = len(text)
        for n in self.LENGTHS:
            at = self._after.get(tuple(text[-n:])) if n <= len(text) else None
            if at is not None:
                return list(text[at : at + count])
        return []


def propose_by_lookup(
    lookups: Sequence[Ngrams], texts: Sequence[Sequence[int]], lengths: Sequence[int], device
) -> Proposals:
    """Propose at most lengths[b] tokens for each text by lookup. K is the longest proposal's."""
    found = [lookup.propose(text, n) for lookup, text, n in zip(lookups, texts, lengths)]
    width = max(map(len, found))
    padded = [row + [0] * (width - len(row)) for row in found]
    lengths = torch.tensor([len(row) for row in found], device=device)
    return Proposals(torch.tensor(padded, device=device).view(len(found), width), lengths)


def propose_by_model(
    step: Callable[[Tensor], Tensor],
    config: SamplingConfig,
    texts: Sequence[Sequence[int]],
    lengths: Sequence[int],
    seeds: Tensor,
    bias: Tensor | None,
    seen: Tensor | None,
    device: torch.device,
) -> Proposals:
    """Propose at most lengths[b] tokens for each text, drawn one by one from a draft model, or at temperature 0 taken.

    step: appends tokens (B, T) to the draft's rows, which hold each text less its last two tokens, and returns logits
    (B, T, V). seeds (B, 1), on the CPU; bias (V,) and seen (B, 1, V) as for `distribution`. For a text of one token,
    lengths must be 0, since its row is fed a placeholder.
    """
    positions = torch.tensor([[len(text)] for text in texts])
    feed, tokens, probs = torch.tensor([[text[0], *text][-2:] for text in texts], device=device), [], []
    for t in range(max(lengths)):
        logits = step(feed)[:, -1:]  # (B, 1, V)
        if config.temperature == 0:
            feed = pick(logits, None, config, bias=bias, seen=seen)
        else:
            probs.append(distribution(logits, config, bias=bias, seen=seen))
            feed = draw(probs[-1], uniforms(seeds, positions + t, PROPOSE).to(device))
        tokens.append(feed)  # (B, 1)
        seen = None if seen is None else seen.scatter(2, feed.unsqueeze(1), True)
    lengths = torch.tensor(lengths, device=device)
    return Proposals(torch.cat(tokens, dim=1), lengths, torch.cat(probs, dim=1) if probs else None)
