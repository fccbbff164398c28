"""Generate text from a trained run: python sample.py RUN [--prompt TEXT] [--name value ...]"""

import io
import json
import os
import select
import signal
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import tyro

import gpt
from gpt.command_line import flag, parse_flags
from gpt.data.formats import read_lines
from gpt.data.tokenizers import Tokenizer
from gpt.errors import EXIT_DONE, EXIT_STOPPED, UserError, require, run_command
from gpt.evaluation.int8 import loss_of_int8
from gpt.files import decoded
from gpt.inference.generation import Generation, generate
from gpt.inference.sample_output import FIELDS, Records, SampleFile, Screen
from gpt.inference.sampling import SamplingConfig, sample_seed
from gpt.option import check_contradictions, option
from gpt.run import load
from gpt.run.layout import FILES, RECORD, checkpoints_of
from gpt.stop import StopRequest
from gpt.streams import check_output, do_without_output


@dataclass(frozen=True)
class Sampling(SamplingConfig):
    """SamplingConfig with types for the command line."""

    stop: tyro.conf.UseAppendAction[tuple[str, ...]] = option((), may_be_empty=True)
    """A string that ends the text and is not part of it; repeatable."""
    stop_tokens: tyro.conf.UseAppendAction[tuple[int | str, ...]] = option((), may_be_empty=True)
    """A token that ends the text: an id, or text that is one token; repeatable."""
    logit_bias: tyro.conf.UseAppendAction[tuple[str, ...]] = option((), may_be_empty=True)
    """TOKEN=NUMBER, added to the token's logit; TOKEN is an id, or text that is one token; repeatable."""


@dataclass(frozen=True)
class Arguments:
    """Continue prompts with a trained run. Text streams to the terminal as it is generated."""

    run: tyro.conf.Positional[Path]
    """The run directory."""
    prompt: str | None = option(None, may_be_empty=True, contradicts=("prompt_file",))
    """Text to continue; - reads it from standard input. None or empty: start a new document."""
    prompt_file: Path | None = None
    """A prompt on each line; in a .jsonl file, {"prompt": ...}, whose other fields are copied to the output."""
    output: Path | None = option(None, contradicts=("jsonl",))
    """Write each sample to this file as a line of JSON when it ends."""
    resume: bool = option(False, contradicts=("overwrite",))
    """Continue an interrupted command's --output after its last complete sample. Give the same prompts and options."""
    overwrite: bool = False
    """Replace --output if it exists."""
    jsonl: bool = False
    """Write each sample to standard output as a line of JSON when it ends."""
    interactive: bool = option(False, contradicts=("prompt", "prompt_file", "output", "jsonl"))
    """Read prompts from the terminal, one on each line."""
    draft: Path | None = None
    """Run directory of a smaller model with the same tokenizer. It proposes tokens, which the run's model checks."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    sampling: Sampling = field(default_factory=Sampling)

    def __post_init__(self) -> None:
        check_contradictions(self, spelled=flag)
        for name in ("resume", "overwrite"):
            require(self.output is not None or not getattr(self, name), f"--{name} goes with --output")
        single = not self.interactive or self.sampling.num_samples == 1
        require(single, "--interactive and --num-samples contradict each other: give one")
        one = self.draft is None or self.sampling.speculate is None
        require(one, "--draft and --speculate contradict each other: give one")
        proposing = self.draft is not None or self.sampling.speculate is not None
        require(proposing or self.sampling.draft_tokens is None, "--draft-tokens needs --draft or --speculate")


def read_prompts(arguments: Arguments) -> list[dict[str, Any]]:
    """Read the prompts, each as an object with the other fields of its JSONL line. Raises UserError."""
    path = arguments.prompt_file
    if path is None:
        return [{"prompt": read_all() if arguments.prompt == "-" else arguments.prompt or ""}]
    lines = enumerate(read_lines(path, "prompt file"), 1)
    numbered = [(number, line.removesuffix("\r")) for number, line in lines if line.strip()]
    require(bool(numbered), f"the prompt file {path} has no prompts")
    if path.suffix.lower() != ".jsonl":
        return [{"prompt": line} for _, line in numbered]
    return [_prompt_object(line, f"{path}, line {number}") for number, line in numbered]


def read_all() -> str:
    """Read standard input, without a byte order mark and the last line end."""
    return decoded(sys.stdin.read()).removeprefix("\ufeff").removesuffix("\n").removesuffix("\r")


def _prompt_object(line: str, where: str) -> dict[str, Any]:
    """Parse a line of a JSONL file of prompts. Raises UserError."""
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where} is not JSON ({error})") from None
    good = isinstance(entry, dict) and isinstance(entry.get("prompt"), str)
    require(good, f'{where} must be an object {{"prompt": "text"}}, which may have other fields')
    taken = [name for name in entry if name in FIELDS[1:]]
    require(not taken, f"{where}: the output sets the field {taken and taken[0]!r} itself: give it another name")
    return entry


def follow(pieces: Generation, sink: Any) -> int | None:
    """Pass the pieces to the sink, and print on stderr how many proposals were accepted.

    Returns the signal that interrupted them, or None.
    """
    with StopRequest() as stop:
        for piece in pieces:
            sink.take(piece)
            if stop.signal is not None:
                pieces.stop()
    if pieces.proposed:
        share = pieces.accepted / pieces.proposed
        print(f"{pieces.accepted} of {pieces.proposed} proposed tokens accepted ({share:.0%})", file=sys.stderr)
    return stop.signal


def read_line() -> str:
    """Read a line from standard input, with a prompt on a terminal. Raises KeyboardInterrupt and EOFError.

    A Ctrl-C just before a read begins, or one that another thread receives, does not end the read. Signals therefore
    write to a pipe, which does.
    """
    if not sys.stdin.isatty() or os.name != "posix":
        return input("> " if sys.stdin.isatty() else "")
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    before = signal.set_wakeup_fd(wake)
    try:
        print("> ", end="", flush=True)
        if woken in select.select([sys.stdin, woken], [], [])[0]:
            for number in os.read(woken, 64):
                signal.raise_signal(number)  # in this thread, where Python handles it at once
        return input()
    finally:
        signal.set_wakeup_fd(before)
        os.close(woken)
        os.close(wake)


def interact(arguments: Arguments, model: gpt.GPT, tokenizer: Tokenizer, draft: gpt.GPT | None) -> int:
    """Answer each line of input as a prompt, until an empty line or the end of input."""
    print("Each line is a prompt. Ctrl-C stops an answer; an empty line or Ctrl-D ends.", file=sys.stderr)
    turn = 0
    while True:
        try:
            line = decoded(read_line()).removeprefix("\ufeff").removesuffix("\r")
        except KeyboardInterrupt:
            print()
            continue
        except EOFError:
            return EXIT_DONE
        if not line:
            return EXIT_DONE
        config = replace(arguments.sampling, seed=sample_seed(arguments.sampling.seed, turn, 0))
        turn += 1
        try:
            pieces = generate(model, tokenizer, [line], config, draft=draft)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            continue
        if follow(pieces, Screen([{"prompt": ""}], 1)) == signal.SIGTERM:
            return EXIT_STOPPED


def main(arguments: Arguments) -> int:
    """Print prompts and their continuations, or write them as JSON. Returns the exit status."""
    do_without_output() if arguments.output is not None else check_output()
    reads = arguments.interactive or arguments.prompt == "-"
    require(sys.stdin is not None or not reads, "standard input is closed: no prompt can be read from it")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # text that is not UTF-8 is refused like other prompts
    prompts = [] if arguments.interactive else read_prompts(arguments)
    config, file = arguments.sampling, sample_file(arguments, prompts)
    model, tokenizer = load(arguments.run, arguments.device)
    draft = None
    if arguments.draft is not None:
        draft, other = load(arguments.draft, arguments.device)
        same = other.fingerprint == tokenizer.fingerprint
        require(same, f"the draft {arguments.draft} has another tokenizer than {arguments.run}: train it with the same")
    # Check options, prompts and draft against each other before anything is written.
    texts, done = [entry["prompt"] for entry in prompts], set() if file is None else file.done
    pieces = generate(model, tokenizer, texts, config, draft=draft, done=done)
    if config.quantize is not None:
        print(loss_of_int8(arguments.run, model, tokenizer, config.dtype), file=sys.stderr)
    sys.stdout.reconfigure(errors="replace")  # a terminal without a character shows ? instead
    if arguments.interactive:
        return interact(arguments, model, tokenizer, draft)
    if file is not None:
        with file.open() as opened:
            number = follow(pieces, Records(opened, prompts, config))
    else:
        sink = Records(sys.stdout, prompts, config) if arguments.jsonl else Screen(prompts, config.num_samples)
        number = follow(pieces, sink)
    if number is None:
        return EXIT_DONE
    print("interrupted", file=sys.stderr)
    return EXIT_STOPPED


def sample_file(arguments: Arguments, prompts: list[dict[str, Any]]) -> SampleFile | None:
    """Check --output, and return its file if it is given. Raises UserError."""
    if arguments.output is None:
        return None
    read = [arguments.prompt_file] if arguments.prompt_file is not None else []
    for run in filter(None, (arguments.run, arguments.draft)):
        read += [*(run / name for name in (RECORD, *FILES)), *checkpoints_of(run).glob("*/*")]
    options = {"resume": arguments.resume, "overwrite": arguments.overwrite, "read": read}
    return SampleFile(arguments.output, prompts, arguments.sampling, **options)


if __name__ == "__main__":
    run_command(lambda: main(parse_flags(Arguments, sys.argv[1:], prog="sample.py")))
