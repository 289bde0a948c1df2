"""What a person sees while a stage runs: one live panel in a terminal, plain lines in a log file or
a notebook.
"""

from __future__ import annotations

import collections
import os
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from rome.train.metrics import FIGURES

if TYPE_CHECKING:
    from rome.train.report import Evaluation

BLOCKS = "▁▂▃▄▅▆▇█"
# how many past steps the little curve shows, and how many the pace is measured over
TREND_STEPS = 24


class Display:
    """Progress of one stage.

    Args:
      total_steps: steps of the stage; after a resume the first `update` may well be step 40 of 60.
      quiet: shows nothing; for all processes of a team but the leader.
      plain_interval_s: without a terminal, at most one line in this many seconds (and always one
        for the last step).
    """

    def __init__(
        self,
        stage: str,
        total_steps: int,
        console: Console | None = None,
        plain_interval_s: float = 5.0,
        quiet: bool = False,
    ) -> None:
        self.stage, self.total_steps, self.plain_interval_s = stage, total_steps, plain_interval_s
        self.console = console or Console(highlight=False, quiet=quiet)
        # A notebook gives commands a terminal that cannot move its cursor: every refresh would stay
        # there as one more panel.
        self.is_live = (
            not quiet
            and self.console.is_terminal
            and not self.console.is_dumb_terminal
            and "JPY_PARENT_PID" not in os.environ
        )
        self.step: int | None = None
        self.figures: dict[str, float] = {}
        self.evaluation = ""
        self._started = time.monotonic()
        self._times: collections.deque[tuple[float, int]] = collections.deque(maxlen=TREND_STEPS)
        self._trend: collections.deque[float] = collections.deque(maxlen=TREND_STEPS)
        self._printed_step, self._printed_at = None, float("-inf")
        self._live = (
            Live(get_renderable=self._panel, console=self.console, refresh_per_second=2)
            if self.is_live
            else None
        )

    def __enter__(self) -> Display:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()  # the last panel stays on the screen
        elif self.figures and self.step != self._printed_step:
            self._print_line()

    def update(self, step: int, figures: Mapping[str, float]) -> None:
        """Step `step` is done; those of its figures that FIGURES names are shown.

        Called again for the same step, it adds to them.
        """
        now = time.monotonic()
        known = {name: float(value) for name, value in figures.items() if name in FIGURES}
        is_new, self.step = step != self.step, step
        self.figures = known if is_new else self.figures | known
        if is_new and step > 0:  # step 0 is only an evaluation
            self._times.append((now, step))
            trend = known.get("reward", known.get("loss"))
            if trend is not None:
                self._trend.append(trend)
        due = step == self.total_steps or now - self._printed_at >= self.plain_interval_s
        if self._live is None and self.figures and step != self._printed_step and due:
            self._print_line()

    def evaluated(self, result: Evaluation) -> None:
        """An evaluation came in: said once, and kept in the panel."""
        self.evaluation = f"step {result.step}: {result.summary()}"
        if self._live is None:
            self._print(f"{self.stage:<5} evaluation at {self.evaluation}")

    def note(self, text: str) -> None:
        """One line that stays: saved, resumed, weights published, a warning."""
        self._print(f"{self.stage:<5} {text}")

    def seconds_left(self) -> float | None:
        """By the pace of the last steps; None before two of them (the first holds the compilation)."""
        if len(self._times) < 2 or self._times[-1][1] == self._times[0][1]:
            return None
        (first_time, first_step), (last_time, last_step) = self._times[0], self._times[-1]
        pace = (last_time - first_time) / (last_step - first_step)
        return max(0.0, (self.total_steps - last_step) * pace - (time.monotonic() - last_time))

    def _print(self, text: str) -> None:
        self.console.print(
            Text(text), soft_wrap=True
        )  # soft: a log file's reader wraps lines, we do not

    def _print_line(self) -> None:
        self._printed_step, self._printed_at = self.step, time.monotonic()
        width = len(str(self.total_steps))
        parts = [f"{self.stage:<5} {self.step:>{width}}/{self.total_steps}"]
        parts += [
            f"{figure.label} {figure.text(self.figures[name])}"
            for name, figure in FIGURES.items()
            if name in self.figures
        ]
        left = self.seconds_left()
        if left is not None and self.step != self.total_steps:
            parts.append(f"left {duration(left)}")
        self._print("  ".join(parts))

    def _panel(self) -> Panel:
        step = self.step or 0
        left = self.seconds_left()
        clock = f"{duration(time.monotonic() - self._started)} gone" + (
            f", {duration(left)} left" if left is not None and step < self.total_steps else ""
        )
        head = Table.grid(expand=True, padding=(0, 1))
        head.add_column(no_wrap=True)
        head.add_column(ratio=1)
        head.add_column(no_wrap=True, justify="right")
        head.add_row(
            Text(f"step {step}/{self.total_steps}", style="bold"),
            ProgressBar(total=self.total_steps, completed=step),
            Text(clock, style="cyan"),
        )
        rows = [head]
        if self.figures:
            rows.append(self._figures_grid())
        else:
            rows.append(
                Text("starting: the first evaluation and the first step compile", style="dim")
            )
        if self.evaluation:
            rows.append(Text.assemble(("evaluation ", "dim"), self.evaluation))
        return Panel(
            Group(*rows),
            title=f"[bold]{self.stage}[/bold]",
            title_align="left",
            border_style="cyan",
            width=min(self.console.width, 100),
        )

    def _figures_grid(self) -> Table:
        shown = [
            (figure.label, figure.text(self.figures[name]))
            for name, figure in FIGURES.items()
            if name in self.figures
        ]
        cells = [Text.assemble((f"{label} ", "dim"), (text, "bold")) for label, text in shown]
        if len(self._trend) > 1:
            cells.append(Text(sparkline(self._trend), style="green"))
        columns = max(1, min(4, (min(self.console.width, 100) - 4) // 20))
        grid = Table.grid(expand=True, padding=(0, 2))
        for _ in range(columns):
            grid.add_column(ratio=1, no_wrap=True)
        for start in range(0, len(cells), columns):
            grid.add_row(*cells[start : start + columns])
        return grid


def duration(seconds: float) -> str:
    """12 s, 3 min 05 s, 2 h 07 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def sparkline(values: collections.abc.Iterable[float]) -> str:
    values = list(values)
    low, span = min(values), max(values) - min(values)
    if span == 0:
        return BLOCKS[0] * len(values)
    return "".join(BLOCKS[int((value - low) / span * (len(BLOCKS) - 1) + 0.5)] for value in values)
