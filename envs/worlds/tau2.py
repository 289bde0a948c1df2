"""The format of tau2-bench over the worlds here.

A domain is a folder named after its backend, with db.json, policy.md and tasks.json: a list of
tasks with id, user_scenario.instructions, initial_state (initialization_data.agent_data,
initialization_actions, message_history) and evaluation_criteria (actions, env_assertions,
communicate_info, reward_basis). The reward is the product of the parts that reward_basis names
(default DB, COMMUNICATE):

    DB              the hash of the database equals that of a fresh one after the actions
    COMMUNICATE     each communicate_info is part of a message to the user, without regard to case
                    and the message's commas (tau2's substring rule)
    ENV_ASSERTION   each env_assertion holds at the end; here `assert_state(path, value)`, on every
                    world
    ACTION          the share of the actions that a call of the agent matches, by compare_args

NL_ASSERTION needs a judging model and is refused. tau2's user is a model, too. Here it is a script
that states reason_for_call, answers each question with all that it knows, and ends with the first
message that asks nothing. Results are therefore not comparable with tau2's leaderboard.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import pathlib
from typing import Any

from envs.gem import Info, StepResult, ToolCall
from envs.worlds.base import World, WorldEnv, WorldTask
from envs.worlds.published import BROKEN, FormatError, field, known_world, read_json
from envs.worlds.scenario import Scenario, turns
from envs.worlds.tools import ArgumentError, Database, Toolbox, ToolRefusal, digest
from envs.worlds.user import UserScript

BASES = ("DB", "COMMUNICATE", "ENV_ASSERTION", "ACTION")


@dataclasses.dataclass(frozen=True)
class Action:
    """A golden action.

    `compare` names the arguments that ACTION looks at; None means those of the compared call.
    """

    call: ToolCall
    compare: tuple[str, ...] | None


@dataclasses.dataclass(frozen=True)
class Assertion:
    """A condition on the final state: whether the value at `path` equals `value` is `expected`."""

    path: tuple[str, ...]
    value: Any
    expected: bool


@dataclasses.dataclass(frozen=True)
class Task:
    """One task of a domain, with its initial state applied."""

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
        """Return the environment of the task."""
        return Tau2Env(self)


def load(folder: pathlib.Path) -> list[Task]:
    """Read the tasks of a domain's folder.

    Raises:
      FormatError: the folder violates the format, or the domain has no backend here.
    """
    world = known_world(folder.name, str(folder))
    database = read_json(folder / "db.json")
    policy = folder / "policy.md"
    text = policy.read_text(encoding="utf-8") if policy.is_file() else world.policy
    tasks = read_json(folder / "tasks.json")
    if not isinstance(tasks, list) or not isinstance(database, dict):
        raise FormatError(f"{folder}: tasks.json must be a list, and db.json an object")
    found = []
    for number, entry in enumerate(tasks):
        where = f"{folder / 'tasks.json'}: task {number}"
        found.append(_task(entry, where, world, database, text))
    return found


def _task(entry: Any, where: str, world: World, database: Database, policy: str) -> Task:
    name = str(field(entry, "id", (str, int), where))
    where = f"{where} ({name})"
    box = Toolbox(world.tools)
    request, knows = _scenario(field(entry, "user_scenario", dict, where), where)
    initial = field(entry, "initial_state", dict, where, {})
    state, history = _initial_state(initial, where, box, database)
    criteria = field(entry, "evaluation_criteria", dict, where)
    actions = [_action(one, where) for one in field(criteria, "actions", list, where, [])]
    basis = tuple(field(criteria, "reward_basis", list, where, ["DB", "COMMUNICATE"]))
    if unknown := [one for one in basis if one not in BASES]:
        raise FormatError(
            f"{where}: reward_basis {unknown[0]!r} cannot be computed here; it is one of"
            f" {', '.join(BASES)} (NL_ASSERTION needs a judging model)"
        )
    assertions = [
        _assertion(one, where) for one in field(criteria, "env_assertions", list, where, [])
    ]
    communicate = field(criteria, "communicate_info", list, where, [])
    task = Task(
        name=name,
        domain=world.name,
        policy=policy,
        database=state,
        request=request,
        knows=knows,
        history=history,
        actions=tuple(actions),
        assertions=tuple(assertions),
        communicate=tuple(map(str, communicate)),
        basis=basis,
    )
    wanted_state(task, where)
    return task


def _scenario(scenario: dict, where: str) -> tuple[str, str]:
    """Return (the user's opening, the user's answer to questions)."""
    instructions = scenario.get("instructions")
    if isinstance(instructions, str):
        return instructions, instructions
    reason = field(instructions, "reason_for_call", str, f"{where}: instructions")
    known_info = field(instructions, "known_info", str, where, "")
    task_instructions = field(instructions, "task_instructions", str, where, "")
    known = " ".join(filter(None, (known_info, task_instructions)))
    return reason, known or reason


def _initial_state(
    state: dict, where: str, box: Toolbox, database: Database
) -> tuple[Database, tuple[str, ...]]:
    database = copy.deepcopy(database)
    data = field(state, "initialization_data", dict, where, {})
    if field(data, "user_data", dict, where, {}):
        raise FormatError(f"{where}: user_data is for a user with tools; the users here have none")
    _merge(database, field(data, "agent_data", dict, where, {}))
    calls = []
    for action in field(state, "initialization_actions", list, where, []):
        calls.append(_of_agent(action, "env_type", "func_name", where))
    history = []
    for message in field(state, "message_history", list, where, []):
        for call in field(message, "tool_calls", list, where, []):
            calls.append(_of_agent(call, "requestor", "name", where))
        role = message.get("role")
        content = message.get("content")
        if isinstance(content, str) and role in ("user", "assistant"):
            history.append(f"{'User' if role == 'user' else 'You'}: {content}")
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
    call = _of_agent(entry, "requestor", "name", where)
    compare = field(entry, "compare_args", list, where, None)
    return Action(call, None if compare is None else tuple(map(str, compare)))


def _assertion(entry: Any, where: str) -> Assertion:
    call = _of_agent(entry, "env_type", "func_name", where)
    path = call.arguments.get("path")
    fits = call.name == "assert_state" and set(call.arguments) == {"path", "value"}
    if not fits or not isinstance(path, list):
        raise FormatError(
            f"{where}: the assertion {call.name!r} is unknown; there is assert_state(path: list of"
            " keys, value)"
        )
    expected = field(entry, "assert_value", bool, where, True)
    return Assertion(tuple(map(str, path)), call.arguments["value"], expected)


def wanted_state(task: Task, where: str = "") -> Database:
    """Return a fresh database after the golden actions.

    A read that fails changes nothing and is ignored, as in tau2.

    Raises:
      FormatError: a write fails.
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
                arguments = json.dumps(action.call.arguments)
                raise FormatError(
                    f"{where}: the golden action {action.call.name}({arguments}) fails: {error}"
                ) from error
    return state


class Tau2Env(WorldEnv):
    """An environment of one task, whatever the seed. With ACTION the reward may be a fraction."""

    unexpected = BROKEN

    def __init__(self, task: Task) -> None:
        world = known_world(task.domain, task.name)
        super().__init__(dataclasses.replace(world, policy=task.policy))
        self.published = task
        self.family = f"tau2-{task.domain}"
        self.difficulty = "(none)"
        self.task = WorldTask(f"{task.domain}/{task.name}", self.family, 0)

    def reset(self, seed: int | None = None) -> tuple[str, Info]:
        """Start the task's dialogue; see `envs.gem.Env.reset`."""
        task = self.published
        calls = [action.call for action in task.actions]
        told = f"It is done. {'; '.join(task.communicate)}".rstrip()
        user = UserScript((task.request,), (), task.knows)
        demonstration = turns(*calls, told)
        self._begin(Scenario(task.database, user, tuple(calls), task.communicate, demonstration))
        opening = "\n".join([*task.history, f"User: {task.request}"])
        return f"{task.policy}\n\n{opening}", {
            "task": self.task.name,
            "family": self.family,
            "seed": 0,
            "tools": copy.deepcopy(self.tools),
        }

    def spawn(self, same_state: bool = False, **kwargs: Any) -> WorldEnv:
        """Return a new environment of the task, or a copy of this one in its state."""
        return super().spawn(True, **kwargs) if same_state else Tau2Env(self.published)

    def _hear(self, message: str) -> str:
        """Answer a question with all that the user knows; any other message ends the dialogue."""
        self.user.heard.append(message)
        self.user.over = "?" not in message
        return "" if self.user.over else self.published.knows

    def parts(self) -> dict[str, float]:
        """Return the parts of the reward that the basis names."""
        compute = {
            "DB": self._database_is_right,
            "COMMUNICATE": self._all_is_told,
            "ENV_ASSERTION": self._assertions_hold,
            "ACTION": self._share_of_actions,
        }
        return {name: float(compute[name]()) for name in self.published.basis}

    def _database_is_right(self) -> bool:
        return digest(self.database) == digest(wanted_state(self.published))

    def _all_is_told(self) -> bool:
        said = [message.lower().replace(",", "") for message in self.user.heard]
        facts = [fact.lower() for fact in self.published.communicate]
        return all(any(fact in message for message in said) for fact in facts)

    def _assertions_hold(self) -> bool:
        conditions = self.published.assertions
        return all(_holds(self.database, one) == one.expected for one in conditions)

    def _share_of_actions(self) -> float:
        actions = self.published.actions
        if not actions:
            return 1.0
        made = [call for call, _ in self.calls]
        matched = sum(any(_matches(action, call) for call in made) for action in actions)
        return matched / len(actions)

    def _grade(self, info: Info) -> StepResult:
        reward = 1.0
        parts = self.parts()
        for part in parts.values():
            reward *= part
        info["reward_parts"] = parts
        if reward == 1.0:
            return self._end("success", info, "", reward)
        note = ", ".join(f"{name} {value:g}" for name, value in parts.items())
        return self._end("failure", info, "", reward, note)

    def definition(self) -> str:
        """Return the task as text, which is equal for equal tasks."""
        return json.dumps(dataclasses.asdict(self.published), sort_keys=True)


def _holds(database: Database, assertion: Assertion) -> bool:
    value: Any = database
    for key in assertion.path:
        if not isinstance(value, dict) or key not in value:
            return False
        value = value[key]
    return value == assertion.value


def _matches(action: Action, call: ToolCall) -> bool:
    if action.call.name != call.name:
        return False
    compared = action.compare if action.compare is not None else tuple(call.arguments)
    return all(_argument(call, name) == _argument(action.call, name) for name in compared)


def _argument(call: ToolCall, name: str) -> tuple[bool, Any]:
    """Return whether a call has an argument, and its value."""
    return name in call.arguments, call.arguments.get(name)


__all__ = ["Action", "Assertion", "Task", "Tau2Env", "load", "wanted_state"]
