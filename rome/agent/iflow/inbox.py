"""Messages that wait until the model is asked the next time."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, Literal

from rome.agent.iflow.conversation import Conversation
from rome.agent.iflow.event_log import EventLog
from rome.agent.iflow.events import HookRan, UserMessage
from rome.agent.iflow.parts import HookOutcome, Hooks

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


class LoggedHooks:
    """The user's hooks, which say in events what they did, and in the inbox what they tell.

    Args:
      hooks: that run.
      log: of the session.
      inbox: of the agent.
      conversation: of the session.
      session: its id.
      directory: where the agent works.
    """

    def __init__(
        self,
        hooks: Hooks,
        log: EventLog,
        inbox: Inbox,
        conversation: Conversation,
        *,
        session: str,
        directory: str,
    ) -> None:
        self._hooks = hooks
        self._log = log
        self._inbox = inbox
        self._conversation = conversation
        self._session = session
        self._directory = directory

    async def run(
        self, event: str, payload: Mapping[str, Any], *, matcher: str = ""
    ) -> HookOutcome:
        """Run the hooks of an event."""
        about = {
            "hook_event_name": event,
            "session_id": self._session,
            "transcript_path": str(self._log.path or ""),
            "cwd": self._directory,
            "permission_mode": self._conversation.mode,
        }
        outcome = await self._hooks.run(event, about | dict(payload), matcher=matcher)
        for ran in outcome.ran:
            self._log.append(
                HookRan(
                    event=event,
                    command=ran.command,
                    exit_code=ran.exit_code,
                    decision=ran.decision,
                    message=ran.message,
                )
            )
        text = outcome.context
        if event == "PostToolUse" and outcome.decision == "block":
            text = "\n".join(filter(None, [outcome.message, text]))
        if text and event != "SetUpEnvironment":  # whose text joins the system text
            self._inbox.put(text, "hook")
        return outcome
