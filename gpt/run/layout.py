"""Which files of a folder are a run's: training writes over these, --overwrite deletes these, and nothing else.

RUN/run.json records what the run wrote or is about to write; a file in it counts only if it also looks like the run's.
A run from before there was a record is known by its config.toml, its tokenizer.json, and its corpus.json or a
checkpoint, all in this program's own form. wandb's folder always stays: it may hold what is not uploaded yet.
"""

import codecs
import json
import os
from collections.abc import Iterator
from pathlib import Path

from gpt.config_file import read_toml
from gpt.data.tokenizers import load_tokenizer
from gpt.errors import UserError
from gpt.files import write_whole
from gpt.run.checkpoint import MANIFEST, OWN, discard, list_checkpoints, remove, unfinished

RECORD = "run.json"
CHECKPOINTS = "checkpoints"
FILES = ("config.toml", "tokenizer.json", "corpus.json", "metrics.jsonl", "loss.png")
TRACES = ("trace.json.gz", "profile.txt")  # with --profile-steps only


def checkpoints_of(run_dir: Path) -> Path:
    """Where a run keeps its checkpoints."""
    return run_dir / CHECKPOINTS


class RunFiles:
    """What one folder holds of a run, as of the moment this object is made.

    own: names of the run's files; checkpoints: whatever has a checkpoint's name; is_run: these are a run's.
    traces: the run that is to be written here writes TRACES too.
    """

    def __init__(self, run_dir: Path, *, traces: bool = False) -> None:
        self.run_dir, self.wanted = run_dir, FILES + TRACES * traces
        self.checkpoints = list_checkpoints(checkpoints_of(run_dir))
        recorded = _read_record(run_dir / RECORD)
        named = _unrecorded(run_dir, self.checkpoints) if recorded is None else recorded
        self.is_run = bool(named)
        self.own = {name for name in named if looks_own(run_dir / name)}

    @property
    def holds_run(self) -> bool:
        """Whether a run left anything here that another one would write over."""
        return self.is_run and bool(self.own or self.checkpoints)

    def check(self, *, resuming: bool, deleting: bool) -> None:
        """UserError where a run written here would cost something that is not a run's. Changes nothing.

        resuming: the run here goes on; deleting: what it left is about to be deleted.
        """
        check_place(self.run_dir)
        check_links(self.run_dir)
        folder = checkpoints_of(self.run_dir)
        record = self.run_dir / RECORD
        strange = [RECORD] * (record.is_dir() or (os.path.lexists(record) and not self.is_run))
        strange += [name for name in self.wanted if self._is_strange(self.run_dir / name, resuming)]
        strange += [CHECKPOINTS] * (folder.exists() and not folder.is_dir())
        strange += [f"{CHECKPOINTS}/{path.name}" for path in self.checkpoints if not self.is_run]
        if strange:
            raise UserError(
                f"{self.run_dir} holds {strange[0]}, which no run wrote here: move it, or give another --run-dir"
            )
        if folder.is_symlink() and not os.access(folder, os.W_OK | os.X_OK):
            raise UserError(f"cannot write to {os.path.realpath(folder)}, where {folder} leads")
        for path in self._to_delete() if deleting else ():
            if not os.access(path.parent, os.W_OK | os.X_OK):
                raise UserError(f"cannot delete {path}: its folder is read-only; nothing was deleted")

    def _is_strange(self, path: Path, resuming: bool) -> bool:
        """Whether something that is not the run's is where the run writes a file. Resuming reads it, and says more."""
        if path.is_dir():
            return True
        known = path.name in self.own or (resuming and self.is_run and path.name in FILES)
        return os.path.lexists(path) and not known and not _leads_nowhere(path)

    def record(self) -> None:
        """Note which files here are the run's, before it writes them."""
        files = sorted({*self.wanted, *self.own})
        write_whole(self.run_dir / RECORD, (json.dumps({"format": 1, "files": files}, indent=1) + "\n").encode())

    def delete(self) -> None:
        """Delete what the run left, after check and record. Links to files and folders stay, their targets go."""
        for checkpoint in self.checkpoints:
            remove(checkpoint)
        for folder in unfinished(checkpoints_of(self.run_dir)):
            discard(folder)
        for name in sorted(self.own):
            os.unlink(os.path.realpath(self.run_dir / name))
        self.own = set()

    def _to_delete(self) -> Iterator[Path]:
        yield from (Path(os.path.realpath(self.run_dir / name)) for name in sorted(self.own))
        for folder in (*self.checkpoints, *unfinished(checkpoints_of(self.run_dir))):
            yield folder
            if not folder.is_symlink():
                yield from (folder / name for name in sorted(OWN) if (folder / name).exists())


def _leads_nowhere(path: Path) -> bool:
    """Whether this is a link whose file is still to be made."""
    return path.is_symlink() and not path.exists()


def _read_record(path: Path) -> set[str] | None:
    """The names in a run's record, of those that a run may write; None where there is no record."""
    try:
        files = json.loads(path.read_bytes())["files"]
        return {name for name in (*FILES, *TRACES) if name in files} if isinstance(files, list) else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _unrecorded(run_dir: Path, checkpoints: list[Path]) -> set[str]:
    """The names of a run's files where no record is: none, unless the folder is surely a run's."""
    sure = looks_own(run_dir / "config.toml") and looks_own(run_dir / "tokenizer.json")
    sure = sure and (looks_own(run_dir / "corpus.json") or any(map(_has_manifest, checkpoints)))
    if not sure:
        return set()
    traced = read_toml(run_dir / "config.toml")["train"].get("profile_steps", 0) > 0
    return {*FILES, *(TRACES * traced)}


def looks_own(path: Path) -> bool:
    """Whether a file has the form in which a run writes the file of this name."""
    try:
        if path.name == "config.toml":
            tables = read_toml(path)
            return {"data", "model", "optim"} <= tables.keys() and "run_dir" in tables["train"]
        if path.name == "tokenizer.json":
            return load_tokenizer(path) is not None
        if path.name == "corpus.json":
            return {"digest", "sources"} <= json.loads(path.read_bytes()).keys()
        with path.open("rb") as file:
            if path.name == "metrics.jsonl":
                begins = file.read(12).removeprefix(codecs.BOM_UTF8)
                return b'{"step": '.startswith(begins[:9])  # a line may be cut short
            start = {"loss.png": b"\x89PNG", "trace.json.gz": b"\x1f\x8b"}.get(path.name, b"")
            return file.read(len(start)) == start
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):  # UserError is a ValueError
        return False


def _has_manifest(checkpoint: Path) -> bool:
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_bytes())
        return all({"bytes", "sha256"} == entry.keys() for entry in manifest.values()) and manifest.keys() <= OWN
    except (OSError, ValueError, AttributeError, RecursionError):
        return False


def check_links(run_dir: Path) -> None:
    """UserError for a link to a folder or file that cannot be written through: dangling, or into another run."""
    for path in (run_dir, *(run_dir / name for name in (CHECKPOINTS, *FILES, *TRACES))):
        if not path.is_symlink():
            continue
        target = Path(os.path.realpath(path))
        is_folder = path in (run_dir, checkpoints_of(run_dir))
        if not (target.exists() or (not is_folder and target.parent.is_dir())):
            raise UserError(f"{path} is a link to {target}, which does not exist: make that, or delete the link")
        if path != run_dir and any(_is_others(target.parent / name, run_dir) for name in (RECORD, "config.toml")):
            raise UserError(f"{path} is a link into another run, {target.parent}: delete the link")


def _is_others(path: Path, run_dir: Path) -> bool:
    """Whether a file that marks a run exists, and is not this run's."""
    own = os.path.realpath(path) == os.path.realpath(run_dir / path.name)
    return path.exists() and not own and (path.name == RECORD or looks_own(path))


def check_place(run_dir: Path) -> None:
    """UserError for a folder that a run would litter: the home folder, this program's own, or one above it."""
    place, program = Path(os.path.realpath(run_dir)), Path(__file__).resolve().parents[2]
    home = Path(os.path.realpath(os.path.expanduser("~")))
    sources = [program / name for name in ("gpt", "kernels", "tests", "configs", "docs", "benchmarks", ".git")]
    inside = any(place == folder or folder in place.parents for folder in sources)
    if inside or place in (home, program) or place in program.parents:
        raise UserError(f"{place} is not a folder for a run: give another --run-dir, such as runs/gpt")
