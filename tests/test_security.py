"""Downloaded files are read and never executed: poisoned checkpoints, tokenizers and token files are refused."""

import ast
import contextlib
import json
import pickle
import shutil
import struct
from pathlib import Path

import pytest
import torch

import gpt
from gpt.data.token_files import MAGIC, read_tokens
from gpt.data.tokenizers import ByteTokenizer, load_tokenizer
from gpt.errors import UserError
from tests.run_checks import NEWEST, OLDER, reseal, status_of

ROOT = Path(__file__).parents[1]


class Poison:
    """An object that creates the file "ran" when unpickled."""

    def __reduce__(self):
        return (Path.touch, (Path("ran"),))


@pytest.fixture
def run(run) -> Path:
    """A copy of a run with one checkpoint."""
    shutil.rmtree(run / "checkpoints" / OLDER)
    return Path("run")


def torch_file() -> bytes:
    torch.save({"weight": Poison()}, "poison.pt")
    return Path("poison.pt").read_bytes()


def header(length: int, text: bytes) -> bytes:
    return struct.pack("<Q", length) + text


POISONS = {
    "pickle": lambda: pickle.dumps(Poison()),
    "torch-save": torch_file,
    "huge-header": lambda: header(1 << 62, b"{}"),
    "header-is-not-json": lambda: header(2, b"\x80\x04"),
    "offsets-beyond-the-file": lambda: header(
        67, b'{"embed.weight":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}'.ljust(67)
    ),
    "empty": lambda: b"",
}


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
def test_a_poisoned_checkpoint_with_correct_checksums_is_refused(run, capsys, name, poison):
    checkpoint = run / "checkpoints" / NEWEST
    (checkpoint / name).write_bytes(POISONS[poison]())
    reseal(checkpoint)
    assert status_of("--resume", "--max-steps", "5") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{NEWEST}/{name}" in line
    if name == "model.safetensors":
        with pytest.raises(UserError, match=name):
            gpt.load("run", "cpu")
    assert not Path("ran").exists()


def test_the_poison_works():
    with contextlib.suppress(FileNotFoundError):
        Path("ran").unlink()
    pickle.loads(pickle.dumps(Poison()))
    assert Path("ran").exists()
    Path("ran").unlink()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"step": -1}, '"step" is'),
        ({"step": 10**40}, '"step" is'),
        ({"step": True}, '"step" is'),
        ({"loader": {"epoch": "0"}}, '"loader" is'),
        ({"loader": []}, '"loader" is'),
        ({"loader": {"corpora": [{"corpora": []}]}}, '"loader" is'),
        ({"loader": {"packing": 3}}, '"loader" is'),
        ({"loader": {"seed": 1337, "seq_len": 16, "tokens": 2203}}, "data position is invalid"),
        ({"loader": {}}, "data order has seed None"),
        ({"scaler": {"scale": float("nan")}}, '"scaler" is'),
        ({"best": {"val_loss": "low"}}, '"best" is'),
        ({"metrics_bytes": -5}, '"metrics_bytes" is'),
        ({"recipe": 3}, '"recipe" is'),
        ({"wandb_id": 3}, '"wandb_id" is'),
    ],
    ids=lambda value: json.dumps(value)[:30] if isinstance(value, dict) else "",
)
def test_a_state_with_wrong_values_is_refused(run, capsys, changes, message):
    path = run / "checkpoints" / NEWEST / "state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    reseal(path.parent)
    assert status_of("--resume", "--max-steps", "5") == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["../../../text.txt", "/etc/passwd", "sub/x"])
def test_a_manifest_that_names_other_files_is_refused(run, capsys, name):
    path = run / "checkpoints" / NEWEST / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: {"bytes": 1, "sha256": "0"}}))
    assert status_of("--resume", "--max-steps", "5") == 2
    assert "manifest.json is not a manifest" in capsys.readouterr().err


@pytest.mark.parametrize(
    "form",
    [
        {"kind": "char", "characters": "ab" * 10, "document_token": False},
        {"kind": "char", "characters": "ab\ud800"[::1], "document_token": False},
        {"kind": "bpe", "name": "x", "pattern": "(", "tokens": [], "special_tokens": {}},
        {"kind": "bpe", "name": "x", "pattern": "a", "tokens": ["AA=="] * 3, "special_tokens": {}},
        {"kind": "__import__('os').system('touch ran')"},
    ],
    ids=["repeated", "surrogate", "pattern", "twice", "code"],
)
def test_a_wrong_tokenizer_file_is_refused(tmp_path, form):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({"format": "gpt-tokenizer", "version": 1} | form))
    with pytest.raises(UserError, match=r"tokenizer\.json is not a tokenizer"):
        load_tokenizer(path)


@pytest.mark.parametrize("tokens", [1 << 63, (1 << 64) - 1, 1 << 40])
def test_a_token_file_shorter_than_its_header_says_is_refused(tmp_path, tokens):
    path = tmp_path / "train.tokens"
    fingerprint = bytes.fromhex(ByteTokenizer().fingerprint)
    path.write_bytes(struct.pack("<8sIIQ32s32s", MAGIC, 1, 2, tokens, fingerprint, bytes(32)).ljust(128, b"\0") + b"ab")
    with pytest.raises(UserError, match=rf"train\.tokens is damaged: .* cannot hold its {tokens} tokens"):
        read_tokens(path, ByteTokenizer())


CODE = [*ROOT.glob("*.py"), *ROOT.glob("gpt/**/*.py")]
RUNS_CODE = {"exec", "eval", "compile", "__import__", "pickle", "marshal", "shelve", "dill", "joblib", "runpy"}


@pytest.mark.parametrize("path", CODE, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_program_calls_nothing_that_executes_data(path):
    assert not runs_data(path.read_text())


def runs_data(source: str) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            found |= {alias.name for alias in node.names} | {getattr(node, "module", None)}
        elif isinstance(node, ast.Call):
            found.add(ast.unparse(node.func))
    return found & (RUNS_CODE | {"torch.load", "np.load", "numpy.load", "yaml.load", "os.system"})


def test_calls_that_execute_data_are_found():
    assert runs_data("import pickle\ntorch.load(x)\nexec(y)") == {"pickle", "torch.load", "exec"}
