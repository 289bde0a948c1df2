"""What the model is shown: the conversation, kept below the length that the model can read.

Where the context crosses its threshold, long outputs of old calls move to files first, and a line
in their place names the file. Where that is not enough, the model writes one summary, and the new
context is the keep-list word for word (`rome.agent.iflow.keep`), the summary, and the newest
messages as they are. A call and its result are never separated. A summary that fails, is empty or
too long is replaced by a list of what was done: a compaction always ends, and after it the next one
waits until the context has grown again.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Literal, Protocol

from rome.agent.iflow import events as ev
from rome.agent.iflow.conversation import Conversation, Entry
from rome.agent.iflow.event_log import EventLog
from rome.agent.iflow.keep import (
    HEAD,
    INSTRUCTION,
    SUMMARY,
    describe_steps,
    keep_list,
    last_request,
    transcript,
)
from rome.agent.iflow.models.model import Messages, Model, ModelError, Schemas
from rome.agent.iflow.places.workspace import Workspace, WorkspaceError
from rome.agent.iflow.specs.hooks import HookOutcome
from rome.agent.messages import Message

Trigger = Literal["threshold", "overflow", "user"]
Store = Callable[[str, str], Awaitable[str]]  # name and text of a file -> its path, for the model
THRESHOLD = 0.8  # share of the model's context at which it is made shorter
# Shares of the threshold: that moving outputs must reach, else a summary is written too; that the
# newest messages fill, which stay as they are; by which the context must grow until the next time.
TARGET = 0.6
RECENT = 0.25
GROWTH = 0.15
MOVED_TOKENS = 200  # outputs of fewer stay
SUMMARY_TOKENS = 2000
SUMMARY_SECONDS = 180.0
MAX_WATCHED = 20  # files that were read, whose changes are noticed; the newest ones
MAX_REQUEST_SHARE = 0.2  # of the context, for the user's last request; a longer one is in a file
CHARACTERS = 3  # a token has at least so many, for bounds that need no tokenizer


class Managed(Protocol):
    """The agent whose context it is, `rome.agent.iflow.parts.Parts`."""

    conversation: Conversation
    model: Model
    log: EventLog
    workspace: Workspace

    def schemas(self) -> list[dict[str, Any]]:
        """Return the schemas of its tools."""

    async def run_hooks(
        self, event: str, payload: dict[str, Any], *, matcher: str = ""
    ) -> HookOutcome:
        """Run the user's hooks of an event."""


class ContextManager:
    """Keeps the context of one agent short enough.

    Args:
      threshold: share of the model's context at which it is made shorter.
      store: keeps an output as a file that the model can read; None: outputs stay where they are.
      keep: writes the keep-list of a conversation.
    """

    def __init__(
        self,
        threshold: float = THRESHOLD,
        *,
        store: Store | None = None,
        keep: Callable[[Conversation, str, str], str] = keep_list,
    ) -> None:
        if not 0 < threshold < 1:
            raise ValueError(f"threshold={threshold} is no share of the context; choose as 0.8")
        self._threshold = threshold
        self._store = store
        self._keep = keep
        self._noticed: dict[str, tuple[int, float] | None] = {}
        self._ratio = 1.0  # the model's own count of tokens, by the estimate
        self._floor = 0  # tokens that the last shortening left
        self._is_estimate = False  # whether the model has not counted them yet

    async def prepare(self, agent: Managed) -> list[Message]:
        """Return what the model is shown now; make it shorter first where it is too long."""
        await self._notice_changes(agent)
        tokens = self._count(agent)
        limit = self._limit(agent)
        answer = _last_counted_answer(agent.log.events)
        if self._is_estimate and answer is not None:
            self._floor = answer.usage.prompt
            self._is_estimate = False
        self._floor = min(self._floor, tokens)  # there may have been a rewind
        if tokens >= max(limit, self._floor + GROWTH * limit):
            await self.compact(agent, "threshold")
        return list(agent.conversation.messages)

    async def compact(self, agent: Managed, trigger: Trigger = "user", *, focus: str = "") -> None:
        """Make the context shorter; it never fails.

        Args:
          agent: all its calls have their results.
          trigger: the threshold was crossed, the model refused the conversation as too long, or the
            user asks for it.
          focus: what the summary should keep above all, in the user's words.
        """
        tokens = self._count(agent)
        if _last_counted_answer(agent.log.events) is not None:
            estimate = agent.model.count_tokens(agent.conversation.messages, agent.schemas())
            self._ratio = min(max(tokens / estimate, 0.5), 2.0) if estimate else 1.0
        payload = {"trigger": trigger, "tokens": tokens}
        hooked = await agent.run_hooks("PreCompact", payload, matcher=trigger)
        if hooked.decision == "block" and trigger != "overflow":
            self._floor = tokens
            return
        await self._move_outputs(agent, tokens, trigger)
        left = self._count(agent)
        if trigger != "threshold" or left > TARGET * self._limit(agent):
            focus = "\n".join(filter(None, [focus, hooked.context]))
            left = await self._summarise(agent, trigger, focus, tokens)
        self._floor = left
        self._is_estimate = True
        await agent.run_hooks("PostCompact", payload | {"tokens": left}, matcher=trigger)

    def _limit(self, agent: Managed) -> float:
        """Return the tokens from which on the context is made shorter."""
        return self._threshold * agent.model.context_tokens

    def _count(self, agent: Managed) -> int:
        """Return the tokens of the context: the model's own count, and an estimate of what is new.

        The model's count is that of its last answer, as long as the context only grew since.
        """
        conversation = agent.conversation
        answer = _last_counted_answer(agent.log.events)
        if answer is None:
            return self._estimate(agent, conversation.messages, agent.schemas())
        new = [entry.message for entry in conversation.entries if _follows(entry, answer.number)]
        counted = answer.usage.prompt + answer.usage.completion
        return counted + (self._estimate(agent, new) if new else 0)

    def _estimate(self, agent: Managed, messages: Messages, schemas: Schemas = ()) -> int:
        """Return the tokens of messages as the model would count them, about."""
        return round(self._ratio * agent.model.count_tokens(messages, schemas))

    # -- outputs that move to files

    async def _move_outputs(self, agent: Managed, tokens: int, trigger: Trigger) -> None:
        """Move long outputs of old calls to files, the oldest first, until the target is reached.

        Where the model refused the conversation as too long, all long outputs move.
        """
        if self._store is None:
            return
        limit = 0.0 if trigger == "overflow" else self._limit(agent)
        entries = agent.conversation.entries
        newest = _newest(entries, agent.model, RECENT * limit)
        for entry in list(entries):
            if tokens <= TARGET * limit or (newest and entry.number >= newest[0].number):
                return
            # An environment's result of a whole answer has no id.
            if entry.finished is None or entry.moved is not None or not entry.finished.call_id:
                continue
            size = self._estimate(agent, [entry.message])
            if size < MOVED_TOKENS:
                continue
            id = entry.finished.call_id
            name = re.sub(r"[^A-Za-z0-9_-]", "_", id)[:80]  # a server chose the id
            path = entry.finished.file
            try:
                path = path or await self._store(f"{name}.txt", entry.finished.output)
            except (OSError, WorkspaceError) as error:
                text = f"the output of a call could not be moved to a file: {error}"
                agent.log.append(ev.Notice(text=text, level="warning"))
                return
            agent.log.append(ev.OutputMoved(call_id=id, file=path, tokens=size))
            tokens -= size

    # -- the summary

    async def _summarise(self, agent: Managed, trigger: Trigger, focus: str, tokens: int) -> int:
        """Replace the older part of the context by a summary; return the tokens that are left."""
        conversation, model, log = agent.conversation, agent.model, agent.log
        log.append(ev.CompactionStarted(trigger=trigger, tokens=tokens))
        entries = list(conversation.entries)
        answer, fallback = await self._ask_for_summary(agent, focus)
        if answer is not None and not fallback:
            written = f"{SUMMARY}\n{answer.text.strip()}"
        else:
            written = describe_steps(entries, fallback, _summary_tokens(model) * CHARACTERS)
        request = await self._request_that_fits(conversation, model)
        history = await self._store_or_not(f"history-{len(log.events)}.txt", transcript(entries))
        facts = self._keep(conversation, request, history)
        summary = "\n\n".join(filter(None, [HEAD, facts, written]))
        system = [one for one in conversation.messages[:1] if one.role == "system"]
        after = self._estimate(agent, [*system, Message("user", summary)], agent.schemas())
        limit = self._limit(agent)
        recent = RECENT * limit / (2 if trigger == "overflow" else 1)
        room = TARGET * limit - after
        kept = _newest(entries, model, min(recent, room) / self._ratio)
        if not kept:  # the last call and its results alone may be longer than the share
            kept = _newest(_last_exchange(entries), model, room / self._ratio)
        if kept:
            after += self._estimate(agent, [entry.message for entry in kept])
        log.append(
            ev.ContextCompacted(
                summary=summary,
                kept_from=kept[0].number if kept else len(log.events),
                tokens_before=tokens,
                tokens_after=after,
                fallback=fallback,
                history=history,
                usage=ev.NO_USAGE if answer is None else answer.usage,
            )
        )
        return after

    async def _ask_for_summary(
        self, agent: Managed, focus: str
    ) -> tuple[ev.AssistantMessage | None, str]:
        """Return the model's summary, and why it is of no use; "" where it is.

        It is asked with the context as it is, so that a server has most of it in its cache.
        """
        instruction = f"{INSTRUCTION} Keep above all: {focus}" if focus else INSTRUCTION
        messages = [*agent.conversation.messages, Message("user", instruction)]
        limit = _summary_tokens(agent.model)
        try:
            async with asyncio.timeout(SUMMARY_SECONDS):
                answer = await agent.model.ask(messages, agent.schemas(), max_tokens=limit)
        except TimeoutError:
            return None, f"no answer within {SUMMARY_SECONDS:g} s"
        except ModelError as error:
            return None, f"the model gave none: {error}"
        if answer.finish == "length":
            return answer, f"it was longer than {limit} tokens"
        if not answer.text.strip():
            return answer, "the model answered with a call" if answer.tool_calls else "it was empty"
        return answer, ""

    async def _store_or_not(self, name: str, text: str) -> str:
        """Write a text to a file and return its path; "" where none can be written."""
        if self._store is not None:
            with contextlib.suppress(OSError, WorkspaceError):
                return await self._store(name, text)
        return ""

    async def _request_that_fits(self, conversation: Conversation, model: Model) -> str:
        """Return the user's last request; where it is very long, its ends and the name of a file.

        A request that fills the context would leave no room for the work.
        """
        request = last_request(conversation)
        limit = MAX_REQUEST_SHARE * model.context_tokens
        if len(request) < limit or model.count_tokens([Message("user", request)]) <= limit:
            return request
        name = f"request-{conversation.requests[-1].number}.txt"
        file = await self._store_or_not(name, request)
        half = round(limit * CHARACTERS / 4)
        place = f"in the file {file}" if file else "left out"
        middle = f"[... {len(request) - 2 * half} characters {place} ...]"
        return f"{request[:half]}\n{middle}\n{request[-half:]}"

    # -- reminders

    async def _notice_changes(self, agent: Managed) -> None:
        """Tell the model of files that changed since it saw them, once for each change."""
        found = []
        watched = list(agent.conversation.read_files.items())[-MAX_WATCHED:]
        stats = (agent.workspace.stat(path) for path, _ in watched)
        for (path, seen), now in zip(
            watched, await asyncio.gather(*stats, return_exceptions=True), strict=True
        ):
            if isinstance(now, (OSError, WorkspaceError)):
                continue
            if isinstance(now, BaseException):
                raise now
            if now != seen and self._noticed.get(path, seen) != now:
                found.append(f"{path} was deleted" if now is None else f"{path} was changed")
            self._noticed[path] = now
        if found:
            text = "Since you last read them, outside of your file tools: " + "; ".join(found) + "."
            agent.log.append(ev.UserMessage(text=text, source="reminder"))


def _summary_tokens(model: Model) -> int:
    return min(SUMMARY_TOKENS, model.context_tokens // 8)


def _newest(entries: Sequence[Entry], model: Model, tokens: float) -> list[Entry]:
    """Return the newest entries of at most so many tokens; a call stays with its results."""
    start = len(entries)
    for place in range(len(entries) - 1, -1, -1):
        entry = entries[place]
        if entry.source == "summary":
            break
        tokens -= model.count_tokens([entry.message])
        if tokens < 0:
            break
        if entry.call is None:
            start = place
    return list(entries[start:])


def _last_exchange(entries: Sequence[Entry]) -> list[Entry]:
    """Return the newest message that is no result, and the results after it."""
    starts = [place for place, entry in enumerate(entries) if entry.call is None]
    return list(entries[starts[-1] :]) if starts else []


def _follows(entry: Entry, answer: int) -> bool:
    """Return whether an entry came after an answer; a result has the number of its answer."""
    return entry.number > answer or (entry.number == answer and entry.call is not None)


def _last_counted_answer(events: Sequence[ev.Event]) -> ev.AssistantMessage | None:
    """Return the newest answer whose tokens are still those of the context; None for none."""
    for event in reversed(events):
        if isinstance(event, (ev.ContextCompacted, ev.OutputMoved, ev.Rewound)):
            return None
        if isinstance(event, ev.AssistantMessage) and event.usage.prompt:
            return event
    return None
