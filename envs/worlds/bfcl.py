"""BFCL's multi-turn form over the worlds here: executed calls, state and answers compared after
every turn of the user.

Files (Berkeley Function-Calling Leaderboard, v3 and v4): FILE.json has a JSON object a line with
id, question (a list of turns, each a list of messages), initial_config (a state for each class),
involved_classes, and perhaps excluded_function and missed_function; possible_answer/FILE.json has
id and ground_truth, for each turn a list of calls written in Python. A turn of the user is over
when the agent answers without a call.

A turn is right (their multi_turn_checker) if the state of every class equals the state after the
true calls, private parts left out, and each answer of the true calls of this turn is among all
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
from envs.worlds.base import Scenario, World, WorldEnv, WorldTask, differences, turns
from envs.worlds.published import BROKEN, FormatError, field, known_world, read_lines
from envs.worlds.tools import Database, Tool, Toolbox, outcome, told
from envs.worlds.user import UserScript

STEPS_A_TURN = 20  # BFCL's limit
MORE_FUNCTIONS = "More functions are available to you now; please go on with them."


@dataclasses.dataclass(frozen=True)
class Entry:
    """One line of a file with its true calls.

    `missed`: tools that come into being with that turn.
    """

    name: str
    questions: tuple[str, ...]
    initial_config: dict[str, Database]
    truth: tuple[tuple[ToolCall, ...], ...]
    excluded: tuple[str, ...] = ()
    missed: tuple[tuple[int, tuple[str, ...]], ...] = ()

    def make_env(self) -> BfclEnv:
        return BfclEnv(self)


def load(path: pathlib.Path) -> list[Entry]:
    """The entries of a file, with the answers of possible_answer/ beside it.

    Raises FormatError, for an unknown class too.
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
    for one in classes:
        known_world(str(one), where)
        field(config, one, dict, f"{where}: initial_config")
    questions = [_question(turn, where) for turn in field(entry, "question", list, where)]
    if len(questions) != len(ground_truth) or not questions:
        raise FormatError(
            f"{truth_where}: ground_truth has {len(ground_truth)} turns and the question"
            f" {len(questions)}"
        )
    missed = {
        int(turn): tuple(names)
        for turn, names in field(entry, "missed_function", dict, where, {}).items()
    }
    excluded = tuple(field(entry, "excluded_function", list, where, []))
    made = Entry(
        name,
        tuple(questions),
        {one: config[one] for one in classes},
        (),
        excluded,
        tuple(sorted(missed.items())),
    )
    world = composite(made)
    parameters = {tool.name: list(tool.parameters) for tool in world.tools}
    truth = tuple(
        tuple(parse_call(text, parameters, f"{truth_where}: turn {number}") for text in turn)
        for number, turn in enumerate(ground_truth)
    )
    made = dataclasses.replace(made, truth=truth)
    try:
        Toolbox(world.tools).replay(
            copy.deepcopy(made.initial_config), [call for turn in truth for call in turn]
        )
    except (ValueError, *BROKEN) as error:  # a config of another shape breaks a tool anywhere
        raise FormatError(
            f"{truth_where}: the true calls do not run on initial_config: {type(error).__name__}:"
            f" {error}"
        ) from error
    return made


def _question(turn: Any, where: str) -> str:
    """The user's messages of a turn; none means that functions were added."""
    if not isinstance(turn, list):
        raise FormatError(
            f"{where}: a turn of 'question' is {type(turn).__name__} and must be list"
        )
    return "\n".join(field(message, "content", str, where) for message in turn) or MORE_FUNCTIONS


def parse_call(text: Any, parameters: dict[str, list[str]], where: str) -> ToolCall:
    """A call written in Python, "book_flight(traveller_id='T1', flight_id='F2')", as data.

    Nothing is evaluated but literals.
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
    """The classes of an entry as one world whose database has a part for each."""
    tools: list[Tool] = []
    for name in entry.initial_config:
        tools += [
            dataclasses.replace(tool, run=functools.partial(_in_part, tool, name))
            for tool in known_world(name, entry.name).tools
            if tool.name not in entry.excluded
        ]
    names = sorted(entry.initial_config)

    def random_write(rng: random.Random, database: Database) -> ToolCall:
        name = rng.choice(names)
        return known_world(name, entry.name).random_write(rng, database[name])

    policy = (
        "You serve a user by calling functions. When a request is done, or cannot be, answer"
        " without a call; the next request may follow."
    )
    return World(
        "bfcl",
        policy,
        tuple(tools),
        lambda rng, level: None,
        random_write,
        STEPS_A_TURN * len(entry.questions),
    )


def _in_part(tool: Tool, part: str, database: Database, **arguments: Any) -> Any:
    return tool.run(database[part], **arguments)


class BfclEnv(WorldEnv):
    """One entry; the seed changes nothing.

    Ends with the last turn of the user, or as a failure where one takes more than 20 steps.
    """

    unexpected = BROKEN

    def __init__(self, entry: Entry) -> None:
        super().__init__(composite(entry))
        self.entry = entry
        self.family = "bfcl"
        self.difficulty = entry.name.rsplit("_", 1)[0]
        self.task = WorldTask(entry.name, "bfcl", 0)
        self._all = Toolbox(self.world.tools)
        self._limit_tools()

    def reset(self, seed: int | None = None) -> tuple[str, Info]:
        golden = tuple(call for turn in self.entry.truth for call in turn)
        demonstration = turns(
            *(step for turn in self.entry.truth for step in (*turn, "That is done."))
        )
        self._begin(
            Scenario(
                self.entry.initial_config,
                UserScript(self.entry.questions),
                golden,
                (),
                demonstration,
            )
        )
        self._true_state = copy.deepcopy(self.entry.initial_config)
        self._faults = []
        self._began_turn = 0
        self._called = 0
        self._limit_tools()
        return f"{self.world.policy}\n\nUser: {self.entry.questions[0]}", {
            "task": self.task.name,
            "family": self.family,
            "seed": 0,
            "tools": copy.deepcopy(self.tools),
        }

    def spawn(self, same_state: bool = False, **kwargs: Any) -> WorldEnv:
        return super().spawn(True, **kwargs) if same_state else BfclEnv(self.entry)

    def _limit_tools(self, turn: int = 0) -> None:
        """Tools that a later turn brings are not there yet."""
        later = {name for number, names in self.entry.missed if number > turn for name in names}
        self.toolbox = Toolbox([tool for tool in self.world.tools if tool.name not in later])
        self.tools = self.toolbox.schemas()

    def _take(self, spoken: str, info: Info) -> str:
        known = self.tools
        observation = super()._take(spoken, info)
        if self.tools != known:
            info["tools"] = copy.deepcopy(self.tools)
        if not self.user.over and self._turns - self._began_turn >= STEPS_A_TURN:
            self._faults.append(f"turn {self.user.stage} took more than {STEPS_A_TURN} steps")
            self.user.over = True
        return observation

    def _hear(self, message: str) -> str:
        """Any message ends the user's turn: there is nobody to ask."""
        self.user.heard.append(message)
        self._check_turn(self.user.stage)
        self.user.stage += 1
        self._began_turn, self._called = self._turns, len(self.calls)
        if self.user.stage == len(self.entry.questions):
            self.user.over = True
            return ""
        before = set(self.toolbox.by_name)
        self._limit_tools(self.user.stage)
        added = [tool.schema() for name, tool in self.toolbox.by_name.items() if name not in before]
        return self.entry.questions[self.user.stage] + "".join(
            f"\n{json.dumps(schema)}" for schema in added
        )

    def _check_turn(self, turn: int) -> None:
        answers = self._all.replay(self._true_state, self.entry.truth[turn])
        if not self.entry.truth[turn]:
            return
        if len(self.calls) == self._called:
            self._faults.append(f"turn {turn}: no call")
        for name, state in self._true_state.items():
            if outcome(self.database[name]) != outcome(state):
                self._faults.append(
                    f"turn {turn}: the state of {name} differs in"
                    f" {', '.join(differences(outcome(self.database[name]), outcome(state))[:3])}"
                )
        missing = collections.Counter(map(told, answers)) - collections.Counter(
            answer for _, answer in self.calls
        )
        if missing:
            self._faults.append(
                f"turn {turn}: {missing.total()} answers of the true calls were never seen, such as"
                f" {next(iter(missing))[:80]}"
            )

    def faults(self) -> list[str]:
        return list(self._faults)

    def definition(self) -> str:
        return json.dumps(dataclasses.asdict(self.entry), sort_keys=True)
