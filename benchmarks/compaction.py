r"""Measure what compaction costs an agent: long tasks at a quarter of the context.

python -m benchmarks.compaction --json compaction.json [--tasks 50] [--part 4] \
    [--forgets 0.25] [--fails 0.1]

Each task is a round through a town. The user names the first house; each house is visited by a call
whose output, long or short, has one line that counts: the code of the house, and the way to the
next one. Most codes are given only once. On the way the agent keeps a todo list, starts a job whose
id it needs at the end, and is told something more by the user. It succeeds if its last answer has
all codes in order, the result of the job, and what it was told.

The agent is the one of production, and its model is a script that knows only what stands in the
messages that it is shown: a code, a request or an id that is not there is not known to it, and it
then looks where the context says that more can be found. Its summaries are as those of models are:
of the facts that it sees (the request and what was added to it, the job, each code) it leaves each
out with the probability `--forgets`, and with `--fails` there is no usable summary (none, an error,
or one that is cut).

Reported are the shares of tasks that succeed: `whole` with the whole context, `compacted` with one
of `--part` parts of it, and for comparison that part with the keep-list but no files (`no_files`),
with the files but no keep-list (`no_keep_list`), with the summaries alone (`summaries_alone`), and
with nothing (`unmanaged`). `ratio` is compacted / whole.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import pathlib
import random
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, cast

from rich.console import Console

from rome.agent.iflow import events as ev
from rome.agent.iflow.context import ContextManager
from rome.agent.iflow.conversation import Conversation
from rome.agent.iflow.event_log import EventLog
from rome.agent.iflow.events import AssistantMessage
from rome.agent.iflow.keep import keep_list
from rome.agent.iflow.limits import Limits
from rome.agent.iflow.loop import Agent
from rome.agent.iflow.models.model import ModelError
from rome.agent.iflow.places.workspace import Workspace
from rome.agent.iflow.tools.base import Tool, ToolContext, ToolError, ToolResult
from rome.agent.messages import Message
from rome.data.tree import Edge

WHOLE = 40_000  # tokens of the whole context, which holds each task to its end
HOUSES = 40
ONCE = 0.7  # share of the houses that give their code only once
LONG = 0.5  # share of the houses with a long output
THOUGHT = "I note where I am, and that the round goes on; what counts is in what the house said. "
NOISE = "The hall is empty; a lamp, two chairs, a stack of letters nobody has opened for weeks. "
FACT = re.compile(r"house (\w+) has code (\w+)(?:, then go to (\w+))?")
JOB = re.compile(r"- (job\d+): count")
GOAL = re.compile(r"Visit all (\d+) houses, the first one is (\w+)")
STEER = re.compile(r"end your answer with the word (\w+)")
FACTS = (GOAL, STEER, JOB, FACT)
MODES = ("whole", "compacted", "no_files", "no_keep_list", "summaries_alone", "unmanaged")


@dataclasses.dataclass
class Town:
    """The world of one task, and what a right answer is.

    Attributes:
      houses: name -> (code, next house or "", whether the code is given only once).
      first: house.
      word: that the user tells on the way.
      number: that the job counts.
    """

    houses: dict[str, tuple[str, str, bool]]
    first: str
    word: str
    number: int
    visited: set[str] = dataclasses.field(default_factory=set)
    files: dict[str, str] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, seed: int) -> Town:
        """Return the town of a seed."""
        rng = random.Random(f"town/{seed}")
        names = [f"h{number}" for number in rng.sample(range(1000, 9999), HOUSES)]
        houses = {}
        for place, name in enumerate(names):
            after = names[place + 1] if place + 1 < HOUSES else ""
            houses[name] = (f"c{rng.randrange(10**6):06d}", after, rng.random() < ONCE)
        return cls(houses, names[0], f"w{rng.randrange(10**6):06d}", rng.randrange(1000))

    @property
    def request(self) -> str:
        """Return what the user asks for."""
        return (
            f"Visit all {HOUSES} houses, the first one is {self.first}. Start the count in the"
            " background at the beginning. At the end answer with RESULT, the codes of all houses"
            " in order, and the count."
        )

    @property
    def steer(self) -> str:
        """Return what the user says on the way."""
        return f"One more thing: end your answer with the word {self.word}."

    @property
    def answer(self) -> str:
        """Return the right answer."""
        codes = " ".join(code for code, _, _ in self.houses.values())
        return f"RESULT {codes} {self.number} {self.word}"


class Visit(Tool):
    """Visits a house."""

    name: ClassVar[str] = "visit"
    parameters: ClassVar[Mapping[str, Any]] = {
        "type": "object",
        "properties": {"house": {"type": "string"}},
        "required": ["house"],
    }

    def __init__(self, town: Town) -> None:
        self._town = town

    async def run(self, arguments: Mapping[str, Any], context: ToolContext) -> ToolResult:
        """Return what is seen there."""
        name = arguments["house"]
        if name not in self._town.houses:
            raise ToolError(f"there is no house {name}")
        code, after, is_once = self._town.houses[name]
        fact = f"house {name} has code {code}" + (f", then go to {after}" if after else "")
        if is_once and name in self._town.visited:
            return ToolResult(f"Nobody opens; the code of {name} was given already.")
        self._town.visited.add(name)
        rng = random.Random(f"noise/{name}")
        most = 30 if rng.random() < LONG else 4
        before, after_it = (NOISE * rng.randrange(most) for _ in range(2))
        return ToolResult(f"{before}\n{fact}\n{after_it}")


class Count(Tool):
    """Starts the count in the background, or returns its result."""

    name: ClassVar[str] = "count"
    parameters: ClassVar[Mapping[str, Any]] = {
        "type": "object",
        "properties": {"job": {"type": "string"}},
    }

    def __init__(self, town: Town) -> None:
        self._town = town
        self._job = f"job{town.number + 1000}"

    async def run(self, arguments: Mapping[str, Any], context: ToolContext) -> ToolResult:
        """Start it, or return the result of the job that is named."""
        if "job" not in arguments:
            context.emit(ev.JobStarted(job=self._job, command="count"))
            return ToolResult(f"- {self._job}: count started")
        if arguments["job"] != self._job:
            raise ToolError("there is no such job")
        return ToolResult(f"the count is {self._town.number}")


class Todo(Tool):
    """Keeps the list of what is to do."""

    name: ClassVar[str] = "todo"
    parameters: ClassVar[Mapping[str, Any]] = {
        "type": "object",
        "properties": {"items": {"type": "array"}},
        "required": ["items"],
    }

    async def run(self, arguments: Mapping[str, Any], context: ToolContext) -> ToolResult:
        """Note the list."""
        items = tuple(ev.TodoItem(**item) for item in arguments["items"])
        context.emit(ev.TodoChanged(items=items))
        return ToolResult("noted")


class Search(Tool):
    """Returns the lines of a kept file that have a word."""

    name: ClassVar[str] = "search"
    parameters: ClassVar[Mapping[str, Any]] = {
        "type": "object",
        "properties": {"path": {"type": "string"}, "word": {"type": "string"}},
        "required": ["path", "word"],
    }

    def __init__(self, town: Town) -> None:
        self._town = town

    async def run(self, arguments: Mapping[str, Any], context: ToolContext) -> ToolResult:
        """Return them."""
        text = self._town.files.get(arguments["path"])
        if text is None:
            raise ToolError("there is no such file")
        lines = [line for line in text.splitlines() if arguments["word"] in line]
        return ToolResult("\n".join(lines) or "no line has it")


class Script:
    """The model: it knows what its messages say, and nothing else.

    Args:
      context_tokens: beyond which it refuses a conversation.
      seed: of what its summaries leave out.
      forgets: probability that a summary leaves a fact out.
      fails: probability that there is no usable summary.
    """

    name = "script"

    def __init__(self, context_tokens: int, seed: int, forgets: float, fails: float) -> None:
        self.context_tokens = context_tokens
        self.asked = 0
        self._rng = random.Random(f"script/{seed}")
        self._forgets = forgets
        self._fails = fails

    def count_tokens(
        self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = ()
    ) -> int:
        """Return about a quarter of the characters."""
        characters = sum(
            len(message.content) + sum(len(call.arguments) + 20 for call in message.tool_calls)
            for message in messages
        )
        return characters // 4 + 8 * len(messages) + 40 * len(tools)

    async def ask(
        self,
        messages: Sequence[Message],
        tools: Sequence[dict[str, Any]],
        *,
        edge: Edge | None = None,
        max_tokens: int | None = None,
        on_text: Callable[[str, bool], None] | None = None,
    ) -> AssistantMessage:
        """AssistantMessage with the next act that follows from the messages."""
        tokens = self.count_tokens(messages, tools)
        if tokens > self.context_tokens:
            raise ModelError("the conversation is too long", is_context_full=True)
        usage = ev.Usage(prompt=tokens, completion=40)
        if max_tokens is not None:
            return self._summary(messages, usage)
        self.asked += 1
        return dataclasses.replace(self._act(messages), usage=usage)

    async def aclose(self) -> None:
        """Free nothing: it holds nothing."""

    def _summary(self, messages: Sequence[Message], usage: ev.Usage) -> AssistantMessage:
        if self._rng.random() < self._fails:
            how = self._rng.randrange(3)
            if how == 0:
                raise ModelError("the server is busy")
            return AssistantMessage(
                text="and so on", finish="length" if how == 1 else "stop", usage=usage
            )
        said = "\n".join(message.content for message in messages)
        facts = [match[0] for pattern in FACTS for match in pattern.finditer(said)]
        kept = [fact for fact in dict.fromkeys(facts) if self._rng.random() >= self._forgets]
        return AssistantMessage(text="The round goes well.\n" + "\n".join(kept), usage=usage)

    def _act(self, messages: Sequence[Message]) -> AssistantMessage:
        said = "\n".join(message.content for message in messages if message.role != "assistant")
        goal = GOAL.search(said)
        if goal is None:
            return AssistantMessage(text="I do not know what I am to do.")
        job = JOB.search(said)
        count = re.search(r"the count is (\d+)", said)
        if job is None and count is None:
            return self._call("count", {})
        codes, missing = _walk(said, goal[2], int(goal[1]))
        if not codes and "noted" not in said and "## Open items" not in said:
            items = [{"text": "visit all houses, then read the count", "status": "in_progress"}]
            return self._call("todo", {"items": items})
        if missing:
            return self._find(missing, messages, said)
        if count is None:
            assert job is not None
            return self._call("count", {"job": job[1]})
        words = STEER.findall(said)
        return AssistantMessage(text=" ".join(["RESULT", *codes, count[1], *words[-1:]]))

    def _find(self, house: str, messages: Sequence[Message], said: str) -> AssistantMessage:
        """Return the call that finds a code: where its output was moved to, or at the house.

        A house that gives its code only once says so; then the files that the context names are
        searched. What was tried, as far as the context says, is not tried again.
        """
        tried = {call.arguments: call.id for message in messages for call in message.tool_calls}
        results = {message.tool_call_id: message.content for message in messages}
        visit = json.dumps({"house": house})
        result = results.get(tried.get(visit, ""), "")
        if visit not in tried:
            return self._call("visit", {"house": house})
        moved = re.search(r"moved to (\S+?\.txt)", result)
        places = [moved[1]] if moved else re.findall(r"^- (/kept/\S+)$", said, re.MULTILINE)
        for path in reversed(places):
            arguments = {"path": path, "word": f"house {house} has"}
            if json.dumps(arguments) not in tried:
                return self._call("search", arguments)
        return AssistantMessage(text=f"I cannot find the code of {house}.")

    def _call(self, name: str, arguments: Mapping[str, Any]) -> AssistantMessage:
        call = ev.ToolCall(f"call{self.asked}", name, json.dumps(arguments))
        thought = THOUGHT * self._rng.randrange(6)
        return AssistantMessage(text=thought, tool_calls=(call,), finish="tool_calls")


def _walk(said: str, first: str, houses: int) -> tuple[list[str], str]:
    """Return the codes that are known from the first house on, and the first house that is not."""
    facts = {match[1]: (match[2], match[3]) for match in FACT.finditer(said)}
    codes: list[str] = []
    house = first
    while house in facts and len(codes) < houses:
        code, after = facts[house]
        codes.append(code)
        house = after or ""
    return codes, "" if len(codes) == houses else house


def only_files(conversation: Conversation, request: str, history: str) -> str:
    """Return the names of the files that hold what left the context: no keep-list else."""
    return "\n".join(f"- {path}" for path in [*conversation.histories, history] if path)


class Street:
    """The workspace: the tools of the town need none."""

    root = "/town"
    directory = "/town"
    is_isolated = True


@dataclasses.dataclass(frozen=True)
class Played:
    """One task: whether it succeeded, and what it took."""

    success: bool
    answers: int
    compactions: int
    fallbacks: int
    moved: int
    said: str


async def play(seed: int, mode: str, part: int, forgets: float, fails: float) -> Played:
    """Play one task in one of MODES."""
    town = Town.of(seed)
    tokens = WHOLE if mode == "whole" else WHOLE // part
    script = Script(tokens, seed, forgets, fails)

    async def store(name: str, text: str) -> str:
        town.files[f"/kept/{name}"] = text
        return f"/kept/{name}"

    context = None
    if mode in ("whole", "compacted"):
        context = ContextManager(store=store)
    elif mode != "unmanaged":
        without_list = mode in ("no_keep_list", "summaries_alone")
        context = ContextManager(
            store=store if mode == "no_keep_list" else None,
            keep=only_files if without_list else keep_list,
        )
    log = EventLog()
    tools = [Visit(town), Count(town), Todo(), Search(town)]
    limits = Limits(turns=20 * HOUSES)
    agent = Agent(script, tools, log, cast(Workspace, Street()), context=context, limits=limits)

    def steer(event: ev.Event) -> None:
        if isinstance(event, ev.ToolFinished) and len(town.visited) == HOUSES // 3:
            agent.steer(town.steer)
            stop()

    stop = log.listen(steer)
    await agent.run(town.request)
    await agent.aclose()
    said = [event.text for event in log.events if isinstance(event, ev.AssistantMessage)]
    compacted = [event for event in log.events if isinstance(event, ev.ContextCompacted)]
    return Played(
        success=bool(said) and said[-1] == town.answer,
        answers=script.asked,
        compactions=len(compacted),
        fallbacks=sum(bool(event.fallback) for event in compacted),
        moved=sum(isinstance(event, ev.OutputMoved) for event in log.events),
        said=said[-1] if said else "",
    )


async def measure(tasks: int, part: int, forgets: float, fails: float) -> dict[str, Any]:
    """Return the figures of all modes."""
    figures: dict[str, Any] = {"tasks": tasks, "part": part, "forgets": forgets, "fails": fails}
    for mode in MODES:
        began = time.monotonic()
        played = [await play(seed, mode, part, forgets, fails) for seed in range(tasks)]
        figures[mode] = {
            "success": sum(one.success for one in played) / tasks,
            "answers": sum(one.answers for one in played) / tasks,
            "compactions": sum(one.compactions for one in played) / tasks,
            "fallbacks": sum(one.fallbacks for one in played) / tasks,
            "moved": sum(one.moved for one in played) / tasks,
            "seconds": round(time.monotonic() - began, 2),
        }
    whole = figures["whole"]["success"]
    figures["ratio"] = figures["compacted"]["success"] / whole if whole else 0.0
    return figures


def main() -> None:
    """Measure, print a table, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=pathlib.Path, help="file of the figures")
    parser.add_argument("--tasks", type=int, default=50)
    parser.add_argument("--part", type=int, default=4)
    parser.add_argument("--forgets", type=float, default=0.25)
    parser.add_argument("--fails", type=float, default=0.1)
    given = parser.parse_args()
    figures = asyncio.run(measure(given.tasks, given.part, given.forgets, given.fails))
    console = Console()
    for mode in MODES:
        one = figures[mode]
        console.print(
            f"{mode:16} success {one['success']:.2f}  answers {one['answers']:6.1f}  compactions"
            f" {one['compactions']:.1f} (no summary: {one['fallbacks']:.1f})  outputs moved"
            f" {one['moved']:.1f}  {one['seconds']:.1f} s"
        )
    console.print(f"ratio {figures['ratio']:.2f}")
    if given.json:
        given.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
