"""From prompts to text: a batch of samples, which join it and leave it at any step."""

from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import isnan

import torch
from torch import Tensor

from gpt.arguments import checked
from gpt.data.tokenizers import Tokenizer
from gpt.errors import UserError, require
from gpt.inference.attend import check_masks
from gpt.inference.decoder import Decoder, Snapshot
from gpt.inference.sampling import SamplingConfig, bias_vector, distribution, pick, sample_seed, token_id, uniforms
from gpt.inference.speculate import Ngrams, Proposals, agreeing, judge, propose_by_lookup, propose_by_model
from gpt.inference.text_stream import TextStream
from gpt.model import GPT


@dataclass(frozen=True)
class Piece:
    """One generated token of sample number `sample` of prompt number `prompt`.

    text: the text that the token completes. It may be empty, because part of a character or of a stop string is held
    back. logprob: the natural log of the token's probability under the model, before penalty, bias, temperature and
    filters. A sample's last piece has no token, any text held back, and a finish_reason: "length", "stop" (a stop
    string or token), "end" (the document token) or "interrupted".
    """

    prompt: int
    sample: int
    token: int | None
    text: str
    logprob: float | None = None
    finish_reason: str | None = None


class Generation(Iterator[Piece]):
    """An iterator over the pieces of all samples, as they are generated.

    proposed, accepted: how many tokens speculative decoding has proposed, and how many the model accepted.
    """

    def __init__(self, pieces: Iterator[Piece], state: "_State") -> None:
        self._pieces, self._state = pieces, state

    def __next__(self) -> Piece:
        return next(self._pieces)

    def stop(self) -> None:
        """End the samples that have begun, with finish_reason "interrupted", and begin no others."""
        self._state.stopped = True

    @property
    def proposed(self) -> int:
        return self._state.proposed

    @property
    def accepted(self) -> int:
        return self._state.accepted


@dataclass
class _State:
    """State shared by a Generation and its generator, which must not refer back: that would keep both alive."""

    stopped: bool = False
    proposed: int = 0
    accepted: int = 0


@checked
def generate(
    model: GPT,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    config: SamplingConfig | None = None,
    *,
    draft: GPT | None = None,
    done: Collection[tuple[int, int]] = (),
) -> Generation:
    """Continue each prompt num_samples times; yields pieces as they are generated, without the prompts.

    The text of sample j of prompt i is "".join(p.text for p in generate(...) if (p.prompt, p.sample) == (i, j)). An
    empty prompt starts from the tokenizer's start token. draft: a smaller model with the same tokenizer, which proposes
    tokens. done: samples (i, j) to skip. Dropout is never applied. Raises UserError at once for a prompt that the
    tokenizer cannot encode or that leaves no room in the context, an unknown token, options that contradict each other,
    and a model whose masks look ahead.
    """
    config = config or SamplingConfig()
    for kind, each in (("model", model), ("draft", draft or model)):
        tokenizer.check_table(each.config.vocab_size, f"this {kind}")
    # The models may have no rows for special tokens that never begin a text.
    vocab_size = min(tokenizer.vocab_size, model.config.vocab_size, (draft or model).config.vocab_size)
    require(draft is None or config.speculate is None, "a draft model and speculate contradict each other: give one")
    speculative = draft is not None or config.speculate is not None
    require(draft is None or draft.config.seq_len >= 2, "a draft model with a context of 1 cannot propose")
    require(speculative or config.draft_tokens is None, "draft_tokens needs a draft model or speculate")
    bias = bias_vector(tokenizer, config, _sampling_device(model), vocab_size)
    ends = {token_id(tokenizer, token, "stop_tokens"): "stop" for token in config.stop_tokens}
    if tokenizer.document_token is not None:
        ends.setdefault(tokenizer.document_token, "end")
    jobs: deque[_Sample] = deque()
    done, longest = set(done), 0
    for i, prompt in enumerate(prompts):
        try:
            tokens = tokenizer.encode(prompt) or [tokenizer.start_token]
            count = room_for(tokens, config, model.config.seq_len)
        except UserError as error:
            raise UserError(f"prompt {i}: {error}") if len(prompts) > 1 else error from None
        for j in (j for j in range(config.num_samples) if (i, j) not in done):
            stream, longest = TextStream(tokenizer, config.stop), max(longest, len(tokens) + count)
            jobs.append(_Sample(i, j, sample_seed(config.seed, i, j), tokens, count, stream, list(tokens)))
    for each in (model, draft or model):
        check_masks(each, min(each.config.seq_len, longest))
    state = _State()
    make_drawer = partial(_Drawer, model, draft, config, len(jobs), longest, bias, vocab_size)
    return Generation(_generate(state, make_drawer, jobs, ends), state)


def room_for(prompt: Sequence[int], config: SamplingConfig, context: int) -> int:
    """Return how many tokens to generate. Raises UserError if they do not fit the context, unless config.rolling."""
    wanted = config.max_new_tokens or (500 if config.rolling else max(1, context - len(prompt)))
    if len(prompt) + wanted > context and not config.rolling:
        raise UserError(
            f"the prompt's {len(prompt)} tokens and {wanted} new ones are more than the model's context of {context}: "
            "lower --max-new-tokens, shorten the prompt, or add --rolling"
        )
    return wanted


@dataclass
class _Sample:
    """A sample being generated. text: its tokens so far, the prompt's first; left: how many are to come."""

    prompt: int
    sample: int
    seed: int
    prompt_tokens: list[int]
    left: int
    stream: TextStream
    text: list[int]
    lookup: Ngrams = field(default_factory=Ngrams)
    seen: Tensor | None = None  # (V,) bool
    known: int = 0  # how many of the text's tokens `seen` includes

    def seen_of(self, vocab_size: int) -> Tensor:
        """Return which tokens the text contains, (V,) bool."""
        if self.seen is None:
            self.seen = torch.zeros(vocab_size, dtype=torch.bool)
        self.seen[self.text[self.known :]] = True
        self.known = len(self.text)
        return self.seen

    def finished(self, reason: str) -> Piece:
        return Piece(self.prompt, self.sample, None, self.stream.flush(), finish_reason=reason)


class _Reader:
    """A decoder whose rows hold the samples' texts, or the end of a text that is longer than the context.

    behind: how many of a text's last tokens its row does not hold yet when a step begins. The last prompt's keys and
    values are kept while more samples of it are to come.
    """

    def __init__(self, decoder: Decoder, vocab_size: int, behind: int) -> None:
        self.decoder, self.vocab_size, self.behind = decoder, vocab_size, behind
        self._starts = [0] * len(decoder.lengths)
        self._kept: Snapshot | None = None  # a row with the prompt of the next sample

    def begin(self, row: int, prompt: list[int], is_last: bool) -> None:
        """Assign a new sample to a row. is_last: the next sample has another prompt."""
        self._starts[row] = max(0, len(prompt) - self.decoder.capacity)
        if self._kept is not None:
            self.decoder.restore(row, self._kept)
        else:
            self.decoder.truncate(row, 0)
            new = prompt[self._starts[row] : max(0, len(prompt) - self.behind)]
            if new:
                self.decoder.prefill(row, new)
        if is_last:
            self._kept = None
        elif self._kept is None:
            self._kept = self.decoder.snapshot(row)

    def follow(self, texts: Sequence[list[int]], ahead: Sequence[int] | None = None) -> list[int]:
        """Bring each row up to its text less `behind` tokens; returns how many tokens still fit after each text.

        If a text and `ahead` more tokens outgrow a row, the row starts again from the text's newer half.
        """
        capacity, lengths, room = self.decoder.capacity, self.decoder.lengths, []
        for row, text in enumerate(texts):
            if len(text) - self._starts[row] + (ahead[row] if ahead else 0) > capacity:
                self._starts[row] = max(0, len(text) - max(capacity // 2, self.behind))
                lengths[row] = 0
                self.decoder.truncate(row, 0)
            at, end = self._starts[row] + lengths[row], max(len(text) - self.behind, self._starts[row])
            if at > end:
                self.decoder.truncate(row, end - self._starts[row])
            elif at < end:
                self.decoder.prefill(row, text[at:end])
            room.append(capacity - max(len(text) - self._starts[row], self.behind))
        return room

    def step(self, tokens: Tensor) -> Tensor:
        """Append tokens (B, T); returns logits (B, T, V) after each."""
        return self.decoder.step(tokens.to(self.decoder.device))[..., : self.vocab_size].to(tokens.device)

    def keep(self, rows: Sequence[int]) -> None:
        self.decoder.keep(rows)
        self._starts = [self._starts[row] for row in rows]


class _Drawer:
    """Draws the next tokens of all rows: proposals if any, the model's logits, and draws from them.

    samples: how many are to come; longest: tokens of the longest text.
    """

    def __init__(
        self, model: GPT, draft: GPT | None, config: SamplingConfig, samples: int, longest: int, bias, vocab_size: int
    ):
        self.config, self.bias, self.vocab_size = config, bias, vocab_size
        self.device = _sampling_device(model)
        self.count = (config.draft_tokens or 4) if draft is not None or config.speculate is not None else 0
        # Other rows' proposals decide how many tokens a step has, and so its bits.
        alone = config.batch_invariant and self.count > 0
        self.rows = 1 if alone else min(config.batch_size, samples)
        self.reader = self._reader(model, longest, behind=1)
        self.draft = None if draft is None else self._reader(draft, longest, behind=2)

    def _reader(self, model: GPT, longest: int, behind: int) -> _Reader:
        dtype = None if self.config.dtype is None else getattr(torch, self.config.dtype)
        options = {name: getattr(self.config, name) for name in ("batch_invariant", "quantize", "cuda_graphs")}
        capacity = min(model.config.seq_len, longest)
        decoder = Decoder(model, self.rows, capacity, dtype=dtype, overrun=self.count, **options)
        return _Reader(decoder, self.vocab_size, behind)

    def begin(self, row: int, jobs: deque[_Sample]) -> _Sample:
        """Take the next sample from the jobs and assign it to a row."""
        sample = jobs.popleft()
        is_last = not jobs or jobs[0].prompt_tokens != sample.prompt_tokens
        for reader in filter(None, (self.reader, self.draft)):
            reader.begin(row, sample.prompt_tokens, is_last)
        return sample

    def keep(self, rows: Sequence[int]) -> None:
        for reader in filter(None, (self.reader, self.draft)):
            reader.keep(rows)

    def next_tokens(self, samples: Sequence[_Sample], state: _State) -> list[list[tuple[int, float]]]:
        """Draw each sample's next tokens, at least one, with their log-probabilities."""
        texts = [sample.text for sample in samples]
        seeds = torch.tensor([[sample.seed] for sample in samples])  # (B, 1)
        seen = self._seen(samples)
        room = self.reader.follow(texts)
        # Limit proposals by this row's own room, so that neighbours cannot change its text; Decoder.overrun allows it.
        counts = [min(n, sample.left - 1, self.count) for n, sample in zip(room, samples)]
        proposals = self._propose(samples, texts, seeds, seen, counts)
        fed = torch.tensor([text[-1:] for text in texts], device=self.device)
        if proposals is not None:
            fed = torch.cat((fed, proposals.tokens), dim=1)
            seen = None if seen is None else self._seen_along(seen, proposals.tokens)
        logits = self.reader.step(fed)  # (B, T, V)
        positions = torch.tensor([[len(text)] for text in texts]) + torch.arange(logits.shape[1])
        if proposals is not None and proposals.probs is not None:
            target = distribution(logits, self.config, bias=self.bias, seen=seen)
            tokens, counts = judge(target, proposals, seeds, positions)
        else:
            uniform = None if self.config.temperature == 0 else uniforms(seeds, positions).to(self.device)
            tokens = pick(logits, uniform, self.config, bias=self.bias, seen=seen)
            counts = None if proposals is None else agreeing(tokens, proposals)
        counts = [1] * len(texts) if counts is None else counts.tolist()
        if proposals is not None:
            state.proposed += int(proposals.lengths.sum())
            state.accepted += sum(counts) - len(counts)
        logprobs = logits.float().log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1).tolist()
        if any(isnan(value) for row in logprobs for value in row):
            raise UserError("the model's logits are not finite: its weights are unusable, train it again")
        return [list(zip(row[:n], values[:n])) for row, values, n in zip(tokens.tolist(), logprobs, counts)]

    def _propose(self, samples, texts, seeds: Tensor, seen: Tensor | None, lengths: list[int]) -> Proposals | None:
        """Propose at most lengths[b] tokens for each sample; None if no sample gets any."""
        if self.draft is None:
            proposals = propose_by_lookup([sample.lookup for sample in samples], texts, lengths, self.device)
            return proposals if proposals.tokens.shape[1] else None
        lengths = [n if len(text) >= self.draft.behind else 0 for n, text in zip(lengths, texts)]
        room = self.draft.follow(texts, ahead=[max(0, n - 1) for n in lengths])  # the last proposal is not fed
        lengths = [min(n, fits + 1) for n, fits in zip(lengths, room)]
        if max(lengths) < 1:
            return None
        return propose_by_model(self.draft.step, self.config, texts, lengths, seeds, self.bias, seen, self.device)

    def _seen(self, samples: Sequence[_Sample]) -> Tensor | None:
        """Return which tokens each text contains, (B, 1, V) bool; None without a repetition penalty."""
        if self.config.repetition_penalty == 1:
            return None
        return torch.stack([sample.seen_of(self.vocab_size) for sample in samples]).unsqueeze(1).to(self.device)

    def _seen_along(self, seen: Tensor, proposed: Tensor) -> Tensor:
        """Return which tokens the texts contain with 0 to K of their proposals (B, K): (B, K + 1, V)."""
        seen = seen.repeat(1, proposed.shape[1] + 1, 1)
        for t, tokens in enumerate(proposed.unbind(1), start=1):
            seen[:, t:].scatter_(2, tokens.view(-1, 1, 1).expand(-1, seen.shape[1] - t, 1), True)
        return seen


@torch.inference_mode()
def _generate(
    state: _State, make_drawer: Callable[[], _Drawer], jobs: deque[_Sample], ends: dict[int, str]
) -> Iterator[Piece]:
    """Yield the pieces of all jobs."""
    if not jobs:
        return
    drawer = make_drawer()
    live = [drawer.begin(row, jobs) for row in range(drawer.rows)]
    while live and not state.stopped:
        done = []
        for row, (sample, tokens) in enumerate(zip(live, drawer.next_tokens(live, state))):
            for piece in _pieces(sample, tokens, ends):
                yield piece
                if piece.finish_reason is not None:
                    done.append(row)
        while done and jobs and not state.stopped:
            row = done.pop()
            live[row] = drawer.begin(row, jobs)
        if done:
            rows = [row for row in range(len(live)) if row not in done]
            live = [live[row] for row in rows]
            drawer.keep(rows)
    yield from (sample.finished("interrupted") for sample in live)


def _pieces(sample: _Sample, tokens: Sequence[tuple[int, float]], ends: dict[int, str]) -> Iterator[Piece]:
    """Yield a sample's pieces for a step's tokens, and drop the tokens after its end."""
    for token, logprob in tokens:
        if token in ends:
            yield sample.finished(ends[token])
            return
        sample.text.append(token)
        sample.left -= 1
        yield Piece(sample.prompt, sample.sample, token, sample.stream.push(token), logprob)
        if sample.stream.ended or sample.left == 0:
            yield sample.finished("stop" if sample.stream.ended else "length")
            return


def _sampling_device(model: GPT) -> torch.device:
    """Return the device on which tokens are drawn: the model's, except that mps has no float64."""
    device = model.embed.weight.device
    return torch.device("cpu") if device.type == "mps" else device
