"""The multi-turn categories of BFCL, checked after each turn of the user.

The published files run through their authors' own classes (bfcl_authors.py). Files of the same form
may also name the worlds here: travel, shop and gui.

Files (Berkeley Function-Calling Leaderboard, v3 and v4): FILE.json has one JSON object a line with
id, question (a list of turns, each a list of messages), initial_config (a state for each class),
involved_classes, and optionally excluded_function and missed_function. possible_answer/FILE.json
has id and ground_truth: for each turn a list of calls written in Python. A turn of the user is over
when the agent answers without a call; each of its steps may hold several calls.

A turn is right (BFCL's multi_turn_checker) if the state of every class, without private parts,
equals the state after the true calls, and if each answer of this turn's true calls is among the
answers that the agent got so far. A turn without true calls is not checked.
"""

from __future__ import annotations

import ast
import collections
import copy
import dataclasses
import functools
import json
import pathlib
import random
from typing import Any

from envs.gem import Info, ToolCall
from envs.worlds import bfcl_authors
from envs.worlds.base import MAX_CALLS, World, WorldEnv, WorldTask, differences
from envs.worlds.published import BROKEN, FormatError, field, known_world, read_lines
from envs.worlds.scenario import Scenario, format_call
from envs.worlds.tools import Database, Tool, Toolbox, outcome, told
from envs.worlds.user import UserScript

STEPS_A_TURN = 20  # BFCL's limit for each turn of the user
MORE_FUNCTIONS = "More functions are available to you now; please go on with them."


@dataclasses.dataclass(frozen=True)
class Entry:
    """One line of a file with its true calls.

    `missed` lists tools that become available with a later turn, as (turn, names).
    """

    name: str
    questions: tuple[str, ...]
    initial_config: dict[str, Database]
    truth: tuple[tuple[ToolCall, ...], ...]
    excluded: tuple[str, ...] = ()
    missed: tuple[tuple[int, tuple[str, ...]], ...] = ()

    def make_env(self) -> BfclEnv:
        """Return the environment of the entry."""
        return BfclEnv(self)

    def make_state(self) -> Database:
        """Return the state of each class before the first turn, which nothing else shares."""
        long_context = "long_context" in self.name or "composite" in self.name
        return {
            name: bfcl_authors.make_state(name, config, long_context)
            if name in bfcl_authors.CLASSES
            else copy.deepcopy(config)
            for name, config in self.initial_config.items()
        }


def load_dataset(name: str) -> list[Entry]:
    """Read a file, or the files of a category of the authors' package ("multi_turn": of all).

    Raises:
      FormatError: see `load`; there is no such category, or the package is not installed.
    """
    path = pathlib.Path(name)
    files = [path] if path.suffix == ".json" else bfcl_authors.files_of(name)
    return [entry for file in files for entry in load(file)]


def load(path: pathlib.Path) -> list[Entry]:
    """Read the entries of a file, with the answers of possible_answer/ beside it.

    Raises:
      FormatError: a file violates the format, or names an unknown class.
    """
    truths = read_lines(path.parent / "possible_answer" / path.name)
    answers = {
        field(entry, "id", str, where): (where, field(entry, "ground_truth", list, where))
        for where, entry in truths
    }
    entries = []
    for where, entry in read_lines(path):
        name = field(entry, "id", str, where)
        if name not in answers:
            raise FormatError(f"{where}: {name!r} has no line in possible_answer/{path.name}")
        entries.append(_entry(entry, name, where, *answers[name]))
    return entries


def _entry(entry: Any, name: str, where: str, truth_where: str, ground_truth: list) -> Entry:
    classes = field(entry, "involved_classes", list, where)
    config = field(entry, "initial_config", dict, where)
    states = {}
    for one in classes:
        _tools_of(str(one), where)
        default: Any = {} if one in bfcl_authors.CLASSES else ...  # MathAPI has no state
        states[one] = field(config, one, dict, f"{where}: initial_config", default)
    questions = [_question(turn, where) for turn in field(entry, "question", list, where)]
    if len(questions) != len(ground_truth) or not questions:
        raise FormatError(
            f"{truth_where}: ground_truth has {len(ground_truth)} turns and the question"
            f" {len(questions)}"
        )
    missed = []
    for turn, names in field(entry, "missed_function", dict, where, {}).items():
        missed.append((int(turn), tuple(names)))
    excluded = tuple(field(entry, "excluded_function", list, where, []))
    made = Entry(name, tuple(questions), states, (), excluded, tuple(sorted(missed)))
    world = composite(made)
    parameters = {tool.name: list(tool.parameters) for tool in world.tools}
    truth = tuple(
        tuple(parse_call(text, parameters, f"{truth_where}: turn {number}") for text in turn)
        for number, turn in enumerate(ground_truth)
    )
    made = dataclasses.replace(made, truth=truth)
    calls = [call for turn in truth for call in turn]
    try:
        Toolbox(world.tools).replay(made.make_state(), calls)
    except FormatError as error:
        raise FormatError(f"{where}: {error}") from error
    except (ValueError, *BROKEN) as error:  # BROKEN: a config of another shape
        raise FormatError(
            f"{truth_where}: the true calls do not run on initial_config: {type(error).__name__}:"
            f" {error}"
        ) from error
    return made


def _question(turn: Any, where: str) -> str:
    """Return the user's messages of a turn; a turn without any means that functions were added."""
    if not isinstance(turn, list):
        raise FormatError(
            f"{where}: a turn of 'question' is {type(turn).__name__} and must be list"
        )
    return "\n".join(field(message, "content", str, where) for message in turn)


def parse_call(text: Any, parameters: dict[str, list[str]], where: str) -> ToolCall:
    """Parse a call written in Python, such as "book_flight(traveller_id='T1', flight_id='F2')".

    Only literals are evaluated. Raises FormatError.
    """
    try:
        node = ast.parse(text, mode="eval").body
        name = node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id
        arguments = {keyword.arg: ast.literal_eval(keyword.value) for keyword in node.keywords}
        given = [ast.literal_eval(one) for one in node.args]
    except (
        SyntaxError,
        ValueError,
        TypeError,
        AttributeError,
        RecursionError,
        MemoryError,
    ) as error:
        raise FormatError(
            f"{where}: {str(text)[:100]!r} is no call with literal arguments"
        ) from error
    if name not in parameters or None in arguments or len(given) > len(parameters[name]):
        raise FormatError(
            f"{where}: {str(text)[:100]!r} calls no known function; there are"
            f" {', '.join(parameters)}"
        )
    return ToolCall(name, {**dict(zip(parameters[name], given, strict=False)), **arguments})


def composite(entry: Entry) -> World:
    """Return the classes of an entry as one world whose database has a part for each."""
    tools: list[Tool] = []
    for name in entry.initial_config:
        tools += [
            dataclasses.replace(tool, run=functools.partial(_in_part, tool, name))
            for tool in _tools_of(name, entry.name)
            if tool.name not in entry.excluded
        ]
    names = sorted(entry.initial_config)

    def random_write(rng: random.Random, database: Database) -> ToolCall:
        name = rng.choice(names)
        if name in bfcl_authors.CLASSES:
            return bfcl_authors.random_call(rng, name)
        return known_world(name, entry.name).random_write(rng, database[name])

    policy = (
        "You serve a user by calling functions. When a request is done, or cannot be, answer"
        " without a call; the next request may follow."
    )
    return World(
        "bfcl",
        policy,
        tuple(tools),
        _no_scenario,
        random_write,
        STEPS_A_TURN * len(entry.questions),
    )


def _tools_of(name: str, where: str) -> tuple[Tool, ...]:
    """Return the tools of a class, the authors' or a world's here. Raises FormatError."""
    if name in bfcl_authors.CLASSES:
        try:
            return bfcl_authors.tools_of(name)
        except FormatError as error:
            raise FormatError(f"{where}: {error}") from error
    return known_world(name, where).tools


def _no_scenario(rng: random.Random, level: str) -> Scenario:
    raise NotImplementedError("an entry of BFCL is one dialogue; nothing is drawn")


def _in_part(tool: Tool, part: str, database: Database, /, **arguments: Any) -> Any:
    return tool.run(database[part], **arguments)


def _as_dict(state: Any) -> Database:
    """Return the attributes of a class's state; a world's is a dictionary."""
    return state if isinstance(state, dict) else vars(state)


class BfclEnv(WorldEnv):
    """An environment of one entry, whatever the seed.

    It ends with the last turn of the user, or as a failure where a turn takes more than 20 steps.
    """

    unexpected = BROKEN

    def __init__(self, entry: Entry) -> None:
        super().__init__(composite(entry))
        self.entry = entry
        self.family = "bfcl"
        self.difficulty = entry.name.rsplit("_", 1)[0]
        self.task = WorldTask(entry.name, "bfcl", 0)
        self._all = Toolbox(self.world.tools)
        is_authors = all(name in bfcl_authors.CLASSES for name in entry.initial_config)
        more = bfcl_authors.more_functions() if is_authors else MORE_FUNCTIONS
        self._questions = tuple(question or more for question in entry.questions)
        self._limit_tools()

    def reset(self, seed: int | None = None) -> tuple[str, Info]:
        """Start the entry's dialogue; see `envs.gem.Env.reset`."""
        golden = tuple(call for turn in self.entry.truth for call in turn)
        steps: list[str] = []
        for turn in self.entry.truth:
            for first in range(0, len(turn), MAX_CALLS):
                steps.append("\n".join(map(format_call, turn[first : first + MAX_CALLS])))
            steps.append("That is done.")
        user = UserScript(self._questions)
        self._begin(Scenario(self.entry.make_state(), user, golden, (), tuple(steps)))
        self._true_state = self.entry.make_state()
        self._faults: list[str] = []
        self._turn_start = 0  # turns of the agent before this turn of the user
        self._calls_before = 0  # calls before this turn of the user
        self._limit_tools()
        return f"{self.world.policy}\n\nUser: {self._questions[0]}", {
            "task": self.task.name,
            "family": self.family,
            "seed": 0,
            "tools": copy.deepcopy(self.tools),
        }

    def spawn(self, same_state: bool = False, **kwargs: Any) -> WorldEnv:
        """Return a new environment of the entry, or a copy of this one in its state."""
        return super().spawn(True, **kwargs) if same_state else BfclEnv(self.entry)

    def _limit_tools(self, turn: int = 0) -> None:
        """Hide the tools that only a later turn brings."""
        later = {name for number, names in self.entry.missed if number > turn for name in names}
        self.toolbox = Toolbox([tool for tool in self.world.tools if tool.name not in later])
        self.tools = self.toolbox.schemas()

    def _take(self, action: str, info: Info) -> str:
        known = self.tools
        observation = super()._take(action, info)
        if self.tools != known:
            info["tools"] = copy.deepcopy(self.tools)
        if not self.user.over and self._turns - self._turn_start >= STEPS_A_TURN:
            self._faults.append(f"turn {self.user.stage} took more than {STEPS_A_TURN} steps")
            self.user.over = True
        return observation

    def _hear(self, message: str) -> str:
        """End the user's turn: with any message, because this user answers no questions."""
        self.user.heard.append(message)
        self._check_turn(self.user.stage)
        self.user.stage += 1
        self._turn_start = self._turns
        self._calls_before = len(self.calls)
        if self.user.stage == len(self.entry.questions):
            self.user.over = True
            return ""
        before = set(self.toolbox.by_name)
        self._limit_tools(self.user.stage)
        added = [tool.schema() for name, tool in self.toolbox.by_name.items() if name not in before]
        schemas = "".join(f"\n{json.dumps(schema)}" for schema in added)
        return self._questions[self.user.stage] + schemas

    def _call(self, call: ToolCall, info: Info) -> str:
        answer = super()._call(call, info)
        if answer.startswith(bfcl_authors.FAILED) and info["status"] == "ok":
            info["status"] = "tool_error"
        return answer

    def _check_turn(self, turn: int) -> None:
        answers = self._all.replay(self._true_state, self.entry.truth[turn])
        if not self.entry.truth[turn]:
            return
        if len(self.calls) == self._calls_before:
            self._faults.append(f"turn {turn}: no call")
        for name, state in self._true_state.items():
            ours = outcome(_as_dict(self.database[name]))
            theirs = outcome(_as_dict(state))
            if ours != theirs:
                places = ", ".join(differences(ours, theirs)[:3])
                self._faults.append(f"turn {turn}: the state of {name} differs in {places}")
        seen = collections.Counter(answer for _, answer in self.calls)
        missing = collections.Counter(map(told, answers)) - seen
        if missing:
            example = next(iter(missing))[:80]
            self._faults.append(
                f"turn {turn}: {missing.total()} answers of the true calls were never seen, such as"
                f" {example}"
            )

    def faults(self) -> list[str]:
        """Return what was wrong with the turns so far."""
        return list(self._faults)

    def definition(self) -> str:
        """Return the entry as text, which is equal for equal entries."""
        return json.dumps(dataclasses.asdict(self.entry), sort_keys=True)
