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
import dataclasses
import re
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Literal

from rome.agent.iflow import events as ev
from rome.agent.iflow.conversation import Conversation, Entry
from rome.agent.iflow.event_log import EventLog
from rome.agent.iflow.keep import KeepList, last_request
from rome.agent.iflow.models.model import Model, ModelError
from rome.agent.iflow.places.workspace import Workspace, WorkspaceError
from rome.agent.iflow.specs.hooks import HookOutcome
from rome.agent.iflow.summary import HEAD, INSTRUCTION, SUMMARY, describe_steps, transcript
from rome.agent.messages import Message

Trigger = Literal["threshold", "overflow", "user"]
MAX_WATCHED = 20  # files that were read, whose changes are noticed; the newest ones
MAX_REQUEST_SHARE = 0.2  # of the context, for the user's last request; a longer one is in a file
CHARACTERS = 3  # a token has at least so many, for bounds that need no tokenizer

Store = Callable[[str, str], Awaitable[str]]  # name and text of a file -> its path, for the model


@dataclasses.dataclass(frozen=True)
class ContextSettings:
    """When and how a context is made shorter.

    Attributes:
      threshold: share of the model's context at which it is made shorter; below 1.
      target: share of the threshold that moving outputs must reach; else a summary is written too.
      recent: share of the threshold that the newest messages fill, which stay as they are.
      growth: share of the threshold by which the context must grow until it is made shorter again.
      moved_tokens: outputs of fewer tokens stay.
      summary_tokens: of a summary, at most.
      summary_seconds: for a summary, at most.
    """

    threshold: float = 0.8
    target: float = 0.6
    recent: float = 0.25
    growth: float = 0.15
    moved_tokens: int = 200
    summary_tokens: int = 2000
    summary_seconds: float = 180.0

    def __post_init__(self) -> None:
        if not 0 < self.threshold < 1:
            raise ValueError(
                f"threshold={self.threshold} is no share of the context; choose one such as 0.8"
            )
        if not 0 < self.recent < self.target < 1:
            raise ValueError(
                f"recent={self.recent} and target={self.target} must be shares of the threshold"
                " that rise; choose such as 0.25 and 0.6"
            )


@dataclasses.dataclass(frozen=True)
class _Asked:
    """The context at hand, and the model that is asked with it."""

    conversation: Conversation
    model: Model
    schemas: Sequence[dict[str, Any]]
    log: EventLog


class ContextManager:
    """Keeps the context of one agent short enough.

    Args:
      settings: when and how.
      store: keeps an output as a file that the model can read; None: outputs stay where they are.
      run_hooks: runs the user's hooks around a compaction (`Parts.run_hooks`); None for none.
      workspace: whose files are watched for changes; None watches none.
      keep: the keep-list; None makes one.
    """

    def __init__(
        self,
        settings: ContextSettings | None = None,
        *,
        store: Store | None = None,
        run_hooks: Callable[..., Awaitable[HookOutcome]] | None = None,
        workspace: Workspace | None = None,
        keep: KeepList | None = None,
    ) -> None:
        self.settings = settings or ContextSettings()
        self.run_hooks = run_hooks
        self._store = store
        self._workspace = workspace
        self._keep = keep or KeepList()
        self._noticed: dict[str, tuple[int, float] | None] = {}
        self._ratio = 1.0  # the model's own count of tokens, by the estimate
        self._floor = 0  # tokens that the last shortening left
        self._is_estimate = False  # whether the model has not counted them yet

    async def prepare(
        self,
        conversation: Conversation,
        model: Model,
        schemas: Sequence[dict[str, Any]],
        log: EventLog,
    ) -> list[Message]:
        """Return what the model is shown now; make it shorter first where it is too long.

        Args:
          conversation: folds the events that are appended to `log`.
          model: will be asked.
          schemas: of its tools.
          log: of the session.
        """
        asked = _Asked(conversation, model, schemas, log)
        await self._notice_changes(asked)
        tokens = self._count(asked)
        limit = self.settings.threshold * model.context_tokens
        answer = _last_counted_answer(log.events)
        if self._is_estimate and answer is not None:
            self._floor = answer.usage.prompt
            self._is_estimate = False
        self._floor = min(self._floor, tokens)  # there may have been a rewind
        if tokens >= max(limit, self._floor + self.settings.growth * limit):
            await self.compact(conversation, model, schemas, log, trigger="threshold")
        return list(conversation.messages)

    async def compact(
        self,
        conversation: Conversation,
        model: Model,
        schemas: Sequence[dict[str, Any]],
        log: EventLog,
        trigger: Trigger = "user",
        *,
        focus: str = "",
    ) -> None:
        """Make the context shorter; it never fails.

        Args:
          conversation: as in `prepare`; all its calls have their results.
          model: whose context it is.
          schemas: of its tools.
          log: of the session.
          trigger: the threshold was crossed, the model refused the conversation as too long, or the
            user asks for it.
          focus: what the summary should keep above all, in the user's words.
        """
        asked = _Asked(conversation, model, schemas, log)
        tokens = self._count(asked)
        if _last_counted_answer(log.events) is not None:
            self._ratio = _ratio_of(tokens, model.count_tokens(conversation.messages, schemas))
        hooked = await self._run_hooks("PreCompact", trigger, tokens)
        if hooked.decision == "block" and trigger != "overflow":
            self._floor = tokens
            return
        await self._move_outputs(asked, tokens, trigger)
        left = self._count(asked)
        target = self.settings.target * self.settings.threshold * model.context_tokens
        if trigger != "threshold" or left > target:
            focus = "\n".join(filter(None, [focus, hooked.context]))
            left = await self._summarise(asked, trigger, focus, tokens)
        self._floor = left
        self._is_estimate = True
        await self._run_hooks("PostCompact", trigger, left)

    async def _run_hooks(self, event: str, trigger: Trigger, tokens: int) -> HookOutcome:
        if self.run_hooks is None:
            return HookOutcome()
        payload = {"trigger": trigger, "tokens": tokens}
        return await self.run_hooks(event, payload, matcher=trigger)

    def _count(self, asked: _Asked) -> int:
        """Return the tokens of the context: the model's own count, and an estimate of what is new.

        The model's count is that of its last answer, as long as the context only grew since.
        """
        conversation = asked.conversation
        answer = _last_counted_answer(asked.log.events)
        if answer is None:
            return self._estimate(asked, conversation.messages, asked.schemas)
        new = [entry.message for entry in conversation.entries if _follows(entry, answer.number)]
        counted = answer.usage.prompt + answer.usage.completion
        return counted + (self._estimate(asked, new) if new else 0)

    def _estimate(
        self, asked: _Asked, messages: Sequence[Message], schemas: Sequence[dict[str, Any]] = ()
    ) -> int:
        """Return the tokens of messages as the model would count them, about."""
        return round(self._ratio * asked.model.count_tokens(messages, schemas))

    # -- outputs that move to files

    async def _move_outputs(self, asked: _Asked, tokens: int, trigger: Trigger) -> None:
        """Move long outputs of old calls to files, the oldest first, until the target is reached.

        Where the model refused the conversation as too long, all long outputs move.
        """
        if self._store is None:
            return
        settings = self.settings
        is_full = trigger == "overflow"
        limit = 0.0 if is_full else settings.threshold * asked.model.context_tokens
        recent = settings.recent * limit
        target = settings.target * limit
        for entry in _older_than(asked.conversation.entries, asked.model, recent):
            if tokens <= target:
                return
            if entry.finished is None or entry.moved is not None:
                continue
            size = self._estimate(asked, [entry.message])
            if size < settings.moved_tokens:
                continue
            id = entry.finished.call_id
            if not id:  # an environment's result of a whole answer
                continue
            path = entry.finished.file
            name = re.sub(r"[^A-Za-z0-9_-]", "_", id)[:80]  # a server chose the id
            try:
                path = path or await self._store(f"{name}.txt", entry.finished.output)
            except (OSError, WorkspaceError) as error:
                text = f"the output of a call could not be moved to a file: {error}"
                asked.log.append(ev.Notice(text=text, level="warning"))
                return
            asked.log.append(ev.OutputMoved(call_id=id, file=path, tokens=size))
            tokens -= size

    # -- the summary

    async def _summarise(self, asked: _Asked, trigger: Trigger, focus: str, tokens: int) -> int:
        """Replace the older part of the context by a summary; return the tokens that are left."""
        conversation, model, log = asked.conversation, asked.model, asked.log
        log.append(ev.CompactionStarted(trigger=trigger, tokens=tokens))
        entries = list(conversation.entries)
        answer, fallback = await self._ask_for_summary(asked, focus)
        if answer is not None and not fallback:
            written = f"{SUMMARY}\n{answer.text.strip()}"
        else:
            written = describe_steps(entries, fallback, self._summary_tokens(model) * CHARACTERS)
        request = await self._request_that_fits(conversation, model)
        history = await self._store_or_not(f"history-{len(log.events)}.txt", transcript(entries))
        self._keep.catch_up(log.events)
        facts = self._keep.render(conversation, request=request, history=history)
        summary = "\n\n".join(filter(None, [HEAD, facts, written]))
        system = [one for one in conversation.messages[:1] if one.role == "system"]
        after = self._estimate(asked, [*system, Message("user", summary)], asked.schemas)
        limit = self.settings.threshold * model.context_tokens
        recent = self.settings.recent * limit / (2 if trigger == "overflow" else 1)
        room = self.settings.target * limit - after
        kept = _newest(entries, model, min(recent, room) / self._ratio)
        if not kept:  # the last call and its results alone may be longer than the share
            kept = _newest(_last_exchange(entries), model, room / self._ratio)
        if kept:
            after += self._estimate(asked, [entry.message for entry in kept])
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

    def _summary_tokens(self, model: Model) -> int:
        return min(self.settings.summary_tokens, model.context_tokens // 8)

    async def _ask_for_summary(
        self, asked: _Asked, focus: str
    ) -> tuple[ev.AssistantMessage | None, str]:
        """Return the model's summary, and why it is of no use; "" where it is.

        It is asked with the context as it is, so that a server has most of it in its cache.
        """
        instruction = f"{INSTRUCTION} Keep above all: {focus}" if focus else INSTRUCTION
        messages = [*asked.conversation.messages, Message("user", instruction)]
        limit = self._summary_tokens(asked.model)
        try:
            async with asyncio.timeout(self.settings.summary_seconds):
                answer = await asked.model.ask(messages, asked.schemas, max_tokens=limit)
        except TimeoutError:
            return None, f"no answer within {self.settings.summary_seconds:g} s"
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

    async def _notice_changes(self, asked: _Asked) -> None:
        """Tell the model of files that changed since it saw them, once for each change."""
        if self._workspace is None:
            return
        found = []
        watched = list(asked.conversation.read_files.items())[-MAX_WATCHED:]
        stats = (self._workspace.stat(path) for path, _ in watched)
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
            asked.log.append(ev.UserMessage(text=text, source="reminder"))


def _ratio_of(tokens: int, estimate: int) -> float:
    """Return how the model's own count differs from the estimate, within reason."""
    return min(max(tokens / estimate, 0.5), 2.0) if estimate else 1.0


def _older_than(entries: Sequence[Entry], model: Model, tokens: float) -> list[Entry]:
    """Return the entries before the newest so many tokens."""
    newest = _newest(entries, model, tokens)
    return [entry for entry in entries if not newest or entry.number < newest[0].number]


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
