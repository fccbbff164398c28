"""From prompts to text: samples decoded together in a batch that they join and leave as they begin and end."""

from collections import deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
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

    text: what the token completes; never half a character nor a part of a stop string, so it may be empty. logprob: the
    natural log of the token's probability under the model itself, before penalty, bias, temperature and filters.
    The last piece of a sample has token None, whatever text was held back, and the finish_reason: "length", "stop" (a
    stop string or token), "end" (the document token), or "interrupted".
    """

    prompt: int
    sample: int
    token: int | None
    text: str
    logprob: float | None = None
    finish_reason: str | None = None


class Generation(Iterator[Piece]):
    """The pieces of all samples as they come.

    proposed, accepted: tokens that speculation proposed so far, and how many of them the model took.
    """

    def __init__(self, pieces: Iterator[Piece], state: "_State") -> None:
        self._pieces, self._state = pieces, state

    def __next__(self) -> Piece:
        return next(self._pieces)

    def stop(self) -> None:
        """End every sample that has begun, with finish_reason "interrupted", and begin no other."""
        self._state.stopped = True

    @property
    def proposed(self) -> int:
        return self._state.proposed

    @property
    def accepted(self) -> int:
        return self._state.accepted


@dataclass
class _State:
    """What a Generation and its generator share; a reference back would keep the generator alive."""

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
    """Continue each prompt num_samples times, yielding pieces as they come; the prompts themselves are not repeated.

    The text of sample j of prompt i is "".join(p.text for p in generate(...) if (p.prompt, p.sample) == (i, j)). An
    empty prompt starts from the tokenizer's start token. draft: a smaller model with the same tokenizer that proposes
    tokens. done: samples (i, j) to leave out. The models are put into eval mode while it runs, and put back. Raises
    UserError, at once, for a prompt with a character that the tokenizer lacks or without room in the context, a token
    that does not exist, options that contradict each other, and a model whose masks look ahead.
    """
    config = config or SamplingConfig()
    for kind, each in (("model", model), ("draft", draft or model)):
        tokenizer.check_table(each.config.vocab_size, f"this {kind}")
    # Special tokens that text does not begin with may be without rows.
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
    done = set(done)
    for i, prompt in enumerate(prompts):
        try:
            tokens = tokenizer.encode(prompt) or [tokenizer.start_token]
            count = room_for(tokens, config, model.config.seq_len)
        except UserError as error:
            raise UserError(f"prompt {i}: {error}") if len(prompts) > 1 else error from None
        for j in (j for j in range(config.num_samples) if (i, j) not in done):
            stream = TextStream(tokenizer, config.stop)
            jobs.append(_Sample(i, j, sample_seed(config.seed, i, j), tokens, count, stream))
    for each in (model, draft or model):
        check_masks(each, min(each.config.seq_len, _longest(jobs)))
    state = _State()
    return Generation(_generate(state, model, draft, jobs, config, ends, bias, vocab_size), state)


def room_for(prompt: Sequence[int], config: SamplingConfig, context: int) -> int:
    """How many tokens to generate. UserError where prompt and tokens pass the context and config.rolling is off."""
    wanted = config.max_new_tokens or (500 if config.rolling else max(1, context - len(prompt)))
    if len(prompt) + wanted > context and not config.rolling:
        raise UserError(
            f"the prompt's {len(prompt)} tokens and {wanted} new ones are more than the model's context of {context}: "
            "lower --max-new-tokens, shorten the prompt, or add --rolling"
        )
    return wanted


def _longest(jobs: Collection["_Sample"]) -> int:
    """Tokens of the longest text that will be made."""
    return max((len(job.prompt_tokens) + job.left for job in jobs), default=0)


@dataclass
class _Sample:
    """A sample on its way. text: all its tokens; the first `prompt_tokens` are the prompt's, `left` are to come."""

    prompt: int
    sample: int
    seed: int
    prompt_tokens: list[int]
    left: int
    stream: TextStream
    text: list[int] = field(init=False)
    lookup: Ngrams = field(default_factory=Ngrams)

    def __post_init__(self) -> None:
        self.text = list(self.prompt_tokens)
        self._seen, self._known = None, 0  # (V,) bool, which of the text's first tokens it knows

    def seen_of(self, vocab_size: int) -> Tensor:
        """(V,) bool: the tokens that the text holds; what it has grown by is added."""
        if self._seen is None:
            self._seen = torch.zeros(vocab_size, dtype=torch.bool)
        self._seen[self.text[self._known :]] = True
        self._known = len(self.text)
        return self._seen

    def finished(self, reason: str) -> Piece:
        return Piece(self.prompt, self.sample, None, self.stream.flush(), finish_reason=reason)


class _Reader:
    """A decoder whose rows follow samples' texts, each from an offset on where the text is longer than the context.

    behind: how many of a text's last tokens the rows do not hold yet when a step begins. The prompt that was read last
    is kept for as long as other samples of it are to come: they need not read it again.
    """

    def __init__(self, decoder: Decoder, rows: int, vocab_size: int, behind: int, device: torch.device) -> None:
        self.decoder, self.vocab_size, self.behind, self.device = decoder, vocab_size, behind, device
        self._starts = [0] * rows
        self._kept: Snapshot | None = None  # of a row that has read the prompt of the sample that begins next

    def begin(self, row: int, prompt: list[int], is_last: bool) -> None:
        """Let a row follow a new sample. is_last: the sample that begins next has another prompt."""
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
        """Make each row hold its text but the last `behind` tokens; for each, how many more than the text still fit.

        A text that, with `ahead` more tokens, has outgrown the row is read again from its newer half on.
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
        """Logits (B, T, V) after each of tokens (B, T)."""
        return self.decoder.step(tokens.to(self.device))[..., : self.vocab_size].to(tokens.device)

    def keep(self, rows: Sequence[int]) -> None:
        self.decoder.keep(rows)
        self._starts = [self._starts[row] for row in rows]


class _Drawer:
    """One step of all rows: proposals if there are any, the model's logits, and the tokens drawn."""

    def __init__(
        self, model: GPT, draft: GPT | None, jobs: Sequence[_Sample], config: SamplingConfig, bias, vocab_size
    ):
        self.config, self.bias, self.vocab_size = config, bias, vocab_size
        self.device = _sampling_device(model)
        longest = _longest(jobs)
        self.count = (config.draft_tokens or 4) if draft is not None or config.speculate is not None else 0
        # How many tokens a step has, and with that its bits, would depend on what is proposed to other rows.
        alone = config.batch_invariant and self.count > 0
        self.rows = 1 if alone else min(config.batch_size, len(jobs))
        self.reader = self._reader(model, longest, behind=1)
        self.draft = None if draft is None else self._reader(draft, longest, behind=2)

    def _reader(self, model: GPT, longest: int, behind: int) -> _Reader:
        dtype = None if self.config.dtype is None else getattr(torch, self.config.dtype)
        options = {name: getattr(self.config, name) for name in ("batch_invariant", "quantize", "cuda_graphs")}
        capacity = min(model.config.seq_len, longest)
        decoder = Decoder(model, self.rows, capacity, dtype=dtype, overrun=self.count, **options)
        return _Reader(decoder, self.rows, self.vocab_size, behind, model.embed.weight.device)

    def begin(self, row: int, jobs: deque[_Sample]) -> _Sample:
        """Let a row follow the next sample, which is taken from the jobs."""
        sample = jobs.popleft()
        is_last = not jobs or jobs[0].prompt_tokens != sample.prompt_tokens
        for reader in filter(None, (self.reader, self.draft)):
            reader.begin(row, sample.prompt_tokens, is_last)
        return sample

    def keep(self, rows: Sequence[int]) -> None:
        for reader in filter(None, (self.reader, self.draft)):
            reader.keep(rows)

    def next_tokens(self, samples: Sequence[_Sample], state: _State) -> list[list[tuple[int, float]]]:
        """The tokens that come next in each sample, at least one, with their log-probabilities."""
        texts = [sample.text for sample in samples]
        seeds = torch.tensor([[sample.seed] for sample in samples])  # (B, 1)
        seen = self._seen(samples)
        room = self.reader.follow(texts)
        # What this row has room for, not its neighbours, or they would change it: rows without room are fed as many.
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
            raise UserError("the model's logits are not finite: its weights are of no use, train it again")
        return [list(zip(row[:n], values[:n])) for row, values, n in zip(tokens.tolist(), logprobs, counts)]

    def _propose(self, samples, texts, seeds: Tensor, seen: Tensor | None, lengths: list[int]) -> Proposals | None:
        """At most lengths[b] tokens for each sample; None if there is nothing to propose."""
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
        """(B, 1, V) bool: the tokens that each text holds; None without a repetition penalty."""
        if self.config.repetition_penalty == 1:
            return None
        return torch.stack([sample.seen_of(self.vocab_size) for sample in samples]).unsqueeze(1).to(self.device)

    def _seen_along(self, seen: Tensor, proposed: Tensor) -> Tensor:
        """(B, K + 1, V): what the texts hold, with 0 to K of their proposed tokens (B, K)."""
        seen = seen.repeat(1, proposed.shape[1] + 1, 1)
        for t, tokens in enumerate(proposed.unbind(1), start=1):
            seen[:, t:].scatter_(2, tokens.view(-1, 1, 1).expand(-1, seen.shape[1] - t, 1), True)
        return seen


@torch.inference_mode()
def _generate(
    state: _State,
    model: GPT,
    draft: GPT | None,
    jobs: deque[_Sample],
    config: SamplingConfig,
    ends: dict[int, str],
    bias: Tensor | None,
    vocab_size: int,
) -> Iterator[Piece]:
    if not jobs:
        return
    drawer = _Drawer(model, draft, jobs, config, bias, vocab_size)
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
    """A sample's pieces for the tokens that a step gave it; those behind its end are dropped."""
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
    """Where tokens are drawn: on the model's device, except that mps has no float64."""
    device = model.embed.weight.device
    return torch.device("cpu") if device.type == "mps" else device
