"""Where a step's time goes: python train.py ... --profile-steps 5 traces a few steps with torch.profiler."""

from collections.abc import Callable
from pathlib import Path

import torch

from gpt.run.layout import PROFILE, TRACE

SKIPPED = 3  # steps before the trace: the first ones allocate, compile and warm up


class Profiler:
    """Traces `steps` steps after the first ones into run_dir: trace.json.gz (for chrome://tracing or Perfetto) and
    profile.txt, the operations that took most time. Call step() at the end of each step; say(text) gets the table.

    With steps 0 it does nothing.
    """

    def __init__(self, run_dir: Path, steps: int, say: Callable[[str], None]) -> None:
        self.run_dir, self.say = run_dir, say
        self.profile, self.taken = None, 0
        if steps:
            schedule = torch.profiler.schedule(wait=SKIPPED - 1, warmup=1, active=steps, repeat=1)
            self.profile = torch.profiler.profile(schedule=schedule, on_trace_ready=self._write)
            self.profile.start()

    def step(self) -> None:
        if self.profile is not None:
            self.taken += 1  # first: the last step's end writes the trace
            self.profile.step()

    def close(self) -> None:
        """End the trace; what was recorded so far is written, if it was not yet."""
        if self.profile is not None:
            self.profile.stop()
            self.profile = None
            if self.taken <= SKIPPED:
                self.say(f"no step was traced: the first {SKIPPED} never are")

    def _write(self, profile: torch.profiler.profile) -> None:
        if self.taken <= SKIPPED:
            return
        profile.export_chrome_trace(str(self.run_dir / TRACE))
        by = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        table = profile.key_averages().table(sort_by=by, row_limit=15, max_name_column_width=40)
        (self.run_dir / PROFILE).write_text(table + "\n", encoding="utf-8")
        self.say(table)
        self.say(f"trace: {self.run_dir / TRACE}, table: {self.run_dir / PROFILE}")
