"""What outlives a power failure. Killing a process cannot show it: the disk is watched instead.

A file's content counts as on the disk when it was flushed after its last write, and a name in a directory when the
directory was flushed after the name came. A file gets the name that readers look for only when its content is there.
"""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import sample
from gpt.command_line import parse_flags
from gpt.config import Config
from gpt.data.cache import JOURNAL, publish, unfinished
from gpt.data.token_files import HEADER_BYTES, TokenWriter
from gpt.data.tokenizers import ByteTokenizer
from gpt.files import make_folder, write_whole
from gpt.interop.export import Arguments, main
from gpt.run.checkpoint import store, verify
from gpt.training.config import TrainConfig
from gpt.training.monitor import Monitor
from tests.train_checks import run

TENSORS = {"model.safetensors": {"a": torch.arange(3.0)}, "optimizer.safetensors": {"b": torch.ones(2)}}


class Disk:
    """What was flushed and renamed, in order, and what each flushed inode then held."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[tuple[str, str]] = []  # ("flush" or "rename", path)
        self.flushed: dict[int, str] = {}
        self.sizes: dict[int, int] = {}  # of a file when it was flushed
        self.unsafe: list[str] = []  # what was renamed before its content was on the disk
        self.before_rename: Callable[[str], None] = lambda target: None
        self._fsync = os.fsync
        monkeypatch.setattr(os, "fsync", self._flush)
        for name in ("rename", "replace"):
            monkeypatch.setattr(os, name, self._renaming(getattr(os, name)))

    def _flush(self, fd: int) -> None:
        path = Path(f"/proc/self/fd/{fd}").resolve()
        held, size = content(path), path.stat().st_size  # what another thread adds meanwhile may not be flushed
        self._fsync(fd)
        self.flushed[path.stat().st_ino], self.sizes[path.stat().st_ino] = held, size
        self.events.append(("flush", str(path)))

    def _renaming(self, real: Callable) -> Callable:
        def rename(source, target) -> None:
            source = Path(source).resolve()
            for path in [source, *source.rglob("*")]:
                if not self.holds(path):
                    self.unsafe.append(f"{path} as {target}")
            self.before_rename(str(target))
            real(source, target)
            self.events.append(("rename", str(Path(target).resolve())))

        return rename

    def holds(self, path: Path) -> bool:
        """Whether what the file holds, or which names the directory has, is on the disk."""
        return self.flushed.get(path.stat().st_ino) == content(path)

    def times(self, kind: str, path: Path) -> list[int]:
        """When this happened to the path, as places in `events`."""
        return [n for n, event in enumerate(self.events) if event == (kind, str(path.resolve()))]


def content(path: Path) -> str:
    """A digest of a file's bytes, or of a directory's names."""
    data = path.read_bytes() if path.is_file() else "/".join(sorted(os.listdir(path))).encode()
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def disk(monkeypatch) -> Disk:
    return Disk(monkeypatch)


def test_the_disk_that_is_watched_knows_a_flush_from_none(disk, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    for path in (first, second):
        path.write_text("old")
    with first.open("a") as file:
        os.fsync(file.fileno())
    assert disk.holds(first) and not disk.holds(second)
    os.replace(first, tmp_path / "third")
    os.replace(second, tmp_path / "fourth")
    assert [entry.split()[0] for entry in disk.unsafe] == [str(second)]
    (tmp_path / "third").write_text("new")
    assert not disk.holds(tmp_path / "third") and not disk.holds(tmp_path)


def test_a_file_is_flushed_before_it_has_its_name_and_the_directory_after(disk, tmp_path):
    (tmp_path / "settings").write_text("old")
    write_whole(tmp_path / "settings", b"new")
    assert not disk.unsafe and disk.holds(tmp_path / "settings") and disk.holds(tmp_path)
    assert disk.times("rename", tmp_path / "settings")[-1] < disk.times("flush", tmp_path)[-1]


def test_the_parts_of_a_checkpoint_are_on_the_disk_before_it_has_its_name(disk, tmp_path):
    """Each file, the manifest that vouches for them, and the folder; then the names of it and of its directory."""
    directory = tmp_path / "checkpoints"
    for step in (1, 2):
        store(directory, TENSORS, {"step": step}, keep=1, kinds=("step", "best"))
        for kind in ("step", "best"):
            final = directory / f"{kind}_{step:08d}"
            assert not disk.unsafe
            assert {path.name for path in final.iterdir()} == {*TENSORS, "state.json", "manifest.json"}
            assert disk.times("rename", final)[-1] < max(disk.times("flush", directory))
        assert disk.holds(tmp_path)


def test_a_manifest_is_written_after_the_files_that_it_vouches_for_are_on_the_disk(disk, tmp_path, monkeypatch):
    digests = []

    def digest(path: Path) -> str:
        digests.append(disk.holds(path))
        return content(path)

    monkeypatch.setattr("gpt.run.checkpoint._sha256", digest)
    store(tmp_path, TENSORS, {"step": 1}, keep=1, kinds=("step",))
    assert digests == [True] * 3


def test_an_old_checkpoint_goes_when_the_new_one_has_its_name_on_the_disk(disk, tmp_path, monkeypatch):
    store(tmp_path, TENSORS, {"step": 1}, keep=1, kinds=("step",))
    seen = []

    def before_rename(target: str) -> None:
        if not target.endswith("step_00000002"):  # the old one is moved aside
            seen.append(disk.times("flush", tmp_path)[-1] > disk.times("rename", tmp_path / "step_00000002")[-1])

    disk.before_rename = before_rename
    store(tmp_path, TENSORS, {"step": 2}, keep=1, kinds=("step",))
    assert seen == [True]


def test_a_checkpoint_in_a_folder_that_holds_other_files_is_flushed_there(disk, tmp_path):
    """A folder with a file of the user's stays, and takes the files one by one."""
    store(tmp_path, TENSORS, {"step": 1}, keep=1, kinds=("step",))
    final = tmp_path / "step_00000001"
    (final / "notes.txt").write_text("mine")
    store(tmp_path, TENSORS, {"step": 1}, keep=1, kinds=("step",))
    assert (final / "notes.txt").read_text() == "mine" and verify(final) is None
    assert not disk.unsafe and disk.holds(final)


def test_the_metrics_that_a_checkpoint_counts_on_are_on_the_disk_before_it(disk, folder):
    """After a crash a run resumes from the checkpoint, with all records up to it."""
    metrics, seen = folder / "run" / "metrics.jsonl", []

    def before_rename(target: str) -> None:
        if Path(target).name.startswith("step_"):
            state = next(Path(target).parent.glob(f".{Path(target).name}.*.tmp/state.json"))
            size = json.loads(state.read_text())["metrics_bytes"]
            seen.append(0 < size <= disk.sizes.get(metrics.stat().st_ino, 0) and disk.holds(metrics.parent))

    disk.before_rename = before_rename
    assert run(max_steps=20, n_layer=1) == 0
    assert run("--resume", max_steps=25, n_layer=1) == 0
    metrics.unlink()  # the name is new again, in a directory whose other names are on the disk
    assert run("--resume", max_steps=30, n_layer=1) == 0
    assert seen == [True] * 4


def test_a_run_directory_is_on_the_disk_when_the_command_ends(disk, folder):
    assert run(max_steps=10, n_layer=1) == 0
    assert not disk.unsafe
    names = ["config.toml", "tokenizer.json", "corpus.json", "run.json", "metrics.jsonl", "loss.png", "checkpoints"]
    missing = [name for name in names if not disk.holds(folder / "run" / name)]
    assert not missing and disk.holds(folder / "run") and disk.holds(folder)


def test_records_after_the_last_checkpoint_are_on_the_disk_when_the_command_ends(disk, tmp_path):
    monitor = Monitor(Config(train=TrainConfig(run_dir=tmp_path)))
    monitor.log({"step": 1, "val_loss": 1.0, "bits_per_byte": 1.0})
    monitor.close()
    assert disk.holds(tmp_path / "metrics.jsonl") and disk.holds(tmp_path)


def test_a_cached_corpus_is_on_the_disk_before_it_has_its_name(disk, folder):
    """Its token files are mapped without reading their checksums: zeros in them would be trained on."""
    assert run(max_steps=1, n_layer=1, checkpoint_interval=1, eval_interval=1) == 0
    (found,) = (folder / "cache").rglob("train.tokens")
    assert not disk.unsafe
    assert disk.times("rename", found.parent)[-1] < disk.times("flush", found.parent.parent)[-1]


def test_a_published_folder_is_flushed_with_all_that_is_in_it(disk, tmp_path):
    with publish(tmp_path / "place") as work:
        (work / "inner").mkdir()
        (work / "inner" / "file").write_text("text")
    assert not disk.unsafe and disk.holds(tmp_path)


def test_a_state_to_resume_a_token_file_from_is_on_the_disk(disk, tmp_path):
    tokenizer = ByteTokenizer()
    with TokenWriter(tmp_path / "train.tokens", tokenizer) as writer:
        writer.append(torch.arange(200).numpy())
        writer.state()
        assert not disk.flushed
        writer.sync()
        inode = (tmp_path / "train.tokens").stat().st_ino
        assert disk.sizes[inode] == HEADER_BYTES + 200 * tokenizer.dtype.itemsize


def test_a_journal_is_written_after_the_tokens_that_it_counts(disk, folder, monkeypatch):
    """It says how far an interrupted call's token files are good."""
    monkeypatch.setattr("gpt.data.tokenize_corpus.PART", 500)
    monkeypatch.setattr("gpt.data.tokenize_corpus.GROUP", 200)
    (folder / "docs").mkdir()
    for i in range(30):
        (folder / f"docs/{i}.txt").write_text(f"all work and no play, {i}\n" * 10)
    seen = []

    def before_rename(target: str) -> None:
        if target.endswith(JOURNAL):
            work = Path(target).parent
            tokens = json.loads((work / f".{JOURNAL}.tmp").read_text())["shards"]["train"]["tokens"]
            flushed = disk.sizes.get((work / "train.tokens").stat().st_ino, 0)
            seen.append(0 < HEADER_BYTES + 2 * tokens <= flushed)

    disk.before_rename = before_rename
    assert run(corpus="docs", max_steps=1, n_layer=1) == 0
    assert len(seen) > 3 and all(seen)


@pytest.mark.parametrize("path", ["new", "a/b/new"])
def test_a_folder_is_made_with_its_name_on_the_disk(disk, tmp_path, path):
    make_folder(tmp_path / path)
    assert all(disk.holds(folder) for folder in (tmp_path / path).parents if tmp_path in (folder, *folder.parents))
    before = len(disk.events)
    make_folder(tmp_path / path)
    assert len(disk.events) == before


def test_a_folder_to_resume_in_has_its_name_on_the_disk(disk, tmp_path):
    with unfinished(tmp_path, "corpus") as work:
        assert work.name == ".resume-corpus" and disk.holds(tmp_path)


def test_folders_of_runs_caches_and_exports_are_on_the_disk(disk, folder):
    options = {"n_layer": 1, "max_steps": 1, "checkpoint_interval": 1, "tokenizer": "byte"}
    assert run(run_dir="runs/x/run", cache_dir="far/cache", **options) == 0
    assert main(Arguments(folder / "runs/x/run", folder / "out/export")) == 0
    for name in ("runs", "runs/x", "far", "far/cache/corpora", "out", "out/export"):
        assert disk.holds((folder / name).parent), name


def test_an_export_is_on_the_disk_when_the_command_ends(disk, tiny_run, tmp_path):
    assert main(Arguments(tiny_run, tmp_path / "export")) == 0
    names = sorted((tmp_path / "export").iterdir())
    assert len(names) == 6 and all(map(disk.holds, [*names, tmp_path / "export"]))


def test_samples_are_on_the_disk_when_the_command_ends(disk, tiny_run, tmp_path):
    """And those that a resumed command keeps, before they take the old file's place."""
    out = tmp_path / "out.jsonl"

    def sampled(*more: str) -> None:
        words = [str(tiny_run), "--output", str(out), "--num-samples", "2", "--max-new-tokens", "3", "--device", "cpu"]
        assert sample.main(parse_flags(sample.Arguments, [*words, *more], prog="sample.py")) == 0
        assert not disk.unsafe and disk.holds(out) and disk.holds(tmp_path)

    sampled()
    first, second = out.read_text().splitlines(keepends=True)
    out.write_text(json.dumps(json.loads(first) | {"finish_reason": "interrupted"}) + "\n" + second)
    sampled("--resume")
    assert disk.times("rename", out)[-1] < disk.times("flush", tmp_path)[-2]
    assert sorted(json.loads(line)["sample_index"] for line in out.read_text().splitlines()) == [0, 1]
