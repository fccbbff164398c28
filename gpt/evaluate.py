"""What a run looks at now and then: its validation loss, and what the model writes; and a command that scores.

python -m gpt.evaluate RUN --corpus TEXT ... [--stride N]
python -m gpt.evaluate RUN --multiple-choice QUESTIONS.jsonl [--few-shot K]
"""

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from gpt.cache import cache_folder
from gpt.command_line import parse_flags
from gpt.config import Config, DataConfig, require, require_sizes
from gpt.device import autocast
from gpt.distributed import Parallel, World, whole_model
from gpt.documents import read_documents
from gpt.errors import EXIT_DONE, UserError, run_command
from gpt.files import read_lines
from gpt.foreign import find_token_files
from gpt.generate import generate
from gpt.initial import load_source
from gpt.loader import PLACES, target_bytes, targets_in
from gpt.model import GPT
from gpt.packing import packed_validation
from gpt.sampling import SamplingConfig
from gpt.scoring import Question, multiple_choice, score_texts, with_shots
from gpt.sources import find_sources
from gpt.streams import check_output
from gpt.tokenizer import Tokenizer


@torch.no_grad()
def evaluate(
    model: GPT, parallel: Parallel, world: World, tokens: Sequence[Any], tokenizer: Tokenizer, config: Config
) -> dict[str, float]:
    """Loss over the validation slice, each token but the first once, in windows of the context; over all ranks.

    Of several corpora with weights: the mean by weight, and the loss of each under val_loss_1, val_loss_2, ...
    """
    limit, weights = config.train.eval_tokens, config.data.corpus_weights
    model.eval()
    losses = [_mean_loss(parallel, world, part, tokenizer, config) for part in tokens]
    model.train()
    # Bytes of text behind a target, on average.
    sizes = [max(1, target_bytes(part, tokenizer, limit)) / targets_in(part, limit) for part in tokens]
    shares = [weight / sum(weights) for weight in weights] if len(tokens) > 1 else [1.0]
    nats, size = (sum(map(math.prod, zip(shares, values, strict=True))) for values in (losses, sizes))
    each = {f"val_loss_{i}": loss for i, loss in enumerate(losses, 1)} if len(tokens) > 1 else {}
    return {"val_loss": nats, "bits_per_byte": nats / math.log(2) / size, **each}


def _mean_loss(parallel: Parallel, world: World, tokens: Any, tokenizer: Tokenizer, config: Config) -> float:
    """Nats per target of one corpus's validation slice."""
    T = config.model.seq_len
    options = {"batch_size": max(config.train.batch_size, 8192 // T), "seq_len": T}
    options |= {"rank": world.rank, "world_size": world.size, "max_tokens": config.train.eval_tokens}
    nats, count = 0.0, 0
    for batch in packed_validation(tokens, config.data.packing, tokenizer.document_token, **options):
        x, y, *places = (part.to(world.device) for part in batch)
        with autocast(world.device, config.train.eval_dtype or config.train.dtype):
            nats += float(parallel.eval_loss(x, y, **dict(zip(PLACES, places))))
        count += int((batch[1] >= 0).sum())
    nats, count = world.sum(nats, count)
    return nats / count


def sample_text(model: GPT, parallel: Parallel, world: World, tokenizer: Tokenizer, config: Config) -> str | None:
    """What the model writes now, for rank 0 to show. It draws from a generator of its own; None if not asked for."""
    if not config.log.sample_tokens:
        return None
    whole = whole_model(model, parallel.mode, world)
    if whole is None:
        return None
    sampling = SamplingConfig(max_new_tokens=config.log.sample_tokens, rolling=True, seed=config.train.seed)
    pieces = generate(whole, tokenizer, [config.log.sample_prompt], sampling)
    text = config.log.sample_prompt + "".join(piece.text for piece in pieces)
    return "\n".join("  | " + line for line in text.split("\n"))


# The options of DataConfig that a text is read with.
TEXT_OPTIONS = ("text_field", "encoding_errors", "max_corpus_bytes", "max_download_bytes", "cache_dir")


@dataclass(frozen=True)
class Arguments:
    """Score a text, or multiple-choice questions, with a run or a Hugging Face checkpoint."""

    run: tyro.conf.Positional[str]
    """The run directory; or a Hugging Face checkpoint, a directory or a name."""
    corpus: tuple[str, ...] = ()
    """Text to score: whatever train.py takes as a corpus, token files excepted."""
    text_field: str | None = None
    """The field of JSON lines, or the column of Parquet files and datasets, that holds the text. None: text."""
    encoding_errors: Literal["strict", "replace"] | None = None
    """What to do with bytes that are not UTF-8: refuse, or replace them with U+FFFD. None: strict."""
    max_corpus_bytes: int | None = None
    """Read at most about this many bytes of text, whole documents, in the corpus's order."""
    max_download_bytes: int | None = None
    """Refuse to download a file of more bytes than this. None: 16 GiB."""
    cache_dir: Path | None = None
    """Where downloads are kept. None: a folder under the user's cache folder."""
    stride: int | None = None
    """Tokens between the windows that a text is scored in; each token has at least the context less this before it.
    None: half the context."""
    multiple_choice: Path | None = None
    """Questions to answer: JSON lines with ctx, endings and label, as HellaSwag has them."""
    few_shot: int = 0
    """Answered questions to put before each one."""
    shots: Path | None = None
    """Where those are drawn from. None: from the other questions."""
    seed: int | None = None
    """Seed of that draw. None: 1337."""
    batch_size: int = 8
    """Rows at a time."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"
    """Precision of the forward pass under autocast."""
    json: bool = False
    """Print one JSON object instead of lines for a reader."""

    def __post_init__(self) -> None:
        require_sizes(self)
        require(bool(self.corpus) != (self.multiple_choice is not None), "give either corpus or multiple_choice")
        require(self.batch_size >= 1, f"batch_size must be at least 1, not {self.batch_size}")
        require(self.few_shot >= 0, f"few_shot must be at least 0, not {self.few_shot}")
        require(self.stride is None or self.stride >= 1, f"stride must be at least 1, not {self.stride}")
        require(self.stride is None or bool(self.corpus), "stride goes with corpus")
        for name in TEXT_OPTIONS:
            require(getattr(self, name) is None or bool(self.corpus), f"{name} goes with corpus")
        require(self.seed is None or self.few_shot > 0, "seed goes with few_shot: nothing else is drawn")
        require(self.shots is None or self.few_shot > 0, "shots goes with few_shot: say how many")
        require(self.few_shot == 0 or not self.corpus, "few_shot goes with multiple_choice")


def read_questions(path: Path) -> list[Question]:
    """Questions of a file of JSON lines. Raises UserError, naming the line, for anything else."""
    questions = []
    for number, line in enumerate(read_lines(path, "file of questions"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            question = Question(row["ctx"], tuple(row["endings"]), _label(row["label"]))
            strings = isinstance(row["endings"], list) and all(
                isinstance(x, str) for x in (row["ctx"], *row["endings"])
            )
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f"{path}: line {number} is no question with ctx, endings and label ({error!r})") from None
        if not strings or len(question.endings) < 2 or not 0 <= question.label < len(question.endings):
            raise UserError(f"{path}: line {number} needs ctx, two or more endings, and a label that is one's number")
        questions.append(question)
    if not questions:
        raise UserError(f"{path} holds no question")
    return questions


def _label(value: Any) -> int:
    """A number as JSON has it, or in a string; ValueError for another, such as 1.5."""
    if type(value) not in (int, str):
        raise ValueError(f"label {value!r}")
    return int(value)


def _count(n: int, what: str) -> str:
    return f"{n:,} {what}{'s' * (n != 1)}"


def main(arguments: Arguments) -> int:
    """Score and print. Returns the exit status."""
    check_output()
    # Whatever is wrong with the text is said before a model is loaded.
    if arguments.corpus:
        given = {name: getattr(arguments, name) for name in TEXT_OPTIONS}
        data = DataConfig(arguments.corpus, **{name: value for name, value in given.items() if value is not None})
        tokens = find_token_files(replace(data, max_corpus_bytes=None))
        require(not tokens, "token files (.bin) hold no text to score: give text as the corpus")
        sources = find_sources(data, cache_folder(data.cache_dir) / "downloads")
    else:
        questions = read_questions(arguments.multiple_choice)
        shots = questions if arguments.shots is None else read_questions(arguments.shots)
        seed = 1337 if arguments.seed is None else arguments.seed
        contexts = with_shots(questions, shots, arguments.few_shot, seed)
    model, tokenizer = load_source(arguments.run, arguments.device)
    batch_size = arguments.batch_size
    with autocast(model.embed.weight.device, arguments.dtype):
        if arguments.corpus:
            texts = ("".join(document.chunks) for document in read_documents(sources, data.encoding_errors))
            result = score_texts(model, tokenizer, texts, stride=arguments.stride, batch_size=batch_size)
        else:
            result = multiple_choice(model, tokenizer, questions, contexts, batch_size)
            result |= {"few_shot": arguments.few_shot}
    if arguments.json:
        print(json.dumps(result))
    elif arguments.corpus:
        print(
            f"{_count(result['documents'], 'document')}, {result['tokens']:,} tokens, {result['bytes']:,} bytes, "
            f"windows {result['stride']} tokens apart\nloss {result['loss']:.4f} nats per token, "
            f"perplexity {result['perplexity']:.4f}, {result['bits_per_byte']:.4f} bits per byte"
        )
    else:
        cut = f"; {result['cut']} with a context too long, cut at its start" if result["cut"] else ""
        asked = f"{_count(result['questions'], 'question')} with {_count(result['few_shot'], 'shot')}{cut}"
        rules = f"{result['accuracy']:.4f}, by log-likelihood per byte {result['accuracy_normalised']:.4f}"
        print(f"{asked}\naccuracy {rules}")
    return EXIT_DONE


if __name__ == "__main__":
    run_command(lambda: main(parse_flags(Arguments, sys.argv[1:], prog="gpt.evaluate")))
