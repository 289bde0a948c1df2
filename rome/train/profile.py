"""A window of steps that JAX's profiler traces, for TensorBoard, XProf or Perfetto."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

import jax


class Profile:
    """Traces the steps of a window, in this process, into a directory.

    A resumed run that begins within the window traces what is left of it. A trace that cannot be
    written is said once; the run goes on.

    Args:
      directory: that traces are written to; each start adds one.
      steps: the first and the last step, counted from 1 as in metrics.jsonl; None: none.
      note: shows a line to the user.
    """

    def __init__(
        self,
        directory: pathlib.Path,
        steps: tuple[int, int] | None = None,
        note: Callable[[str], None] = print,
    ) -> None:
        self._steps = steps
        self._directory = directory
        self._note = note
        self._is_tracing = False

    def before(self, step: int) -> None:
        """Start the trace where `step`, which begins now, is in the window."""
        if self._steps is None or self._is_tracing:
            return
        first, last = self._steps
        if first <= step <= last:
            self._is_tracing = self._try("start", lambda: jax.profiler.start_trace(self._directory))

    def after(self, step: int, result: Any) -> None:
        """End the trace where `step` was the last one of the window.

        Args:
          step: that was trained.
          result: its last array; the trace holds the devices' work up to there.
        """
        if self._is_tracing and self._steps is not None and step >= self._steps[1]:
            jax.block_until_ready(result)
            self.close()

    def close(self) -> None:
        """Write the trace of a window that is under way; it ends here."""
        if not self._is_tracing:
            return
        self._is_tracing = False
        if self._try("write", jax.profiler.stop_trace):
            self._note(f"profile: written to {self._directory}")

    def _try(self, what: str, act: Callable[[], None]) -> bool:
        """Return whether an action of the profiler succeeded; where not, profile no more."""
        try:
            act()
        except (RuntimeError, OSError, ValueError) as error:
            self._steps = None
            self._note(f"profile: could not {what} the trace in {self._directory}: {error}")
            return False
        return True
