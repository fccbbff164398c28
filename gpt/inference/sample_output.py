"""Where samples go: JSON lines, in a file that an interrupted command can continue, or text on standard output."""

import contextlib
import json
import os
import stat
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from gpt.errors import UserError, require
from gpt.files import flush_names
from gpt.inference.generation import Piece
from gpt.inference.sampling import SamplingConfig, sample_seed

FIELDS = ("prompt", "text", "tokens", "logprobs", "finish_reason", "prompt_index", "sample_index", "seed")

Key = tuple[int, int]  # number of a prompt, number of its sample


class Records:
    """Samples as JSON objects, one a line, each written when it ends."""

    def __init__(self, file: IO[str], prompts: list[dict[str, Any]], config: SamplingConfig) -> None:
        self._file, self._prompts, self._config = file, prompts, config
        self._open: dict[Key, list[Piece]] = {}

    def take(self, piece: Piece) -> None:
        key = piece.prompt, piece.sample
        pieces = self._open.setdefault(key, [])
        pieces.append(piece)
        if piece.finish_reason is None:
            return
        del self._open[key]
        drawn = [p for p in pieces if p.token is not None]
        values = (
            "".join(p.text for p in pieces),
            [p.token for p in drawn],
            [p.logprob for p in drawn],
            piece.finish_reason,
            *key,
            sample_seed(self._config.seed, *key),
        )
        record = self._prompts[piece.prompt] | dict(zip(FIELDS[1:], values))
        line = json.dumps(record, ensure_ascii=False)
        try:
            line.encode(self._file.encoding or "utf-8")
        except UnicodeEncodeError:  # half a surrogate pair that a prompt's field has, or a terminal of few characters
            line = json.dumps(record)
        self._file.write(line + "\n")
        self._file.flush()  # what is finished outlives a kill


class Screen:
    """Samples as text on standard output: the first that has not ended streams, the others wait for their turn."""

    def __init__(self, prompts: list[dict[str, Any]], num_samples: int) -> None:
        self._prompts = prompts
        self._turns = [(i, j) for i in range(len(prompts)) for j in range(num_samples)]
        self._headed = len(self._turns) > 1
        self._waiting: dict[Key, list[Piece]] = {}
        self._begun = False

    def take(self, piece: Piece) -> None:
        self._waiting.setdefault((piece.prompt, piece.sample), []).append(piece)
        while self._turns and self._turns[0] in self._waiting:
            prompt, sample = self._turns[0]
            pieces = self._waiting.pop((prompt, sample))
            if not self._begun:
                head = f"--- prompt {prompt}, sample {sample} ---\n" if self._headed else ""
                self._write(head + self._prompts[prompt]["prompt"])
            self._write("".join(piece.text for piece in pieces))
            self._begun = pieces[-1].finish_reason is None
            if self._begun:
                return
            self._write("\n")
            del self._turns[0]

    def _write(self, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()


class SampleFile:
    """The file that samples are written to.

    done: the samples that it holds already; without `resume` none. Raises UserError where it exists and neither resume
    nor overwrite is given, where it is what the command reads, and for a line that is not a sample of these prompts.
    Nothing is written before open().
    """

    def __init__(
        self,
        path: Path,
        prompts: Sequence[dict[str, Any]],
        config: SamplingConfig,
        *,
        resume: bool = False,
        overwrite: bool = False,
        read: Sequence[Path] = (),
    ) -> None:
        self.path, self.resume, self.overwrite = path, resume, overwrite
        self.done: set[Key] = set()
        self._unfinished: set[int] = set()  # numbers of the lines that are made again
        self._end = 0  # of the last whole line
        self._check(read)
        if resume and path.exists():
            try:
                self._read(prompts, config)
            except OSError as error:
                raise UserError(f"cannot read {path}: {error.strerror}") from error

    def _check(self, read: Sequence[Path]) -> None:
        """UserError where the file must not be written."""
        if not self.path.exists():
            return
        require(not self.path.is_dir(), f"cannot write {self.path}: Is a directory")
        for other in filter(Path.exists, read):
            require(not os.path.samefile(other, self.path), f"{self.path} is what this command reads: give another")
        if not stat.S_ISREG(self.path.stat().st_mode):  # a pipe or a device
            require(not self.resume, f"{self.path} is not a regular file: --resume has nothing to go on from")
        elif not (self.resume or self.overwrite):
            raise UserError(
                f"{self.path} exists: add --resume to go on after its last sample, --overwrite to write it anew, "
                "or give another --output"
            )

    def _read(self, prompts: Sequence[dict[str, Any]], config: SamplingConfig) -> None:
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):  # what a kill has cut
                    return
                self._end += len(line)
                record = self._sample(line, number, prompts, config)
                key = record["prompt_index"], record["sample_index"]
                if record.get("finish_reason") == "interrupted":
                    self._unfinished.add(number)
                elif key in self.done:
                    raise UserError(f"{self.path}, line {number}: the sample {key[1]} of prompt {key[0]} comes twice")
                else:
                    self.done.add(key)

    def _sample(
        self, line: bytes, number: int, prompts: Sequence[dict[str, Any]], config: SamplingConfig
    ) -> dict[str, Any]:
        """A line's object; UserError unless it is a sample of these prompts with this seed."""
        advice = "give another --output, or --overwrite to write it anew"
        try:
            record = json.loads(line)
            i, j = record["prompt_index"], record["sample_index"]
            good = type(i) is type(j) is int and i >= 0 <= j and record.keys() >= set(FIELDS)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            good = False
        require(good, f"{self.path}, line {number} is not a sample: {advice}")
        where = f"{self.path}, line {number} is of other prompts or options"
        require(i < len(prompts), f"{where}: there is no prompt {i} now; {advice}")
        require(j < config.num_samples, f"{where}: there is no sample {j} of a prompt now; {advice}")
        ours = prompts[i] | {"seed": sample_seed(config.seed, i, j)}
        for key in sorted(ours.keys() | record.keys() - set(FIELDS)):
            same = key in ours and key in record and json.dumps(ours[key]) == json.dumps(record[key])
            require(same, f"{where}: its {key!r} is another; {advice}")
        return record

    @contextlib.contextmanager
    def open(self) -> Iterator[IO[str]]:
        """The file, behind its last whole sample. Raises UserError where it cannot be written."""
        try:
            if self.resume and self.path.exists():
                self._cut()
            is_new = not (self.resume or self.overwrite or os.path.lexists(self.path))
            with self.path.open("a" if self.resume else "x" if is_new else "w", encoding="utf-8") as file:
                yield file
                if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                    os.fsync(file.fileno())
                    flush_names(Path(os.path.realpath(self.path)).parent)
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror}") from error

    def _cut(self) -> None:
        """Take out the last line if it is torn, and the samples that were interrupted."""
        if not self._unfinished:
            os.truncate(self.path, self._end)
            return
        real = Path(os.path.realpath(self.path))
        temporary = real.with_name(f".{real.name}.tmp")
        with real.open("rb") as old, temporary.open("wb") as new:
            left = self._end
            for number, line in enumerate(old, 1):
                left -= len(line)
                if left >= 0 and number not in self._unfinished:
                    new.write(line)
            new.flush()
            os.fsync(new.fileno())
        os.replace(temporary, real)
        flush_names(real.parent)
