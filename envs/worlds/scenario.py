"""Scenarios of the worlds: what makes up a dialogue, and the tools that draw and check one."""

from __future__ import annotations

import copy
import dataclasses
import random
from collections.abc import Iterator, Sequence
from typing import Any

from envs.gem import ToolCall, format_tool_call
from envs.worlds.tools import Database, Tool, Toolbox, digest
from envs.worlds.user import Fact, UserScript


@dataclasses.dataclass(frozen=True)
class Scenario:
    """One dialogue: the state before it, the user, the golden actions and the facts to tell.

    `demonstration` holds the turns of an able agent as text. It includes reads and questions, so
    every id that it writes with was seen before.
    """

    database: Database
    user: UserScript
    golden: tuple[ToolCall, ...]
    tell: tuple[str, ...]
    demonstration: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Request:
    """One request of the user, and the right way to fulfil it."""

    says: str
    golden: tuple[ToolCall, ...]
    tell: tuple[str, ...]
    demonstration: tuple[ToolCall | str, ...]
    facts: tuple[Fact, ...] = ()


def format_call(call: ToolCall) -> str:
    """Write a call as a turn."""
    return format_tool_call(call.name, call.arguments)


def calling(name: str, **arguments: Any) -> ToolCall:
    """Return a call of the named tool with these arguments."""
    return ToolCall(name, arguments)


def turns(*steps: ToolCall | str) -> tuple[str, ...]:
    """Return a demonstration's turns: calls as tool calls, texts as messages."""
    return tuple(step if isinstance(step, str) else format_call(step) for step in steps)


def joined(
    database: Database,
    requests: Sequence[Request],
    first: Sequence[ToolCall | str],
    thanks: str,
    known: Sequence[Fact] = (),
) -> Scenario:
    """Join requests into one dialogue.

    Args:
      database: the state before the dialogue.
      requests: the requests in the order in which the user states them.
      first: the demonstration's steps before those of the first request.
      thanks: the words before each further request.
      known: facts that the user knows beside those of the requests.
    """
    says = [f"Hello. {requests[0].says}"]
    facts = list(known)
    golden: list[ToolCall] = []
    tell: list[str] = []
    steps = list(first)
    for request in requests:
        facts += request.facts
        golden += request.golden
        tell += request.tell
        steps += request.demonstration
    says += [f"{thanks} {request.says}" for request in requests[1:]]
    user = UserScript(tuple(says), tuple(facts))
    return Scenario(database, user, tuple(golden), tuple(tell), turns(*steps))


def prove(world_tools: Sequence[Tool], scenario: Scenario) -> Scenario:
    """Return the scenario if its golden actions run and it cannot be solved by doing nothing.

    Raises:
      ValueError: an action fails, or nothing changes and nothing has to be told.
    """
    after = copy.deepcopy(scenario.database)
    Toolbox(world_tools).replay(after, scenario.golden)
    if digest(after) == digest(scenario.database) and not scenario.tell:
        raise ValueError(
            "the golden actions change nothing and nothing has to be told: doing nothing would"
            " solve the scenario"
        )
    return scenario


def attempts(rng: random.Random, limit: int = 2000) -> Iterator[random.Random]:
    """Yield the generator up to `limit` times, for rejection sampling.

    Raises:
      RuntimeError: `limit` attempts failed, so that a generator of scenarios never hangs.
    """
    for _ in range(limit):
        yield rng
    raise RuntimeError(
        f"no scenario was found in {limit} tries; the generator's conditions are too tight"
    )
