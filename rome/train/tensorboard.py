"""TensorBoard's event files: curves for people, without which a run goes on."""

from __future__ import annotations

import contextlib
import pathlib
import sys
from collections.abc import Callable, Mapping
from typing import Any


class TensorBoard:
    """Writes the metrics of steps as events; its first failure is said once and ends it.

    Args:
      directory: of the event files.
      resume_step: later steps are hidden; None hides none.
    """

    def __init__(self, directory: pathlib.Path, resume_step: int | None) -> None:
        self._writer: Any = None
        purge_step = None if resume_step is None else resume_step + 1

        def start() -> None:
            from tensorboardX import SummaryWriter  # a third of a second; readers do without it

            self._writer = SummaryWriter(str(directory), purge_step=purge_step)

        self._attempt(start)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Write the metrics of a step."""

        def add() -> None:
            for name, value in values.items():
                self._require_worker()
                self._writer.add_scalar(name, value, step)

        self._attempt_if_open(add)

    def flush(self) -> None:
        """Write out what is buffered."""
        self._attempt_if_open(lambda: self._writer.flush())

    def close(self) -> None:
        """Close the files; a second call does nothing."""

        def end() -> None:
            self._require_worker()
            self._writer.close()

        self._attempt_if_open(end)
        self._writer = None

    def _attempt_if_open(self, action: Callable[[], None]) -> None:
        if self._writer is not None:
            self._attempt(action)

    def _attempt(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # whatever it is, metrics.jsonl is the record
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        print(
            f"warning: no TensorBoard files from here on ({type(error).__name__}: {error});"
            " metrics.jsonl has every metric",
            file=sys.stderr,
        )
        with contextlib.suppress(Exception):  # else the interpreter waits for its reader at exit
            self._events()._event_queue.cancel_join_thread()
        self._writer = None

    def _require_worker(self) -> None:
        """Raise RuntimeError where the thread that writes has died: its full queue would block."""
        if not self._events()._worker.is_alive():
            raise RuntimeError("its thread could not write")

    def _events(self) -> Any:
        return self._writer.file_writer.event_writer
