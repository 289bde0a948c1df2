"""Messages that wait until the model is asked the next time."""

from __future__ import annotations

import asyncio
from typing import Literal

from rome.agent.iflow.event_log import EventLog
from rome.agent.iflow.events import UserMessage

Source = Literal["steer", "hook", "reminder", "notification"]


class Inbox:
    """What the model is to read before its next answer.

    Args:
      log: where a message is an event once the model is about to read it.
    """

    def __init__(self, log: EventLog) -> None:
        self._log = log
        self._waiting: list[UserMessage] = []
        self._changed = asyncio.Event()

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def put(self, text: str, source: Source) -> None:
        """Let the model read something."""
        self._waiting.append(UserMessage(text=text, source=source))
        self.wake()

    def deliver(self) -> None:
        """Log what waits."""
        waiting, self._waiting = self._waiting, []
        for message in waiting:
            self._log.append(message)

    def wake(self) -> None:
        """End a wait."""
        self._changed.set()

    async def wait(self) -> None:
        """Wait until something is put in, or `wake` is called."""
        self._changed.clear()
        await self._changed.wait()
