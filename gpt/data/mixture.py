"""Mixes several corpora in given shares of the training rows, each with its own epochs and validation text.

corpora = prepare_all(config.data, config.tokenizer)
loader = make_mixture([read_tokens(corpus.train, tokenizer) for corpus in corpora], tokenizer, config, world)
"""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gpt.config import Config
from gpt.data.build_tokenizer import learns_from
from gpt.data.config import DataConfig, TokenizerConfig
from gpt.data.corpus import Corpus, check_length, prepare
from gpt.data.downloads import OnProgress
from gpt.data.loader import Loader, order_keys
from gpt.data.packing import make_loader
from gpt.data.tokenizers import Tokenizer
from gpt.distributed import World
from gpt.errors import UserError

# 2^64 / golden ratio: steps of this size cover the circle of 2^64 points most evenly (Kronecker's sequence).
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def prepare_all(
    data: DataConfig,
    tokenizer: TokenizerConfig,
    *,
    fixed_tokenizer: Tokenizer | None = None,
    progress: OnProgress | None = None,
) -> list[Corpus]:
    """Prepare a run's corpora with one tokenizer: one per entry of data.corpus if it has corpus_weights, else one.

    A learned tokenizer is learned from all entries as one text. Raises UserError.
    """
    if not data.corpus_weights:
        return [prepare(data, tokenizer, fixed_tokenizer=fixed_tokenizer, progress=progress)]
    if fixed_tokenizer is None and learns_from(tokenizer.tokenizer):
        fixed_tokenizer = prepare(replace(data, corpus_weights=()), tokenizer, progress=progress).tokenizer
    alone = [replace(data, corpus=(entry,), corpus_weights=()) for entry in data.corpus]
    return [prepare(each, tokenizer, fixed_tokenizer=fixed_tokenizer, progress=progress) for each in alone]


def check_lengths(corpora: Sequence[Corpus], data: DataConfig, seq_len: int) -> None:
    """Raise UserError unless each corpus fills a training row of seq_len tokens and has a validation target."""
    for entry, corpus in zip(data.corpus, corpora, strict=False):
        try:
            check_length(corpus, seq_len)
        except UserError as error:
            raise UserError(f"{entry}: {error}" if len(corpora) > 1 else str(error)) from None


def together(corpora: Sequence[Corpus]) -> Corpus:
    """Sum the counts and sources of several corpora; the token files are those of the first."""
    if len(corpora) == 1:
        return corpora[0]
    counts = ("train_tokens", "val_tokens", "train_bytes", "val_bytes", "documents")
    return replace(
        corpora[0],
        **{name: sum(getattr(corpus, name) for corpus in corpora) for name in counts},
        sources=tuple(source for corpus in corpora for source in corpus.sources),
        digest=hashlib.sha256("".join(corpus.digest for corpus in corpora).encode()).hexdigest(),
        parts=tuple(corpus.digest for corpus in corpora),
    )


class Mixture(Loader):
    """Rows of several loaders, each in its share of any long stretch of the stream.

    [0, 1) is divided into one interval per loader, as wide as its weight. Row i is the next row of the loader in whose
    interval the point (phase + i / golden ratio) mod 1 lies: a function of (seed, i) alone. In any n consecutive rows a
    loader's count is off by fewer than log2(n) + 3. A loader starts its own next epoch when its text is used up. The
    state holds i and every loader's state; the weights may change when a run is resumed.
    """

    def __init__(self, loaders: Sequence[Loader], weights: Sequence[float], **options: int) -> None:
        super().__init__(**options)
        self._loaders, self._index = list(loaders), 0
        ends = np.cumsum(np.asarray(weights, np.float64))
        self._ends = ends[:-1] / ends[-1]
        self._phase = order_keys(f"{self.seed}:mixture")[0]

    def chosen(self, n: int) -> np.ndarray:
        """Return the number of the loader of each of the next n rows; (n,)."""
        index = np.arange(self._index, self._index + n, dtype=np.uint64)
        return np.searchsorted(self._ends, (self._phase + index * _GOLDEN) / 2.0**64, side="right")

    def take(self, n: int) -> list[tuple[int, Any]]:
        """Return the next n rows, each with the number of its loader."""
        chosen = self.chosen(n)
        self._index += n
        counts = np.bincount(chosen, minlength=len(self._loaders)).tolist()
        rows = [iter(loader.take(count) if count else ()) for loader, count in zip(self._loaders, counts, strict=True)]
        return [(number, next(rows[number])) for number in chosen.tolist()]

    def read(self, rows: Sequence[tuple[int, Any]]) -> tuple[Tensor, ...]:
        parts, order = [], []
        for number, loader in enumerate(self._loaders):
            at = [i for i, (own, _) in enumerate(rows) if own == number]
            if at:
                parts.append(loader.read([rows[i][1] for i in at]))
                order += at
        back = torch.tensor(order).argsort()
        return tuple(torch.cat(kind)[back] for kind in zip(*parts, strict=True))

    def state_dict(self) -> dict[str, Any]:
        """Return the rows used, over all ranks, and each loader's state."""
        states = [loader.state_dict() for loader in self._loaders]
        return {"index": self._index, "rollbacks": self.rollbacks, "seed": self.seed, "corpora": states}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        states = state.get("corpora", [])
        if len(states) != len(self._loaders):
            have = len(states) or 1
            raise UserError(f"the checkpoint's data has {have} weighted corpora, this run has {len(self._loaders)}")
        self.check_order(state, {"seed": self.seed})
        self.rollbacks, self._index = state.get("rollbacks", 0), state.get("index", 0)
        for loader, own in zip(self._loaders, states, strict=True):
            loader.load_state_dict(own | {"rollbacks": self.rollbacks})


def make_mixture(tokens: Sequence[np.ndarray], tokenizer: Tokenizer, config: Config, world: World) -> Loader:
    """Make the loader of a run: of one corpus, or of several in the shares of corpus_weights."""
    options = {"batch_size": config.train.batch_size, "seq_len": config.model.seq_len}
    options |= {"seed": config.train.seed, "rank": world.rank, "world_size": world.size}
    loaders = [make_loader(part, config.data.packing, tokenizer.document_token, **options) for part in tokens]
    return loaders[0] if len(loaders) == 1 else Mixture(loaders, config.data.corpus_weights, **options)
