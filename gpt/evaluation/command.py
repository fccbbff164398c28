"""The command that scores text and questions with a model.

python -m gpt.evaluate RUN --corpus TEXT ... [--stride N]
python -m gpt.evaluate RUN --multiple-choice QUESTIONS.jsonl [--few-shot K]
"""

import json
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import tyro

from gpt.arguments import check_fields
from gpt.data.cache import cache_folder
from gpt.data.config import DataConfig
from gpt.data.external_tokens import find_token_files
from gpt.data.formats import read_lines
from gpt.data.sources import find_sources
from gpt.data.split import read_documents
from gpt.device import autocast
from gpt.errors import EXIT_DONE, UserError, require
from gpt.evaluation.scoring import Question, multiple_choice, score_texts, with_shots
from gpt.interop.initial import load_source
from gpt.option import option
from gpt.stop import StopRequest
from gpt.streams import check_output


@dataclass(frozen=True)
class Arguments:
    """Score a text, or multiple-choice questions, with a run or a Hugging Face checkpoint."""

    run: tyro.conf.Positional[str]
    """The run directory; or a Hugging Face checkpoint, a directory or a name."""
    corpus: tuple[str, ...] = option((), is_path=True)
    """Text to score: any corpus that train.py takes, except token files."""
    text_field: str | None = None
    """The field of JSON lines, or the column of Parquet files and datasets, with the text. None: text."""
    encoding_errors: Literal["strict", "replace"] | None = None
    """Refuse bytes that are not UTF-8 (strict), or replace them with U+FFFD. None: strict."""
    max_corpus_bytes: int | None = option(None, is_wide=True)
    """Read about this many bytes of text at most: whole documents, in the corpus's order."""
    max_download_bytes: int | None = option(None, is_wide=True)
    """Refuse to download files of more bytes than this. None: 16 GiB."""
    cache_dir: Path | None = None
    """Folder for downloads. None: a folder in the user's cache folder."""
    stride: int | None = option(None, at_least=1)
    """Tokens between the starts of the windows in which a text is scored. Each token sees at least the context less
    this. None: half the context."""
    multiple_choice: Path | None = None
    """Questions to answer: JSON lines with ctx, endings and label, as in HellaSwag."""
    few_shot: int = option(0, at_least=0)
    """Number of answered questions to put before each question."""
    shots: Path | None = None
    """File to draw them from. None: the other questions."""
    seed: int | None = option(None, is_wide=True)
    """Seed of the draw of answered questions. None: 1337."""
    batch_size: int = option(8, at_least=1)
    """Rows to score at a time."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"
    """Precision of the forward pass under autocast."""
    json: bool = False
    """Print one JSON object instead of text."""

    def __post_init__(self) -> None:
        check_fields(self)
        require(bool(self.corpus) != (self.multiple_choice is not None), "give either corpus or multiple_choice")
        require(self.stride is None or bool(self.corpus), "stride goes with corpus")
        for name, value in self.text_options.items():
            require(value is None or bool(self.corpus), f"{name} goes with corpus")
        require(self.seed is None or self.few_shot > 0, "seed goes with few_shot: nothing else is drawn")
        require(self.shots is None or self.few_shot > 0, "shots goes with few_shot: say how many")
        require(self.few_shot == 0 or not self.corpus, "few_shot goes with multiple_choice")

    @property
    def text_options(self) -> dict[str, Any]:
        """The options of DataConfig that this command has, too: how to read the text."""
        names = [f.name for f in fields(DataConfig) if f.name != "corpus"]
        return {name: getattr(self, name) for name in names if hasattr(self, name)}


def read_questions(path: Path) -> list[Question]:
    """Read a file of questions in JSON lines. Raises UserError, naming the line, for anything else."""
    questions = []
    for number, line in enumerate(read_lines(path, "file of questions"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            questions.append(Question(row["ctx"], row["endings"], _label(row["label"])))
        except UserError as error:
            raise UserError(f"{path}: line {number} is not a question: {error}") from None
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            what = f"line {number} is not a question with ctx, endings and label"
            raise UserError(f"{path}: {what} ({error!r})") from None
    if not questions:
        raise UserError(f"{path} has no questions")
    return questions


def _label(value: Any) -> int:
    """Convert a label, an integer or its text. Raises ValueError for others, such as 1.5."""
    if type(value) not in (int, str):
        raise ValueError(f"label {value!r}")
    return int(value)


def _count(n: int, what: str) -> str:
    return f"{n:,} {what}{'s' * (n != 1)}"


def main(arguments: Arguments) -> int:
    """Score, print, and return the exit status. SIGTERM raises KeyboardInterrupt, as Ctrl-C does."""
    check_output()
    with StopRequest() as stop, stop.at_once():
        return _main(arguments)


def _main(arguments: Arguments) -> int:
    # Check the text before loading a model.
    if arguments.corpus:
        given = {name: value for name, value in arguments.text_options.items() if value is not None}
        data = DataConfig(arguments.corpus, **given)
        tokens = find_token_files(replace(data, max_corpus_bytes=None))
        require(not tokens, "token files (.bin) cannot be scored: give text as the corpus")
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
