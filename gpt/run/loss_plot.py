"""Plot the loss curves of a run from a bounded number of points."""

import io
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean
from typing import Any

from gpt.files import write_whole

LIMIT = 4096  # points in a curve
WINDOW = 0.05  # fraction of the points that one smoothed point averages


class Curve:
    """Values over steps in at most LIMIT points: at the limit, pairs of neighbours are averaged."""

    def __init__(self) -> None:
        self.points: list[tuple[float, float]] = []  # step, value
        self.last: tuple[float, float] | None = None
        self._per_point = 1  # values averaged in a point
        self._step = self._value = 0.0  # sums for the next point
        self._count = 0

    def add(self, step: float, value: float) -> None:
        """Append a value of a later step."""
        self.last = step, value
        self._step, self._value, self._count = self._step + step, self._value + value, self._count + 1
        if self._count < self._per_point:
            return
        self.points.append((self._step / self._count, self._value / self._count))
        self._step, self._value, self._count = 0.0, 0.0, 0
        if len(self.points) == LIMIT:
            halves = zip(self.points[::2], self.points[1::2], strict=True)
            self.points = [((a + c) / 2, (b + d) / 2) for (a, b), (c, d) in halves]
            self._per_point *= 2

    def smoothed(self) -> list[tuple[float, float]]:
        """Average each point with its neighbours, equally many on both sides, fewer at the ends."""
        reach, smooth = int(len(self.points) * WINDOW / 2), []
        for i, (step, _) in enumerate(self.points):
            before = min(reach, i)
            values = [value for _, value in self.points[i - before : i + before + 1]]
            smooth.append((step, fmean(values)))
        return smooth


class Losses:
    """Curves of the training and validation losses in a run's records."""

    def __init__(self, records: Iterable[dict[str, Any]] = ()) -> None:
        self.train, self.val = Curve(), Curve()
        for record in records:
            self.add(record)

    def add(self, record: dict[str, Any]) -> None:
        """Add the losses of a record of metrics.jsonl."""
        for curve, key in ((self.train, "train_loss"), (self.val, "val_loss")):
            if isinstance(record.get(key), int | float):
                curve.add(record["step"], record[key])


def plot_losses(losses: Losses, path: Path, title: str) -> None:
    """Plot training and validation loss over steps as a PNG; the training loss faintly, with its running mean."""
    from matplotlib.figure import Figure  # pyplot takes twice as long to import

    train, val = losses.train, losses.val
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    if train.points:
        axes.plot(*zip(*train.points, strict=True), color="tab:blue", alpha=0.25, linewidth=0.8)
        axes.plot(*zip(*train.smoothed(), strict=True), color="tab:blue", linewidth=1.8, label="training")
    if val.points:
        axes.plot(*zip(*val.points, strict=True), color="tab:orange", marker="o", markersize=4, label="validation")
        beside = {"textcoords": "offset points", "xytext": (0, 8), "ha": "right"}
        axes.annotate(f"{val.last[1]:.4f}", val.last, color="tab:orange", **beside)
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=title)
    axes.grid(alpha=0.3)
    if train.points or val.points:
        axes.legend()
    picture = io.BytesIO()
    figure.savefig(picture, dpi=120, format="png")
    write_whole(path, picture.getvalue())
