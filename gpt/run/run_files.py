"""Protect files that are not a run's: training overwrites a run's files, --overwrite deletes them, and nothing else.

run.json lists what the run wrote or is about to write; a listed file counts only if it also looks like a run's file.
A run older than run.json is recognised by its config.toml, its tokenizer.json, and its corpus.json or a checkpoint.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path

from gpt.config_file import read_toml
from gpt.errors import UserError
from gpt.files import write_whole
from gpt.run import layout
from gpt.run.checkpoint import discard, list_checkpoints, remove, unfinished
from gpt.run.layout import CHECKPOINTS, FILES, RECORD, TRACES, checkpoints_of, is_run_file


class RunFiles:
    """The files of a run in a folder, as found when this object is created.

    own: names of the run's files; checkpoints: all folders named like a checkpoint; is_run: they belong to a run.
    traces: the run about to be written here also writes TRACES.
    """

    def __init__(self, run_dir: Path, *, traces: bool = False) -> None:
        self.run_dir, self.wanted = run_dir, FILES + TRACES * traces
        self.checkpoints = list_checkpoints(checkpoints_of(run_dir))
        recorded = _read_record(run_dir / RECORD)
        named = _unrecorded(run_dir, self.checkpoints) if recorded is None else recorded
        self.is_run = bool(named)
        self.own = {name for name in named if is_run_file(run_dir / name)}

    @property
    def holds_run(self) -> bool:
        """Whether an earlier run left anything here that a new run would overwrite."""
        return self.is_run and bool(self.own or self.checkpoints)

    def check(self, *, resuming: bool, deleting: bool) -> None:
        """Raise UserError if a run here would destroy anything that is not a run's. Changes nothing.

        resuming: the existing run is resumed; deleting: it is about to be deleted.
        """
        _check_run_dir(self.run_dir)
        _check_links(self.run_dir)
        folder, record = checkpoints_of(self.run_dir), self.run_dir / RECORD
        foreign = [RECORD] * (record.is_dir() or (os.path.lexists(record) and not self.is_run))
        foreign += [name for name in self.wanted if self._is_foreign(self.run_dir / name, resuming)]
        foreign += [CHECKPOINTS] * (folder.exists() and not folder.is_dir())
        foreign += [f"{CHECKPOINTS}/{path.name}" for path in self.checkpoints if not self.is_run]
        if foreign:
            raise UserError(
                f"{self.run_dir} holds {foreign[0]}, which no run wrote here: move it, or give another --run-dir"
            )
        if folder.is_symlink() and not os.access(folder, os.W_OK | os.X_OK):
            raise UserError(f"cannot write to {os.path.realpath(folder)}, the target of {folder}")
        for path in self._to_delete() if deleting else ():
            if not os.access(path.parent, os.W_OK | os.X_OK):
                raise UserError(f"cannot delete {path}: its folder is read-only; nothing was deleted")

    def _is_foreign(self, path: Path, resuming: bool) -> bool:
        """Tell whether a path that the run writes holds something else. A resumed run reads its files and says more."""
        if path.is_dir():
            return True
        known = path.name in self.own or (resuming and self.is_run and path.name in FILES)
        is_dangling_link = path.is_symlink() and not path.exists()
        return os.path.lexists(path) and not known and not is_dangling_link

    def record(self) -> None:
        """List the run's files in run.json, before the run writes them."""
        files = sorted({*self.wanted, *self.own})
        write_whole(self.run_dir / RECORD, (json.dumps({"format": 1, "files": files}, indent=1) + "\n").encode())

    def delete(self) -> None:
        """Delete the run, after check and record. Links to files and folders stay, their targets are deleted."""
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
                yield from (folder / name for name in sorted(layout.CHECKPOINT_FILES) if (folder / name).exists())


def _read_record(path: Path) -> set[str] | None:
    """Return the names in a run.json that a run may write, or None without a valid run.json."""
    try:
        files = json.loads(path.read_bytes())["files"]
        return {name for name in (*FILES, *TRACES) if name in files} if isinstance(files, list) else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _unrecorded(run_dir: Path, checkpoints: list[Path]) -> set[str]:
    """Return the names of a run's files without a run.json: none unless the folder certainly holds a run."""
    is_run = is_run_file(run_dir / layout.CONFIG) and is_run_file(run_dir / layout.TOKENIZER)
    if not (is_run and (is_run_file(run_dir / layout.CORPUS) or any(map(_has_manifest, checkpoints)))):
        return set()
    traced = read_toml(run_dir / layout.CONFIG)["train"].get("profile_steps", 0) > 0
    return {*FILES, *(TRACES * traced)}


def _has_manifest(checkpoint: Path) -> bool:
    try:
        manifest = json.loads((checkpoint / layout.MANIFEST).read_bytes())
        entries = all({"bytes", "sha256"} == entry.keys() for entry in manifest.values())
        return entries and manifest.keys() <= layout.CHECKPOINT_FILES
    except (OSError, ValueError, AttributeError, RecursionError):
        return False


def _check_links(run_dir: Path) -> None:
    """Raise UserError for a link that cannot be written through: to a missing folder, or into another run."""
    for path in (run_dir, *(run_dir / name for name in (CHECKPOINTS, *FILES, *TRACES))):
        if not path.is_symlink():
            continue
        target = Path(os.path.realpath(path))
        is_folder = path in (run_dir, checkpoints_of(run_dir))
        if not (target.exists() or (not is_folder and target.parent.is_dir())):
            raise UserError(f"{path} is a link to {target}, which does not exist: create that, or delete the link")
        if path != run_dir and any(
            _is_of_another_run(target.parent / name, run_dir) for name in (RECORD, layout.CONFIG)
        ):
            raise UserError(f"{path} is a link into another run, {target.parent}: delete the link")


def _is_of_another_run(path: Path, run_dir: Path) -> bool:
    """Tell whether a file that marks a run exists and is not this run's."""
    own = os.path.realpath(path) == os.path.realpath(run_dir / path.name)
    return path.exists() and not own and (path.name == RECORD or is_run_file(path))


def _check_run_dir(run_dir: Path) -> None:
    """Raise UserError for a folder that a run would litter: the home folder, this program's, or one above it."""
    folder, program = Path(os.path.realpath(run_dir)), Path(__file__).resolve().parents[2]
    home = Path(os.path.realpath(os.path.expanduser("~")))
    sources = [program / name for name in ("gpt", "kernels", "tests", "configs", "docs", "benchmarks", ".git")]
    inside = any(folder == source or source in folder.parents for source in sources)
    if inside or folder in (home, program) or folder in program.parents:
        raise UserError(f"{folder} is not a folder for a run: give another --run-dir, such as runs/gpt")
