"""The agent and its session: what interfaces call.

The loop itself is `rome.agent.iflow.turn`. The agent knows no interface and no file but its log. An
interface listens to the log, calls `run`, `steer`, `cancel`, `rewind`, `compact` and `set_mode`,
and answers at the `desk`. The events are the only state: an agent that is made with the log of a
killed process goes on where that one was.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from rome.agent.iflow import events
from rome.agent.iflow.calls import CANCELLED, Ending
from rome.agent.iflow.conversation import events_after_a_kill
from rome.agent.iflow.events import TurnFinished
from rome.agent.iflow.models.model import Model
from rome.agent.iflow.parts import Parts
from rome.agent.iflow.tools.base import Tool
from rome.agent.iflow.turn import Turn
from rome.version import VERSION

CANCEL_SECONDS = 0.5  # for what a turn does to come to its end; then it is left behind


class AgentError(RuntimeError):
    """The agent cannot do this now; the message says why."""


class Agent(Parts):
    """An agent with its session; its members are those of `Parts`."""

    def __post_init__(self, offered: Sequence[Tool]) -> None:
        super().__post_init__(offered)
        self._is_started = False
        self._work: asyncio.Task[Ending] | None = None
        self._stopped: asyncio.Future[Ending] | None = None  # set where the turn is to end
        self._finished: asyncio.Future[None] | None = None  # set when it has
        self._stop_listening = self.log.listen(self._on_event)

    # -- what interfaces call

    @property
    def is_working(self) -> bool:
        """Return whether a turn is being played."""
        return self._work is not None

    async def start(self) -> None:
        """Begin the session, or take it up again; `run` does it where it was not done."""
        if self._is_started:
            return
        is_resumed = bool(self.conversation.session)
        for lost in events_after_a_kill(self.conversation):
            self.log.append(lost)
        setup = await self.run_hooks("SetUpEnvironment", {})
        self.log.append(
            events.SessionStarted(
                session=self.session,
                directory=self.workspace.root,
                model=self.model.name,
                mode=self.mode or self.policy.mode,
                system="\n\n".join(filter(None, [self.system, setup.context])),
                tools=tuple(self.tools),
                schemas=tuple(self.schemas()),
                agent=self.agent,
                parent=self.parent,
                version=VERSION,
                resumed=is_resumed,
            )
        )
        self._is_started = True
        self.policy.mode = self.conversation.mode
        matcher = "resume" if is_resumed else "startup"
        await self.run_hooks("SessionStart", {"source": matcher}, matcher=matcher)

    async def run(self, text: str = "") -> TurnFinished:
        """Play one turn and return how it ended; "" goes on with what is there.

        A limit, a cancellation and a model that does not answer are endings, not errors.

        Raises:
          AgentError: a turn is being played already.
        """
        if self._work is not None:
            raise AgentError("the agent is working; steer it, or cancel its turn first")
        began = time.monotonic()
        loop = asyncio.get_running_loop()
        self._stopped = loop.create_future()
        self._finished = loop.create_future()
        self._work = loop.create_task(self._play(text))
        timer = None
        seconds = self.limits.seconds
        if seconds:
            reason = f"the limit of {seconds:g} s is reached"
            timer = loop.call_later(seconds, self._stop, Ending("limit", reason))
        ending = Ending("aborted", "the program ended the turn")
        try:
            ending = await self._ending_of(self._work)
        except Exception as error:
            ending = Ending("infrastructure", f"{type(error).__name__}: {error}")
            raise
        finally:
            if timer is not None:
                timer.cancel()
            self._work.cancel()
            self._work = None
            finished = self._finish_turn(ending, time.monotonic() - began)
            self._finished.set_result(None)
        return finished

    def steer(self, text: str) -> None:
        """Tell the agent something while it works; it reads it before its next step."""
        self.inbox.put(text, "steer")

    def notify(self, text: str) -> None:
        """Tell the agent of something that the program noticed, such as a job that ended."""
        self.inbox.put(text, "notification")

    def cancel(self, reason: str = "the user cancelled the turn") -> None:
        """End the turn at once; the session stays as it is and may go on."""
        self._stop(Ending("aborted", reason))

    async def rewind(self, to: int, *, conversation: bool = True, files: bool = True) -> None:
        """Go back to before a message of the user, given by the number of its event.

        The conversation since then leaves the context, and files become what they were, where asked
        for. AgentError where the agent works, there is no such message, or no checkpoint is kept.
        """
        self._refuse_while_working("rewind it")
        if to not in [request.number for request in self.conversation.requests]:
            raise AgentError(f"event {to} is no message of the user in this conversation")
        if files:
            if not self.has_checkpoints:
                raise AgentError("this session keeps no checkpoints; rewind the conversation only")
            checkpoint = self.conversation.checkpoint_of(to)
            if checkpoint:
                await self.workspace.restore(checkpoint)
        self.log.append(events.Rewound(to=to, conversation=conversation, files=files))

    async def compact(self, focus: str = "") -> None:
        """Make the context shorter now; `focus` is what a summary should keep above all."""
        self._refuse_while_working("compact its context")
        if self.context is None:
            raise AgentError("this session does not manage its context")
        await self.context.compact(self, focus=focus)

    def set_mode(self, mode: str) -> None:
        """Change the mode of approval."""
        self.log.append(events.ModeChanged(mode=mode))

    def set_model(self, model: Model) -> None:
        """Let another model answer from the next question on; the old one is not closed."""
        self.model = model
        self.log.append(events.ModelChanged(model=model.name))

    async def aclose(self, outcome: events.Outcome = "finished") -> None:
        """End the session in order."""
        self.cancel("the session ends")
        if self._finished is not None:
            await asyncio.wait([self._finished], timeout=2 * CANCEL_SECONDS)
        try:
            if self._is_started:
                await self.run_hooks("SessionEnd", {"reason": outcome})
        finally:
            if self._is_started:
                self.log.append(events.SessionEnded(outcome=outcome))
            self._stop_listening()
            if self.owns_workspace:
                await self.workspace.aclose()

    # -- one turn

    async def _play(self, text: str) -> Ending:
        await self.start()
        return await Turn(self).play(text)

    def _on_event(self, event: events.Event) -> None:
        self.conversation.add(event)
        if isinstance(event, events.ModeChanged):
            self.policy.mode = event.mode
        elif isinstance(event, events.ContextCompacted | events.OutputMoved):
            self.edge = "compaction"
        elif isinstance(event, events.SubagentFinished):
            self.inbox.wake()
        elif isinstance(event, events.JobFinished) and event.exit_code is not None:
            self.notify(f"Background job {event.job} ended with exit code {event.exit_code}.")

    def _stop(self, ending: Ending) -> None:
        """End the turn; what it does is cancelled."""
        if self._work is not None and self._stopped is not None and not self._stopped.done():
            self._stopped.set_result(ending)
            self._work.cancel()

    async def _ending_of(self, work: asyncio.Task[Ending]) -> Ending:
        """Wait for the end of a turn; one that was stopped gets CANCEL_SECONDS to end."""
        assert self._stopped is not None
        stopped = self._stopped
        try:
            await asyncio.wait([work, stopped], return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            self._stop(Ending("aborted", "the program ended the turn"))
            await asyncio.wait([work], timeout=CANCEL_SECONDS)
            raise
        if not stopped.done():
            return (
                Ending("aborted", "the turn was cancelled") if work.cancelled() else work.result()
            )
        await asyncio.wait([work], timeout=CANCEL_SECONDS)
        if not work.done():
            text = "something that the turn ran does not end; it was left behind"
            self.log.append(events.Notice(text=text, level="warning"))
        return stopped.result()

    def _finish_turn(self, ending: Ending, seconds: float) -> TurnFinished:
        for call in list(self.conversation.open_calls):  # of what was left behind
            self.log.append(CANCELLED.finished(call))
        return self.log.append(
            TurnFinished(
                outcome=ending.outcome,
                reason=ending.reason,
                usage=self.conversation.turn_usage,
                seconds=round(seconds, 3),
            )
        )

    def _refuse_while_working(self, what: str) -> None:
        if self._work is not None:
            raise AgentError(f"the agent is working; cancel its turn before you {what}")
