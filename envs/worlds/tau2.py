"""tau2-bench's form over the worlds here: the database after the dialogue, facts communicated,
assertions, actions.

A domain is a folder named as its backend, with db.json, policy.md and tasks.json: a list of tasks
with id, user_scenario.instructions, initial_state (initialization_data.agent_data,
initialization_actions, message_history) and evaluation_criteria (actions, env_assertions,
communicate_info, reward_basis). The reward is the product of the parts named in reward_basis
(default DB, COMMUNICATE):

    DB               the hash of the database equals that of a fresh one after the actions
    COMMUNICATE      each communicate_info is part of a message to the user, case and the message's commas aside (tau2's substring rule)
    ENV_ASSERTION    each env_assertion holds at the end; here `assert_state(path, value)`, on every world
    ACTION           the share of the actions that a call of the agent matches, by compare_args

NL_ASSERTION needs a judging model and is refused. tau2's user is a model, too; here it is a script
that states reason_for_call, answers each question with all that it knows, and ends with the first
message that asks nothing: figures are not comparable with those of tau2's leaderboard.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import pathlib
from typing import Any

from envs.gem import Info, StepResult, ToolCall
from envs.worlds.base import Scenario, World, WorldEnv, WorldTask, turns
from envs.worlds.published import BROKEN, FormatError, field, known_world, read_json
from envs.worlds.tools import ArgumentError, Database, Toolbox, ToolRefusal, digest
from envs.worlds.user import UserScript

BASES = ("DB", "COMMUNICATE", "ENV_ASSERTION", "ACTION")


@dataclasses.dataclass(frozen=True)
class Action:
    """A golden action. compare: the arguments that ACTION looks at; None: those of the call that is
    compared.
    """

    call: ToolCall
    compare: tuple[str, ...] | None


@dataclasses.dataclass(frozen=True)
class Assertion:
    path: tuple[str, ...]
    value: Any
    expected: bool


@dataclasses.dataclass(frozen=True)
class Task:
    """One task of a domain, its initial state applied."""

    name: str
    domain: str
    policy: str
    database: Database
    request: str
    knows: str
    history: tuple[str, ...]
    actions: tuple[Action, ...]
    assertions: tuple[Assertion, ...]
    communicate: tuple[str, ...]
    basis: tuple[str, ...]

    def make_env(self) -> Tau2Env:
        return Tau2Env(self)


def load(folder: pathlib.Path) -> list[Task]:
    """The tasks of a domain's folder. Raises FormatError, for a domain without a backend too."""
    world = known_world(folder.name, str(folder))
    database = read_json(folder / "db.json")
    policy = folder / "policy.md"
    text = policy.read_text(encoding="utf-8") if policy.is_file() else world.policy
    tasks = read_json(folder / "tasks.json")
    if not isinstance(tasks, list) or not isinstance(database, dict):
        raise FormatError(f"{folder}: tasks.json must be a list, and db.json an object")
    return [
        _task(entry, f"{folder / 'tasks.json'}: task {number}", world, database, text)
        for number, entry in enumerate(tasks)
    ]


def _task(entry: Any, where: str, world: World, database: Database, policy: str) -> Task:
    name = str(field(entry, "id", (str, int), where))
    where = f"{where} ({name})"
    box = Toolbox(world.tools)
    request, knows = _scenario(field(entry, "user_scenario", dict, where), where)
    state, history = _initial_state(
        field(entry, "initial_state", dict, where, {}), where, box, database
    )
    criteria = field(entry, "evaluation_criteria", dict, where)
    actions = tuple(_action(one, where) for one in field(criteria, "actions", list, where, []))
    basis = tuple(field(criteria, "reward_basis", list, where, ["DB", "COMMUNICATE"]))
    if unknown := [one for one in basis if one not in BASES]:
        raise FormatError(
            f"{where}: reward_basis {unknown[0]!r} cannot be computed here; it is one of"
            f" {', '.join(BASES)} (NL_ASSERTION needs a judging model)"
        )
    assertions = tuple(
        _assertion(one, where) for one in field(criteria, "env_assertions", list, where, [])
    )
    task = Task(
        name,
        world.name,
        policy,
        state,
        request,
        knows,
        history,
        actions,
        assertions,
        tuple(map(str, field(criteria, "communicate_info", list, where, []))),
        basis,
    )
    wanted_state(task, where)
    return task


def _scenario(scenario: dict, where: str) -> tuple[str, str]:
    """(what the user opens with, what it answers questions with)."""
    instructions = scenario.get("instructions")
    if isinstance(instructions, str):
        return instructions, instructions
    reason = field(instructions, "reason_for_call", str, f"{where}: instructions")
    known = [
        field(instructions, name, str, where, "") for name in ("known_info", "task_instructions")
    ]
    return reason, " ".join(filter(None, known)) or reason


def _initial_state(
    state: dict, where: str, box: Toolbox, database: Database
) -> tuple[Database, tuple[str, ...]]:
    database = copy.deepcopy(database)
    data = field(state, "initialization_data", dict, where, {})
    if field(data, "user_data", dict, where, {}):
        raise FormatError(f"{where}: user_data is for a user with tools; the users here have none")
    _merge(database, field(data, "agent_data", dict, where, {}))
    calls = [
        _of_agent(one, "env_type", "func_name", where)
        for one in field(state, "initialization_actions", list, where, [])
    ]
    history = []
    for message in field(state, "message_history", list, where, []):
        calls += [
            _of_agent(one, "requestor", "name", where)
            for one in field(message, "tool_calls", list, where, [])
        ]
        if isinstance(message.get("content"), str) and message.get("role") in ("user", "assistant"):
            history.append(
                f"{'User' if message['role'] == 'user' else 'You'}: {message['content']}"
            )
    try:
        box.replay(database, calls)
    except (ValueError, *BROKEN) as error:
        raise FormatError(
            f"{where}: initial_state cannot be reached: {type(error).__name__}: {error}"
        ) from error
    return database, tuple(history)


def _merge(into: Database, update: Database) -> None:
    for name, value in update.items():
        if isinstance(value, dict) and isinstance(into.get(name), dict):
            _merge(into[name], value)
        else:
            into[name] = value


def _of_agent(entry: Any, by: str, name: str, where: str) -> ToolCall:
    if field(entry, by, str, where, "assistant") != "assistant":
        raise FormatError(
            f"{where}: {by} is {entry[by]!r}; users with tools of their own have no backend here"
        )
    return ToolCall(field(entry, name, str, where), field(entry, "arguments", dict, where))


def _action(entry: Any, where: str) -> Action:
    compare = field(entry, "compare_args", list, where, None)
    return Action(
        _of_agent(entry, "requestor", "name", where),
        None if compare is None else tuple(map(str, compare)),
    )


def _assertion(entry: Any, where: str) -> Assertion:
    call = _of_agent(entry, "env_type", "func_name", where)
    if (
        call.name != "assert_state"
        or set(call.arguments) != {"path", "value"}
        or not isinstance(call.arguments["path"], list)
    ):
        raise FormatError(
            f"{where}: the assertion {call.name!r} is unknown; there is assert_state(path: list of"
            " keys, value)"
        )
    return Assertion(
        tuple(map(str, call.arguments["path"])),
        call.arguments["value"],
        field(entry, "assert_value", bool, where, True),
    )


def wanted_state(task: Task, where: str = "") -> Database:
    """A fresh database after the golden actions.

    A read that fails changes nothing and is passed over, as in tau2; a write that fails is a
    FormatError.
    """
    world = known_world(task.domain, where)
    box = Toolbox(world.tools)
    state = copy.deepcopy(task.database)
    for action in task.actions:
        try:
            box.call(state, action.call)
        except (ArgumentError, ToolRefusal, *BROKEN) as error:
            tool = box.by_name.get(action.call.name)
            if tool is None or tool.writes:
                raise FormatError(
                    f"{where}: the golden action"
                    f" {action.call.name}({json.dumps(action.call.arguments)}) fails: {error}"
                ) from error
    return state


class Tau2Env(WorldEnv):
    """One task; the seed changes nothing. The reward may be a fraction where ACTION counts."""

    unexpected = BROKEN

    def __init__(self, task: Task) -> None:
        super().__init__(
            dataclasses.replace(known_world(task.domain, task.name), policy=task.policy)
        )
        self.published = task
        self.family = f"tau2-{task.domain}"
        self.difficulty = "(none)"
        self.task = WorldTask(f"{task.domain}/{task.name}", self.family, 0)

    def reset(self, seed: int | None = None) -> tuple[str, Info]:
        task = self.published
        calls = [action.call for action in task.actions]
        told = f"It is done. {'; '.join(task.communicate)}".rstrip()
        self._begin(
            Scenario(
                task.database,
                UserScript((task.request,), (), task.knows),
                tuple(calls),
                task.communicate,
                turns(*calls, told),
            )
        )
        opening = "\n".join([*task.history, f"User: {task.request}"])
        return f"{task.policy}\n\n{opening}", {
            "task": self.task.name,
            "family": self.family,
            "seed": 0,
            "tools": copy.deepcopy(self.tools),
        }

    def spawn(self, same_state: bool = False, **kwargs: Any) -> WorldEnv:
        return super().spawn(True, **kwargs) if same_state else Tau2Env(self.published)

    def _hear(self, message: str) -> str:
        """A question gets all that the user knows; anything else ends the dialogue."""
        self.user.heard.append(message)
        self.user.over = "?" not in message
        return "" if self.user.over else self.published.knows

    def parts(self) -> dict[str, float]:
        """The reward's parts, those of the basis only."""
        task = self.published
        said = [message.lower().replace(",", "") for message in self.user.heard]
        compute = {
            "DB": lambda: float(digest(self.database) == digest(wanted_state(task))),
            "COMMUNICATE": lambda: float(
                all(any(fact.lower() in message for message in said) for fact in task.communicate)
            ),
            "ENV_ASSERTION": lambda: float(
                all(_holds(self.database, one) == one.expected for one in task.assertions)
            ),
            "ACTION": lambda: (
                sum(
                    any(_matches(action, call) for call, _ in self.calls) for action in task.actions
                )
                / len(task.actions)
                if task.actions
                else 1.0
            ),
        }
        return {name: compute[name]() for name in task.basis}

    def _grade(self, info: Info) -> StepResult:
        reward = 1.0
        parts = self.parts()
        for part in parts.values():
            reward *= part
        info["reward_parts"] = parts
        note = ", ".join(f"{name} {value:g}" for name, value in parts.items())
        return self._end(
            "success" if reward == 1.0 else "failure",
            info,
            "",
            reward,
            "" if reward == 1.0 else note,
        )

    def definition(self) -> str:
        return json.dumps(dataclasses.asdict(self.published), sort_keys=True)


def _holds(database: Database, assertion: Assertion) -> bool:
    value: Any = database
    for key in assertion.path:
        if not isinstance(value, dict) or key not in value:
            return False
        value = value[key]
    return value == assertion.value


def _matches(action: Action, call: ToolCall) -> bool:
    compared = action.compare if action.compare is not None else tuple(call.arguments)
    return action.call.name == call.name and all(
        (name in call.arguments, call.arguments.get(name))
        == (name in action.call.arguments, action.call.arguments.get(name))
        for name in compared
    )


__all__ = ["Action", "Assertion", "Task", "Tau2Env", "load", "wanted_state"]
