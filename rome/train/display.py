"""The progress of a stage: a live panel in a terminal, plain lines in a log file or a notebook."""

from __future__ import annotations

import collections
import contextlib
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Protocol

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from rome.train.metrics import METRIC_FORMATS

BLOCKS = "▁▂▃▄▅▆▇█"
ASCII_BLOCKS = "_.-=+*%#"  # where the terminal's encoding lacks BLOCKS
TREND_STEPS = 24  # steps that the small curve shows and that the pace is measured over
MAX_WIDTH = 100
CELL_WIDTH = 20
MAX_COLUMNS = 4


class Summarised(Protocol):
    """An evaluation, as far as the display needs it."""

    @property
    def step(self) -> int:
        """The step that was evaluated."""

    def summary(self) -> str:
        """Return the result in one line."""


class Display:
    """Progress of one stage.

    The time left is the pace of the last steps times the steps left, plus the duration of the last
    evaluation times the evaluations left. Time spent in evaluations does not count as pace.

    Args:
      stage: the name that begins every line.
      total_steps: steps of the stage; after a resume the first `update` may be step 40 of 60.
      console: where to write; standard output by default.
      plain_interval_seconds: without a terminal, at most one line in this many seconds (and always
        one for the last step).
      quiet: shows nothing; for every process of a team but the leader.
      evaluate_every: steps between evaluations; 0: only at the end.
      may_end_early: the stage may end before `total_steps`, so the display says "at most".
    """

    def __init__(
        self,
        stage: str,
        total_steps: int,
        console: Console | None = None,
        plain_interval_seconds: float = 5.0,
        quiet: bool = False,
        evaluate_every: int = 0,
        may_end_early: bool = False,
    ) -> None:
        self.stage = stage
        self.total_steps = total_steps
        self.plain_interval_seconds = plain_interval_seconds
        self.evaluate_every = evaluate_every
        self.may_end_early = may_end_early
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
        self.metrics: dict[str, float] = {}
        self.evaluation = ""
        self._started = time.monotonic()
        # (seconds outside evaluations, step) of the last updates
        self._times: collections.deque[tuple[float, int]] = collections.deque(maxlen=TREND_STEPS)
        self._trend: collections.deque[float] = collections.deque(maxlen=TREND_STEPS)
        self._evaluation_began: float | None = None
        self._evaluation_seconds: float | None = None  # of the last one
        self._all_evaluations_seconds = 0.0
        self._printed_step: int | None = None
        self._printed_at = float("-inf")
        self._live: Live | None = None
        if self.is_live:
            self._live = Live(
                get_renderable=self._panel, console=self.console, refresh_per_second=2
            )

    def __enter__(self) -> Display:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()  # the last panel stays on the screen
        elif self.metrics and self.step != self._printed_step:
            self._print_line()

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show the metrics of a finished step, as far as METRIC_FORMATS names them.

        A second call for the same step adds to its metrics.
        """
        known = {name: float(value) for name, value in metrics.items() if name in METRIC_FORMATS}
        is_new = step != self.step
        self.step = step
        self.metrics = known if is_new else self.metrics | known
        if is_new and step > 0:  # step 0 is only an evaluation
            self._times.append((self._training_seconds(), step))
            trend = known.get("reward", known.get("loss"))
            if trend is not None:
                self._trend.append(trend)
        if self._live is None and self.metrics and step != self._printed_step and self._is_due():
            self._print_line()

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Measure an evaluation: its duration enters the time left, not the pace of the steps."""
        self._evaluation_began = time.monotonic()
        try:
            yield
        finally:
            self._evaluation_seconds = time.monotonic() - self._evaluation_began
            self._all_evaluations_seconds += self._evaluation_seconds
            self._evaluation_began = None

    def evaluated(self, result: Summarised) -> None:
        """Show the result of an evaluation: printed once, and kept in the panel."""
        self.evaluation = f"step {result.step}: {result.summary()}"
        if self._live is None:
            self._print(f"{self.stage:<5} evaluation at {self.evaluation}")

    def note(self, text: str) -> None:
        """Print one line that stays, such as a resume or a warning."""
        self._print(f"{self.stage:<5} {text}")

    def seconds_left(self) -> float | None:
        """Estimate the time left: the steps at their pace, and the evaluations as the last one.

        Returns:
          Seconds, at most if the stage may end early. None before two steps (the first one
          compiles). Evaluations count from the first one measured on; see `time_left`.
        """
        if len(self._times) < 2:
            return None
        first_time, first_step = self._times[0]
        last_time, last_step = self._times[-1]
        if first_step == last_step:
            return None
        pace = (last_time - first_time) / (last_step - first_step)
        since_last = self._training_seconds() - last_time
        seconds = max(0.0, (self.total_steps - last_step) * pace - since_last)
        if self._evaluation_seconds is not None:
            seconds += self.evaluations_left() * self._evaluation_seconds
            if self._evaluation_began is not None:
                elapsed = time.monotonic() - self._evaluation_began
                seconds += max(0.0, self._evaluation_seconds - elapsed)
        return seconds

    def evaluations_left(self) -> int:
        """Count the evaluations after the current step: the regular ones and that of the end."""
        step = self.step or 0
        if step >= self.total_steps:
            return 0
        if not self.evaluate_every:
            return 1
        regular = self.total_steps // self.evaluate_every - step // self.evaluate_every
        is_end_regular = self.total_steps % self.evaluate_every == 0
        return regular if is_end_regular else regular + 1

    def time_left(self) -> str:
        """Describe the time left for a person; empty where it is unknown or the stage has ended."""
        seconds = self.seconds_left()
        if seconds is None or (self.step or 0) >= self.total_steps:
            return ""
        text = duration(seconds)
        if self._evaluation_seconds is None:  # resumed, and none was measured since
            count = self.evaluations_left()
            text += f" and {count} evaluation{'s' if count > 1 else ''}"
        return f"at most {text}" if self.may_end_early else text

    def _training_seconds(self) -> float:
        """Return the seconds since the start that were not spent in evaluations."""
        now = time.monotonic()
        seconds = now - self._started - self._all_evaluations_seconds
        if self._evaluation_began is not None:
            seconds -= now - self._evaluation_began
        return seconds

    def _is_due(self) -> bool:
        is_last = self.step == self.total_steps
        return is_last or time.monotonic() - self._printed_at >= self.plain_interval_seconds

    def _print(self, text: str) -> None:
        # A log file's reader wraps lines, we do not.
        self.console.print(Text(text), soft_wrap=True)

    def _print_line(self) -> None:
        self._printed_step = self.step
        self._printed_at = time.monotonic()
        width = len(str(self.total_steps))
        total = f"{self.total_steps} at most" if self.may_end_early else str(self.total_steps)
        parts = [f"{self.stage:<5} {self.step:>{width}}/{total}"]
        parts += [f"{label} {text}" for label, text in self._shown_metrics()]
        left = self.time_left()
        if left:
            parts.append(f"left {left}")
        self._print("  ".join(parts))

    def _shown_metrics(self) -> list[tuple[str, str]]:
        """Return (label, text) of the metrics that a person reads, in the order of the table."""
        return [
            (known.label, known.text(self.metrics[name]))
            for name, known in METRIC_FORMATS.items()
            if name in self.metrics
        ]

    def _panel(self) -> Panel:
        rows: list[RenderableType] = [self._head()]
        if self.metrics:
            rows.append(self._metrics_grid())
        else:
            text = "starting: the first evaluation and the first step compile"
            rows.append(Text(text, style="dim"))
        if self.evaluation:
            rows.append(Text.assemble(("evaluation ", "dim"), self.evaluation))
        return Panel(
            Group(*rows),
            title=f"[bold]{self.stage}[/bold]",
            title_align="left",
            border_style="cyan",
            width=self._width(),
        )

    def _head(self) -> Table:
        """Return the row with the step, the bar and the clock."""
        step = self.step or 0
        most = "at most " if self.may_end_early else ""
        clock = f"{duration(time.monotonic() - self._started)} gone"
        left = self.time_left()
        if left:
            clock += f", {left} left"
        head = Table.grid(expand=True, padding=(0, 1))
        head.add_column(no_wrap=True)
        head.add_column(ratio=1)
        head.add_column(no_wrap=True, justify="right")
        head.add_row(
            Text(f"step {step}/{most}{self.total_steps}", style="bold"),
            ProgressBar(total=self.total_steps, completed=step),
            Text(clock, style="cyan"),
        )
        return head

    def _metrics_grid(self) -> Table:
        cells = [
            Text.assemble((f"{label} ", "dim"), (text, "bold"))
            for label, text in self._shown_metrics()
        ]
        if len(self._trend) > 1:
            cells.append(Text(sparkline(self._trend, self._blocks()), style="green"))
        fitting = (self._width() - 4) // CELL_WIDTH
        columns = max(1, min(MAX_COLUMNS, fitting))
        grid = Table.grid(expand=True, padding=(0, 2))
        for _ in range(columns):
            grid.add_column(ratio=1, no_wrap=True)
        for start in range(0, len(cells), columns):
            grid.add_row(*cells[start : start + columns])
        return grid

    def _blocks(self) -> str:
        try:
            BLOCKS.encode(self.console.encoding)
        except (UnicodeEncodeError, LookupError):
            return ASCII_BLOCKS
        return BLOCKS

    def _width(self) -> int:
        return min(self.console.width, MAX_WIDTH)


def duration(seconds: float) -> str:
    """Write a duration for a person: 12 s, 3 min 05 s, 2 h 07 min."""
    whole = round(seconds)
    minutes, rest = divmod(whole, 60)
    hours, minutes_of_hour = divmod(minutes, 60)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{minutes} min {rest:02d} s"
    return f"{hours} h {minutes_of_hour:02d} min"


def sparkline(values: Iterable[float], blocks: str = BLOCKS) -> str:
    """Draw values as a row of blocks, scaled between the least and the greatest of them."""
    values = list(values)
    low = min(values)
    span = max(values) - low
    if span == 0:
        return blocks[0] * len(values)
    top = len(blocks) - 1
    heights = [int((value - low) / span * top + 0.5) for value in values]
    return "".join(blocks[height] for height in heights)
