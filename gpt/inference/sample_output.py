"""Output of samples: JSON lines, in a file that an interrupted command can resume, or text on standard output."""

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
    """Writes each sample as a line of JSON when it ends."""

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
        except UnicodeEncodeError:  # half a surrogate pair in a prompt's field, or a terminal that lacks a character
            line = json.dumps(record)
        self._file.write(line + "\n")
        self._file.flush()  # finished samples survive a kill


class Screen:
    """Prints samples as text on standard output, in order: one streams while the others wait."""

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
    """The file that samples are written to, from open() on.

    done: the samples that it already has; empty without `resume`. Raises UserError if the file exists and neither
    resume nor overwrite is given, if it is one of the files that the command reads, and for a line that is not a sample
    of these prompts.
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
        self._prompts, self._config = prompts, config
        self._is_new = not os.path.lexists(path)
        self.done: set[Key] = set()
        self._unfinished: set[int] = set()  # numbers of the lines of interrupted samples
        self._end = 0  # of the last complete line, in bytes
        self._check(read)
        if resume and path.exists():
            try:
                self._read()
            except OSError as error:
                raise UserError(f"cannot read {path}: {error.strerror}") from error

    def _check(self, read: Sequence[Path]) -> None:
        """Raise UserError if the file must not be written."""
        if not self.path.exists():
            return
        require(not self.path.is_dir(), f"cannot write {self.path}: Is a directory")
        own = any(os.path.samefile(other, self.path) for other in filter(Path.exists, read))
        require(not own, f"{self.path} is an input of this command: give another --output")
        if not stat.S_ISREG(self.path.stat().st_mode):  # a pipe or a device
            require(not self.resume, f"{self.path} is not a regular file: --resume cannot read it")
            return
        choice = "add --resume to continue it, --overwrite to replace it, or give another --output"
        require(self.resume or self.overwrite, f"{self.path} exists: {choice}")

    def _read(self) -> None:
        """Find the finished samples of a file to resume."""
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):  # truncated by a kill
                    return
                self._end += len(line)
                record = self._sample(line, number)
                key = record["prompt_index"], record["sample_index"]
                if record.get("finish_reason") == "interrupted":
                    self._unfinished.add(number)
                elif key in self.done:
                    twice = f"sample {key[1]} of prompt {key[0]} appears twice: delete one of its lines"
                    raise UserError(f"{self.path}, line {number}: {twice}")
                else:
                    self.done.add(key)

    def _sample(self, line: bytes, number: int) -> dict[str, Any]:
        """Parse a line. Raises UserError unless it is a sample of these prompts with this seed."""
        advice = "give another --output, or --overwrite to replace the file"
        try:
            record = json.loads(line)
            i, j = record["prompt_index"], record["sample_index"]
            good = type(i) is type(j) is int and i >= 0 <= j and record.keys() >= set(FIELDS)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            good = False
        require(good, f"{self.path}, line {number} is not a sample: {advice}")
        where = f"{self.path}, line {number} is from other prompts or options"
        require(i < len(self._prompts), f"{where}: this command has no prompt {i}; {advice}")
        require(j < self._config.num_samples, f"{where}: this command has no sample {j} of a prompt; {advice}")
        ours = self._prompts[i] | {"seed": sample_seed(self._config.seed, i, j)}
        for key in sorted(ours.keys() | record.keys() - set(FIELDS)):
            same = key in ours and key in record and json.dumps(ours[key]) == json.dumps(record[key])
            require(same, f"{where}: its {key!r} differs; {advice}")
        return record

    @contextlib.contextmanager
    def open(self) -> Iterator[IO[str]]:
        """Open the file at the end of its last complete sample. Raises UserError if it cannot be written.

        Without resume and overwrite, also if another process has created it.
        """
        try:
            if self.resume and self.path.exists():
                self._cut()
            mode = "a" if self.resume else "x" if self._is_new and not self.overwrite else "w"
            with self.path.open(mode, encoding="utf-8") as file:
                yield file
                if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                    os.fsync(file.fileno())
                    flush_names(Path(os.path.realpath(self.path)).parent)
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror}") from error

    def _cut(self) -> None:
        """Remove a truncated last line and the interrupted samples."""
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
