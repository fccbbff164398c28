"""Trace a few steps with torch.profiler: python train.py ... --profile-steps 5."""

from collections.abc import Callable
from pathlib import Path

import torch

from gpt.run.layout import PROFILE, TRACE

SKIPPED = 3  # steps before the trace, which allocate, compile and warm up


class Profiler:
    """Traces `steps` steps after the first SKIPPED into run_dir; with steps 0 does nothing.

    trace.json.gz is for chrome://tracing or Perfetto, profile.txt lists the slowest operations. Call step() at the end
    of each step; say(text) prints the table.
    """

    def __init__(self, run_dir: Path, steps: int, say: Callable[[str], None]) -> None:
        self.run_dir, self.say = run_dir, say
        self.profile = None
        if steps:
            schedule = torch.profiler.schedule(wait=SKIPPED - 1, warmup=1, active=steps, repeat=1)
            self.profile = torch.profiler.profile(schedule=schedule, on_trace_ready=self._write)
            self.profile.start()

    def step(self) -> None:
        if self.profile is not None:
            self.profile.step()

    def close(self) -> None:
        """End the trace, and write it if it is not written yet."""
        if self.profile is not None:
            self.profile.stop()
            if self.profile.step_num <= SKIPPED:
                self.say(f"no step was traced: the first {SKIPPED} steps never are")
            self.profile = None

    def _write(self, profile: torch.profiler.profile) -> None:
        if profile.step_num <= SKIPPED:
            return
        profile.export_chrome_trace(str(self.run_dir / TRACE))
        by = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        table = profile.key_averages().table(sort_by=by, row_limit=15, max_name_column_width=40)
        (self.run_dir / PROFILE).write_text(table + "\n", encoding="utf-8")
        self.say(table)
        self.say(f"trace: {self.run_dir / TRACE}, table: {self.run_dir / PROFILE}")
