"""metrics.jsonl, loss.png and the clock."""

import json
import subprocess
import sys
import tracemalloc
import types

import pytest

from gpt.run.loss_plot import LIMIT, Curve, Losses, plot_losses
from gpt.run.metrics import read_metrics
from gpt.training.command import load_config
from gpt.training.monitor import Monitor, process_seconds


def record(step: int, **values) -> dict:
    return {"step": step, "tokens": 10 * step, "tokens_per_second": 5.0, **values}


def monitor_in(folder, **options) -> Monitor:
    return Monitor(load_config(["--run-dir", str(folder), "--max-steps", "20"]), **options)


def test_resume_removes_later_records_and_a_truncated_line(tmp_path, capsys):
    monitor = monitor_in(tmp_path)
    for step in (1, 2, 3):
        monitor.log(record(step, train_loss=1.0 / step))
    monitor.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "train')
    monitor = monitor_in(tmp_path, start_step=2)
    monitor.log(record(3, train_loss=9.0))
    monitor.close()
    assert [(r["step"], r["train_loss"]) for r in read_metrics(tmp_path / "metrics.jsonl")] == [
        (1, 1.0),
        (2, 0.5),
        (3, 9.0),
    ]


def test_a_pipe_gets_plain_lines_without_control_characters(tmp_path, capsys):
    monitor = monitor_in(tmp_path)
    monitor.log(record(10, train_loss=1.25))
    monitor.log(record(10, val_loss=1.5, bits_per_byte=2.0))
    monitor.say("[bold]as it is[/bold] :smile:")
    monitor.close()
    output = capsys.readouterr().out
    assert "step 10/20: loss 1.2500" in output
    assert "step 10: validation loss 1.5000 nats per token, 2.0000 bits per byte" in output
    assert "[bold]as it is[/bold] :smile:" in output
    assert "\x1b" not in output


def test_the_plot_shows_both_losses(tmp_path):
    from matplotlib import image

    records = [record(step, train_loss=3.0 / step) for step in range(1, 50)]
    plot_losses(Losses(records), tmp_path / "train.png", "run")
    plot_losses(Losses([*records, record(49, val_loss=1.0)]), tmp_path / "both.png", "run")
    train, both = (image.imread(tmp_path / name)[..., :3] for name in ("train.png", "both.png"))
    assert train.shape == both.shape == (540, 960, 3)
    orange = lambda picture: ((abs(picture - [1.0, 0.498, 0.055])).sum(-1) < 0.05).sum()
    assert orange(train) == 0
    assert orange(both) > 20
    assert not list(tmp_path.glob("*tmp*"))


def test_the_plot_names_its_curves(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    named, legend = [], Axes.legend
    monkeypatch.setattr(Axes, "legend", lambda axes: named.append(axes.get_legend_handles_labels()[1]) or legend(axes))
    plot_losses(Losses([record(1, train_loss=3.0), record(2, val_loss=1.0)]), tmp_path / "both.png", "run")
    plot_losses(Losses([record(2, val_loss=1.0)]), tmp_path / "val.png", "run")
    plot_losses(Losses([]), tmp_path / "none.png", "run")
    assert named == [["training", "validation"], ["validation"]]


def test_the_plot_draws_the_smoothed_curve_in_front_of_single_steps(tmp_path):
    """For a jumping loss, almost all dark blue pixels are on the line of the mean."""
    from matplotlib import image

    losses = Losses(record(step, train_loss=2.0 + (-1) ** step) for step in range(400))
    assert all(abs(loss - 2.0) < 1 / 10.9 for _, loss in losses.train.smoothed()[10:])  # means of 11 to 21
    plot_losses(losses, tmp_path / "loss.png", "run")
    picture = image.imread(tmp_path / "loss.png")[..., :3]
    strong = abs(picture - [31 / 255, 119 / 255, 180 / 255]).sum(-1) < 0.05
    rows = strong[:, 200:600].sum(1)  # behind the first steps, left of the legend
    assert rows.max() > 300 and 3 <= (rows > 0).sum() < 40  # of 450


def test_a_curve_averages_its_points_at_the_limit():
    curve, few = Curve(), Curve()
    for step in range(3 * LIMIT + 1):
        curve.add(step, float(step % 7))
    assert LIMIT / 2 <= len(curve.points) < LIMIT
    assert curve.points[0] == (1.5, 1.5)  # of four steps
    assert curve.last == (3 * LIMIT, float(3 * LIMIT % 7))
    for step, value in ((0, 5.0), (10, 1.0), (20, 3.0)):
        few.add(step, value)
    assert few.points == few.smoothed() == [(0, 5.0), (10, 1.0), (20, 3.0)]


def test_the_smoothed_curve_is_the_mean_of_a_twentieth_of_the_points():
    curve = Curve()
    for step in range(100):
        curve.add(step, float(step**2))
    smooth = dict(curve.smoothed())
    assert smooth[0] == 0.0 and smooth[1] == pytest.approx((0 + 1 + 4) / 3)
    assert smooth[50] == pytest.approx(sum(n**2 for n in range(48, 53)) / 5)
    assert smooth[99] == pytest.approx((97**2 + 98**2 + 99**2) / 3)


def test_memory_does_not_grow_with_the_records(tmp_path, capsys):
    """During the run and when it is resumed; both curves have equally many points. 20,000 records take megabytes."""
    line = json.dumps(record(1, train_loss=1.0, grad_norm=1.0, learning_rate=0.1)) + "\n"

    def peak(n: int) -> int:
        folder = tmp_path / f"{n}"
        folder.mkdir()
        (folder / "metrics.jsonl").write_text(line * n)
        tracemalloc.start()
        monitor = monitor_in(folder, start_step=1, metrics_bytes=n * len(line))
        for step in range(10):
            monitor.log(record(2 + step, train_loss=1.0))
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        monitor.close()
        assert len(read_metrics(folder / "metrics.jsonl")) == n + 10
        return peak

    peak(1)  # imports what a monitor needs
    assert peak(40_000) < peak(20_000) + 500_000


def test_shortened_metrics_are_cut_at_the_first_later_step(tmp_path, capsys):
    """The last remaining line may lack its line end."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "train_loss": 2.0}\n{"step": 2}')
    for start, kept in ((2, [1, 2]), (1, [1]), (0, [])):
        monitor_in(tmp_path, start_step=start, metrics_bytes=999).close()
        assert [r["step"] for r in read_metrics(path)] == kept
        assert path.read_bytes()[-1:] == (b"\n" if kept else b"")


def test_an_empty_run_is_plotted(tmp_path):
    plot_losses(Losses(), tmp_path / "loss.png", "run")
    assert (tmp_path / "loss.png").stat().st_size > 1000


def test_seconds_count_from_the_start_of_the_process():
    code = "import time; t = time.time(); import gpt.stop as m; print(m.process_seconds(), time.time() - t)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    since_start, since_code = map(float, done.stdout.split())
    assert since_code - 0.02 < since_start < since_code + 5
    assert process_seconds() > 0


def test_metrics_are_json_lines(tmp_path, capsys):
    monitor = monitor_in(tmp_path)
    monitor.log(record(1, train_loss=0.5))
    monitor.close()
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line).keys() == {"step", "tokens", "tokens_per_second", "train_loss", "seconds"}


def test_a_resumed_run_continues_its_wandb_run(tmp_path, capsys, monkeypatch):
    calls = []

    def init(**options):
        calls.append(options)
        return types.SimpleNamespace(id=options["id"] or "new1", log=lambda *_, **__: None, finish=lambda: None)

    fake = types.SimpleNamespace(init=init, Settings=dict, Error=RuntimeError)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    config = load_config(["--run-dir", str(tmp_path), "--wandb", "online"])
    first = Monitor(config)
    state = first.state()
    first.close()
    assert state == {"metrics_bytes": 0, "wandb_id": "new1"}
    Monitor(config, **state).close()
    assert [(call["id"], call["resume"]) for call in calls] == [(None, None), ("new1", "allow")]


def test_metrics_beyond_the_saved_length_are_removed(tmp_path, capsys):
    monitor = monitor_in(tmp_path)
    monitor.log(record(2, train_loss=0.5))
    length = monitor.state()["metrics_bytes"]
    monitor.log(record(1, event="a step that was left"))
    monitor.close()
    monitor = monitor_in(tmp_path, start_step=2, metrics_bytes=length)
    monitor.close()
    assert [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [2]
