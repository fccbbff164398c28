"""Log-probabilities of rows of tokens, of texts, and of the endings of questions."""

import math
import random
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch

from gpt.arguments import check_fields, checked, shown
from gpt.data.tokenizers import Tokenizer
from gpt.errors import UserError, require
from gpt.model import GPT


@dataclass(frozen=True)
class Row:
    """Up to seq_len + 1 tokens, and how many of the last ones to score; the first is never scored."""

    tokens: Sequence[int]
    scored: int


@torch.no_grad()
def score(model: GPT, rows: Iterable[Row], batch_size: int = 8) -> Iterator[tuple[np.ndarray, bool]]:
    """Yield each row's log-probabilities (scored,), float64 in nats, and whether every scored token was the likeliest.

    The model must be in eval mode. batch_size rows go through it at a time.
    """
    rows = iter(rows)
    while batch := list(islice(rows, min(batch_size, sys.maxsize))):
        yield from _score_batch(model, batch)


def _score_batch(model: GPT, batch: list[Row]) -> Iterator[tuple[np.ndarray, bool]]:
    # Rows are padded at the end, which no scored token sees.
    T = max(len(row.tokens) for row in batch) - 1
    idx = torch.zeros(len(batch), T + 1, dtype=torch.int64)
    for i, row in enumerate(batch):
        idx[i, : len(row.tokens)] = torch.as_tensor(np.asarray(row.tokens, np.int64))
    idx = idx.to(model.embed.weight.device)
    logits = model(idx[:, :-1])  # (B, T, V)
    for i, row in enumerate(batch):
        end = len(row.tokens) - 1
        some = logits[i, end - row.scored : end].float()  # (scored, V)
        targets = idx[i, end - row.scored + 1 : end + 1]
        found = some.gather(-1, targets[:, None])[:, 0] - some.logsumexp(-1)
        yield found.double().cpu().numpy(), bool((some.argmax(-1) == targets).all())


def windows(tokens: Sequence[int], context: int, stride: int) -> Iterator[Row]:
    """Yield rows that score each token but the first once, in order: windows of `context` inputs, `stride` apart.

    A scored token has at least context - stride tokens before it in its row, or all of the text's.
    """
    end = min(context, len(tokens) - 1)  # of the inputs
    if end >= 1:
        yield Row(tokens[: end + 1], end)
    while end < len(tokens) - 1:
        done, end = end, min(end + stride, len(tokens) - 1)
        yield Row(tokens[end - context : end + 1], end - done)


@checked
def score_texts(
    model: GPT, tokenizer: Tokenizer, texts: Iterable[str], *, stride: int | None = None, batch_size: int = 8
) -> dict[str, Any]:
    """Compute the loss over texts, each on its own, after a document token if the tokenizer has one.

    Without a document token a text's first token is not scored. Returns documents, tokens, bytes (of the scored text),
    loss (nats per token), perplexity, bits_per_byte and stride, by default seq_len / 2. Raises UserError if no token
    can be scored.
    """
    context = model.config.seq_len
    stride = max(1, context // 2) if stride is None else stride
    require(batch_size >= 1, f"batch_size must be at least 1, not {shown(batch_size)}")
    tokenizer.check_table(model.config.vocab_size, "this model")
    if not 1 <= stride <= context:
        raise UserError(f"stride must lie between 1 and the model's context of {context}, not {shown(stride)}")
    documents = nats = count = size = 0

    def rows() -> Iterator[Row]:
        nonlocal documents, size
        for text in texts:
            ids = tokenizer.encode_to_array(text).astype(np.int64)
            if tokenizer.document_token is not None:
                ids = np.concatenate(([tokenizer.document_token], ids))
            documents += 1
            size += int(tokenizer.token_bytes[ids[1:]].sum())
            yield from windows(ids, context, stride)

    for found, _ in score(model, rows(), batch_size):
        nats, count = nats - found.sum(), count + len(found)
    if not count:
        raise UserError("the text is too short: it has no token to score")
    loss = float(nats / count)
    return {
        "documents": documents,
        "tokens": count,
        "bytes": size,
        "loss": loss,
        "perplexity": math.exp(loss) if loss < 700 else math.inf,
        "bits_per_byte": float(nats) / math.log(2) / max(1, size),
        "stride": stride,
    }


@dataclass(frozen=True)
class Question:
    """A context, its possible endings, and the number of the right one. Raises UserError for anything else."""

    context: str
    endings: tuple[str, ...]
    label: int

    def __post_init__(self) -> None:
        check_fields(self)
        require(len(self.endings) >= 2, f"endings must be two or more, not {len(self.endings)}")
        require(0 <= self.label < len(self.endings), f"label must be the number of an ending, not {self.label}")

    @property
    def answered(self) -> str:
        return f"{self.context} {self.endings[self.label]}"


@checked
def with_shots(questions: Sequence[Question], shots: Sequence[Question], k: int, seed: int) -> list[str]:
    """Put k shots with their right endings before each question's context.

    Neither a question nor a copy of it is its own shot. The draw depends on seed and the question's number alone.
    """
    require(k >= 0, f"k must be at least 0, not {shown(k)}")
    require(abs(seed) < 1 << 63, f"seed must be a number of 64 bits, not {shown(seed)}")
    contexts, numbers_of = [], defaultdict(set)
    for i, shot in enumerate(shots):
        numbers_of[shot].add(i)
    for number, question in enumerate(questions):
        own = numbers_of.get(question, ())
        others = len(shots) - len(own)
        if others < k:
            raise UserError(f"k is {shown(k)}, but there are only {others} other shots to draw from")
        drawn = random.Random(f"{seed} {number}").sample(range(len(shots)), k + len(own))
        answered = [shots[i].answered for i in drawn if i not in own][:k]
        contexts.append("\n\n".join([*answered, question.context]))
    return contexts


def continuation(tokenizer: Tokenizer, context: str, text: str, seq_len: int) -> tuple[Row, bool]:
    """Make the row that scores text after context; also returns whether the context lost its start to fit.

    The document token, if the tokenizer has one, comes before the context. Raises UserError if the text has no token,
    or alone is longer than the model's context.
    """
    start = [] if tokenizer.document_token is None else [tokenizer.document_token]
    before, ids = start + tokenizer.encode(context), tokenizer.encode(text)
    before = before or [tokenizer.start_token]
    if not 1 <= len(ids) <= seq_len:
        raise UserError(
            f"{text[:40]!r} has {len(ids)} tokens, not 1 to {seq_len}, the model's context: it cannot be scored"
        )
    tokens = before + ids
    return Row(tokens[-(seq_len + 1) :], len(ids)), len(tokens) > seq_len + 1


@checked
def multiple_choice(
    model: GPT, tokenizer: Tokenizer, questions: Sequence[Question], contexts: Sequence[str], batch_size: int = 8
) -> dict[str, Any]:
    """Compute accuracy: how often the right ending has the highest log-likelihood, in total and per byte.

    contexts: the text before each question's endings, without the space between. Of equal endings the first counts.
    `cut` counts the questions whose context was too long and lost its start.
    """
    tokenizer.check_table(model.config.vocab_size, "this model")
    n = len(questions)
    require(len(contexts) == n, f"the number of contexts must be that of questions, {n}, not {len(contexts)}")
    require(n > 0, "questions must be one or more")
    require(batch_size >= 1, f"batch_size must be at least 1, not {shown(batch_size)}")
    rows, cut = [], 0
    for question, context in zip(questions, contexts, strict=True):
        made = [continuation(tokenizer, context, f" {ending}", model.config.seq_len) for ending in question.endings]
        rows += [row for row, _ in made]
        cut += any(shortened for _, shortened in made)
    found = iter([values.sum() for values, _ in score(model, rows, batch_size)])
    right = right_normalised = 0
    for question in questions:
        sums = np.array([next(found) for _ in question.endings])
        sizes = np.array([len(f" {ending}".encode()) for ending in question.endings])
        right += int(sums.argmax() == question.label)
        right_normalised += int((sums / sizes).argmax() == question.label)
    return {"questions": n, "accuracy": right / n, "accuracy_normalised": right_normalised / n, "cut": cut}
