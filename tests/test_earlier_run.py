"""A run that an earlier version wrote is evaluated, sampled from and resumed by this one (tests/earlier_run).

It was trained for 6 steps on tests/earlier_run/text.txt, in float32, and saved at steps 3 and 6.
"""

import shutil
from pathlib import Path

import pytest

from gpt.run.metrics import read_metrics
from tests.commands import MAINS

pytestmark = pytest.mark.numeric
KEPT = Path(__file__).parent / "earlier_run"


@pytest.fixture
def earlier(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(shutil.copytree(KEPT, tmp_path / "kept"))
    return Path(shutil.copytree(KEPT, "run"))


def val_loss(run_dir: Path, step: int) -> float:
    return next(r["val_loss"] for r in read_metrics(run_dir / "metrics.jsonl") if r["step"] == step and "val_loss" in r)


def test_an_earlier_run_is_evaluated_and_sampled(earlier, capsys):
    assert MAINS["train"](["--run-dir", "run", "--eval-only", "--device", "cpu"]) == 0
    assert f"step 6: validation loss {val_loss(earlier, 6):.4f} nats" in capsys.readouterr().out
    assert MAINS["sample"](["run", "--prompt", "It was", "--max-new-tokens", "8", "--device", "cpu"]) == 0
    assert len(capsys.readouterr().out.strip()) >= len("It was")


def test_an_earlier_run_resumes_to_the_same_result(earlier):
    """But for rounding, which depends on the order of sums on this processor."""
    words = ["run/config.toml", "--resume-from", "run/checkpoints/step_00000003", "--run-dir", "again"]
    assert MAINS["train"](words) == 0
    assert val_loss(Path("again"), 6) == pytest.approx(val_loss(earlier, 6), rel=1e-4)
    assert abs(val_loss(earlier, 6) / val_loss(earlier, 3) - 1) > 1e-2
