"""Training overwrites and deletes only a run's own files."""

import importlib
import json
import os
import shutil
from pathlib import Path

import pytest

from gpt.run import layout, run_files
from gpt.run.checkpoint import list_checkpoints, newest_checkpoint, verify
from gpt.run.layout import CHECKPOINT_FILES, CHECKPOINTS, FILES, LOCK, RECORD, TABLE, TRACES, is_run_file
from gpt.run.metrics import read_metrics
from gpt.run.run_files import RunFiles
from tests.run_checks import NEWEST, OLDER, status_of

MODES = pytest.mark.parametrize("mode", [[], ["--overwrite"], ["--resume"]], ids=["plain", "overwrite", "resume"])


def tree(folder: Path) -> dict[str, bytes | str | None]:
    """Read everything in a folder: contents of files, targets of links, None for folders."""
    read = lambda path: os.readlink(path) if path.is_symlink() else None if path.is_dir() else path.read_bytes()
    return {str(path.relative_to(folder)): read(path) for path in sorted(folder.rglob("*"))}


def refused(capsys, folder: Path, *words: str) -> str:
    """Return the message with which a training in this folder is refused; check that it changes nothing."""
    before = tree(folder)
    assert status_of("--run-dir", str(folder), *words, "--max-steps", "2") == 2
    assert tree(folder) == before
    (line,) = capsys.readouterr().err.splitlines()
    return line


def steps_in(run: Path) -> list[int]:
    return [record["step"] for record in read_metrics(run / "metrics.jsonl") if "train_loss" in record]


# Other folders.


@MODES
@pytest.mark.parametrize(
    "names",
    [
        ["config.toml", "checkpoints/llama.pt"],
        ["tokenizer.json"],
        ["corpus.json"],
        ["metrics.jsonl"],
        ["loss.png"],
        ["run.json"],
        ["checkpoints"],
        ["checkpoints/step_00000100/model.safetensors"],
        ["config.toml/x"],
        ["metrics.jsonl/x"],
        ["loss.png/x"],
    ],
    ids=" ".join,
)
def test_foreign_files_with_names_of_a_run_are_refused(folder, capsys, names, mode):
    for name in names:
        (folder / "mine" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "mine" / name).write_text("[server]\nport = 1\n")
    held = names[0].removesuffix("/x").removesuffix("/model.safetensors")
    said = refused(capsys, folder / "mine", *mode)
    assert f"mine holds {held}, which no run wrote" in said or ("config.toml" in said and mode == ["--resume"])


@MODES
def test_a_recipe_is_not_a_run(folder, capsys, mode):
    """This program can read the config.toml, but did not write it."""
    (folder / "mine").mkdir()
    (folder / "mine/config.toml").write_text("[model]\nn_layer = 1\n")
    refused(capsys, folder / "mine", *mode)


@MODES
def test_an_export_is_not_a_run(run, capsys, mode):
    from gpt.interop.export import Arguments, main

    assert main(Arguments(run, run.parent / "exported")) == 0
    capsys.readouterr()
    assert "exported holds tokenizer.json" in refused(capsys, run.parent / "exported", *mode)


@MODES
def test_foreign_checkpoints_are_not_a_run_and_stay(folder, mode):
    (folder / "run/checkpoints/step_00000001").mkdir(parents=True)
    for name in ("llama.pt", "step_00000001/pytorch_model.bin", ".mine.tmp", "step_1"):
        (folder / "run/checkpoints" / name).write_text("x")
    before = tree(folder / "run")
    assert status_of(*mode, "--max-steps", "1") == 0
    assert before.items() <= tree(folder / "run").items()
    assert verify(newest_checkpoint(folder / "run/checkpoints")) is None


@pytest.mark.parametrize("place", ["/", "~", ".", "..", "gpt", "kernels/x", ".git"])
@MODES
def test_folders_that_a_run_would_litter_are_refused(folder, capsys, monkeypatch, place, mode):
    """The root directory, the home folder, this program's folder, its parent, and its source."""
    program = Path(run_files.__file__).parents[1]
    monkeypatch.setenv("HOME", str(folder / "home"))
    (folder / "home").mkdir()
    place = os.path.normpath(os.path.join(program, os.path.expanduser(place)))
    names = set(os.listdir(place)) if os.path.isdir(place) else None
    assert status_of("--run-dir", place, "--max-steps", "1", *mode) == 2
    assert f"{os.path.realpath(place)} is not a folder for a run" in capsys.readouterr().err
    assert names is None or set(os.listdir(place)) == names


def test_the_working_directory_can_be_a_run_directory(folder, monkeypatch):
    (folder / "new").mkdir()
    monkeypatch.chdir(folder / "new")
    Path("notes.txt").write_text("mine")
    words = ["--run-dir", ".", "--corpus", "../text.txt", "--max-steps"]
    for more in (["1"], ["2", "--resume"], ["1", "--overwrite"]):
        assert status_of(*words, *more) == 0
    assert Path("notes.txt").read_text() == "mine" and steps_in(Path()) == [1]


# Overwriting a run.


def test_overwrite_deletes_the_runs_files_and_keeps_the_users(run):
    mine = ["notes.txt", "checkpoints/notes.txt", f"checkpoints/{NEWEST}/notes.txt", "checkpoints/.mine.tmp/x"]
    mine += ["checkpoints/.step_1.tmp", "checkpoints/step_00000002.bak/x", "profile.txt", "wandb/offline-run-1/x"]
    for name in mine:
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text("mine")
    (run / "checkpoints/.step_00000009.123.tmp").mkdir()
    (run / "checkpoints/.step_00000009.123.tmp/model.safetensors").write_text("killed")
    assert status_of("--overwrite", "--max-steps", "4", "--seed", "1") == 0
    assert all((run / name).read_text() == "mine" for name in mine)
    assert steps_in(run) == [4] and json.loads((run / RECORD).read_text())["files"] == sorted(FILES)
    found = list_checkpoints(run / "checkpoints")
    assert [path.name for path in found] == [NEWEST, "best_00000004", OLDER]
    assert not any(map(verify, found))
    assert not (run / "checkpoints/.step_00000009.123.tmp").exists()


def test_pruning_keeps_the_users_files(run):
    (run / "checkpoints" / OLDER / "notes.txt").write_text("mine")
    assert status_of("--resume", "--max-steps", "8") == 0
    assert tree(run / "checkpoints" / OLDER) == {"notes.txt": b"mine"}
    assert OLDER not in {path.name for path in list_checkpoints(run / "checkpoints")}


@MODES
@pytest.mark.parametrize("name", [*FILES, RECORD])
def test_a_folder_with_the_name_of_a_file_is_refused(run, capsys, name, mode):
    old(run) if name == RECORD else (run / name).unlink()
    (run / name).mkdir()
    (run / name / "mine").write_text("x")
    said = refused(capsys, run, *mode)
    assert f"run holds {name}, which no run wrote here" in said or (name == FILES[0] and mode == ["--resume"])


@pytest.mark.parametrize("name", ["config.toml", "tokenizer.json", "corpus.json", "metrics.jsonl", "loss.png"])
def test_a_replaced_file_of_a_run_is_not_deleted(run, capsys, name):
    (run / name).write_text('{"name": "mine"}')
    assert f"run holds {name}, which no run wrote here" in refused(capsys, run, "--overwrite")


def test_a_users_profile_is_not_overwritten(run, capsys):
    (run / "profile.txt").write_text("mine")
    for mode in ("--resume", "--overwrite"):
        assert "run holds profile.txt, which no run wrote" in refused(capsys, run, mode, "--profile-steps", "1")


def test_run_json_lists_only_files_of_runs(run):
    """A run from someone else must not choose what --overwrite deletes."""
    (run.parent / "mine").write_text("x")
    names = ["../mine", "/mine", str(run.parent / "mine"), "notes.txt", *FILES]
    (run / RECORD).write_text(json.dumps({"files": names}))
    (run / "notes.txt").write_text("x")
    assert RunFiles(run).own == set(FILES) and RunFiles(run, traces=True).own == set(FILES)
    assert status_of("--overwrite", "--max-steps", "1") == 0
    assert (run.parent / "mine").exists() and (run / "notes.txt").exists()


@pytest.mark.parametrize(
    "gone", [*FILES, "checkpoints", "checkpoints/" + NEWEST, f"checkpoints/{NEWEST}/manifest.json"]
)
def test_a_partly_deleted_run_can_be_overwritten(run, gone):
    shutil.rmtree(run / gone) if (run / gone).is_dir() else (run / gone).unlink()
    assert status_of("--overwrite", "--max-steps", "1") == 0
    assert steps_in(run) == [1]
    assert {path.name for path in list_checkpoints(run / "checkpoints")} == {"step_00000001", "best_00000001"}


def dying(function, left):
    """Wrap the function so that it is killed when the countdown ends."""

    def call(*words):
        next(left)
        return function(*words)

    return call


def test_a_killed_overwrite_can_be_repeated(run, monkeypatch):
    """It is killed before its first change to the folder, then before its second, up to the last."""
    for number in range(100):
        copy = run.parent / f"copy{number}"
        shutil.copytree(run, copy)
        files = RunFiles(copy)
        files.record()
        left = iter(range(number))
        with monkeypatch.context() as patch:
            for name in ("unlink", "rename", "rmdir"):
                patch.setattr(os, name, dying(getattr(os, name), left))
            try:
                files.delete()
                break
            except StopIteration:
                pass
        files = RunFiles(copy)
        files.check(resuming=False, deleting=True)
        files.delete()
        assert tree(copy).keys() == {RECORD, ".lock", "checkpoints"}
    assert 10 < number < 99


@pytest.mark.parametrize("name", ["checkpoints", f"checkpoints/{OLDER}"])
def test_overwrite_finds_read_only_folders_before_it_deletes(run, capsys, monkeypatch, name):
    """Root can write to every folder, so os.access is replaced."""
    real = os.access
    monkeypatch.setattr(os, "access", lambda place, mode: Path(place) != run / name and real(place, mode))
    assert f"cannot delete {run}/checkpoints" in refused(capsys, run, "--overwrite")


def test_overwrite_finds_links_into_read_only_folders_before_it_deletes(run, capsys, monkeypatch):
    disk = run.parent / "disk"
    disk.mkdir()
    (run / "loss.png").rename(disk / "loss.png")
    (run / "loss.png").symlink_to(disk / "loss.png")
    real = os.access
    monkeypatch.setattr(os, "access", lambda place, mode: Path(place) != disk and real(place, mode))
    assert f"cannot delete {disk}/loss.png: its folder is read-only; nothing was deleted" in (
        refused(capsys, run, "--overwrite")
    )


def test_hard_links_keep_their_content(run):
    """A backup of hard links survives a resume that truncates the metrics, and an overwrite."""
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "of": "a course that was left"}\n')
    shutil.copytree(run, run.parent / "backup", copy_function=os.link)
    before = tree(run.parent / "backup")
    assert status_of("--resume", "--max-steps", "6") == 0
    assert tree(run.parent / "backup") == before
    assert status_of("--overwrite", "--max-steps", "1") == 0
    assert tree(run.parent / "backup") == before


# Runs older than run.json.


def old(run: Path, *gone: str) -> None:
    for name in (RECORD, *gone):
        (run / name).unlink()


@pytest.mark.parametrize("gone", [[], ["corpus.json"], ["metrics.jsonl", "loss.png"]], ids=" ".join)
def test_a_run_without_run_json_is_recognised_and_gets_one(run, gone):
    old(run, *gone)
    (run / "profile.txt").write_text("mine")
    shutil.copytree(run, run.parent / "other")
    assert status_of("--resume", "--max-steps", "6") == 0
    assert json.loads((run / RECORD).read_text()) == {"format": 1, "files": sorted(FILES)}
    assert status_of("--run-dir", "other", "--overwrite", "--max-steps", "1") == 0
    assert steps_in(run.parent / "other") == [1] and (run.parent / "other/profile.txt").read_text() == "mine"


def test_a_run_without_run_json_owns_its_traces_if_it_was_profiled(run):
    old(run)
    text = (run / "config.toml").read_text()
    (run / "config.toml").write_text(text.replace("profile_steps = 0", "profile_steps = 2"))
    assert RunFiles(run).is_run and not RunFiles(run).own & {*TRACES}
    for name, content in zip(TRACES, (b"\x1f\x8b", b"table"), strict=True):
        (run / name).write_bytes(content)
    assert RunFiles(run).own == {*FILES, *TRACES}


@pytest.mark.parametrize("gone", ["config.toml", "tokenizer.json", "corpus.json checkpoints"])
def test_an_incomplete_run_without_run_json_is_not_deleted(run, capsys, gone):
    old(run)
    for name in gone.split():
        shutil.rmtree(run / name) if (run / name).is_dir() else (run / name).unlink()
    for mode in ([], ["--overwrite"], ["--resume"]):
        assert "which no run wrote here" in refused(capsys, run, *mode)


def test_a_damaged_run_json_is_ignored(run, capsys):
    (run / RECORD).write_text('{"files": "config.toml"}')
    assert status_of("--resume", "--max-steps", "6") == 0
    assert json.loads((run / RECORD).read_text())["files"] == sorted(FILES)


# Links.


LINKED = ["run", "run/checkpoints", *(f"run/{name}" for name in FILES)]


@pytest.mark.parametrize("name", LINKED)
def test_links_are_followed_and_kept(run, capsys, name):
    """Resume, resume from a named checkpoint, evaluation, sampling and overwriting through a link to another disk."""
    import gpt

    (run.parent / "disk").mkdir()
    shutil.move(run.parent / name, run.parent / "disk")
    link = run.parent / name
    link.symlink_to(run.parent / "disk" / link.name)
    assert status_of("--resume", "--max-steps", "6") == 0
    assert status_of("--resume-from", "run/checkpoints/step_00000006", "--max-steps", "7") == 0
    assert status_of("--eval-only") == 0
    assert steps_in(run) == [2, 4, 6, 7] and gpt.load("run", "cpu")
    assert status_of("--overwrite", "--max-steps", "2") == 0
    assert link.is_symlink() and steps_in(run) == [2]
    names = {path.name for path in list_checkpoints(run / "checkpoints")}
    assert names == {"step_00000002", "best_00000002"} and (run / "loss.png").stat().st_size > 1000
    assert status_of("--overwrite", "--resume-from", "disk/checkpoints/step_00000002") == 2 or name != LINKED[1]
    assert steps_in(run) == [2] or name != LINKED[1]


@MODES
@pytest.mark.parametrize("name", ["new", "new/checkpoints", "new/loss.png"])
def test_a_dangling_link_to_a_folder_is_refused(folder, capsys, name, mode):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).symlink_to(folder / "no/where")
    assert f"{name} is a link to {folder}/no/where, which does not exist" in refused(capsys, folder / "new", *mode)


def test_a_dangling_link_to_a_file_is_written_through(folder):
    (folder / "run").mkdir()
    for name in FILES:
        (folder / "run" / name).symlink_to(folder / f"scratch_{name}")
    assert status_of("--max-steps", "1") == 0
    assert all((folder / f"scratch_{name}").stat().st_size and (folder / "run" / name).is_symlink() for name in FILES)


@pytest.mark.parametrize("name", ["checkpoints", "tokenizer.json"])
def test_a_link_into_another_run_is_refused(run, capsys, name):
    shutil.copytree(run, run.parent / "other")
    shutil.rmtree(run / name) if name == "checkpoints" else (run / name).unlink()
    (run / name).symlink_to(run.parent / "other" / name)
    before = tree(run.parent / "other")
    for mode in ("--overwrite", "--resume"):
        assert f"run/{name} is a link into another run" in refused(capsys, run, mode)
    assert tree(run.parent / "other") == before


def test_overwrite_deletes_a_link_to_a_checkpoint_not_its_target(run):
    shutil.move(run / "checkpoints" / OLDER, run.parent / "archive")
    (run / "checkpoints" / OLDER).symlink_to(run.parent / "archive")
    assert status_of("--overwrite", "--max-steps", "1") == 0
    assert not (run / "checkpoints" / OLDER).is_symlink() and verify(run.parent / "archive") is None


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "marked"])
@pytest.mark.parametrize(
    ("content", "own"), [(b'{"step": 1', True), (b'{"st', True), (b"", True), (b'{"step":1', False)]
)
def test_a_metrics_file_is_recognised_by_its_first_bytes(tmp_path, content, own, mark):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(mark + content)
    assert is_run_file(path) == (content != b'{"step":1')


def test_the_table_names_every_file_of_a_run_and_its_writer(folder):
    """Uses --profile-steps, which starts to trace after three steps."""
    assert status_of("--max-steps", "5", "--profile-steps", "1", "--ema-decay", "0.5") == 0
    found = {path.relative_to(folder / "run") for path in (folder / "run").rglob("*") if path.is_file()}
    checkpoints = {path for path in found if path.parts[0] == CHECKPOINTS}
    assert {path.name for path in checkpoints} == CHECKPOINT_FILES
    assert {path.name for path in found - checkpoints} == {LOCK, *(row.name for row in TABLE)}
    for row in TABLE:
        assert is_run_file(folder / "run" / row.name)
        constant = next(name for name, value in vars(layout).items() if value == row.name)
        source = Path(importlib.import_module(row.writer).__file__).read_text()
        assert constant in source, f"{row.writer} does not write {row.name}"
