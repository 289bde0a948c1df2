r"""The base of all text games: seeds, turns, reading an action out of any text, and the infos.

An action is a turn of text. The game reads the first of these that the turn says after its
thoughts: one tool call; the last <answer>...</answer> (ROLL's form); the last \boxed{...} (gem's
form); the whole text. A turn that names no action of the game costs a turn and `format_penalty`,
and the observation explains what an action is.

The board is in `info["suffix"]`, as in ROLL and gem, whose observation wrappers put the newest
board last and drop older ones. With state_in="observation" it ends each observation instead, for
loops that only append.
"""

from __future__ import annotations

import copy
import dataclasses
import random
from typing import Any, ClassVar, NamedTuple

from envs.gem import Env, Info, StepResult, ToolCallError, parse_tool_calls, read_turn

STATE_IN = ("suffix", "observation")
_TOO_LONG = 200  # characters; no action of any game is longer


@dataclasses.dataclass(frozen=True)
class GameTask:
    """The game of an episode; its name "family/seed" suffices to play it again.

    `success` is the sum of rewards from which on it counts as won.
    """

    name: str
    family: str
    seed: int
    success: float = 1.0


@dataclasses.dataclass(frozen=True)
class Move:
    """The result of an action.

    `effective` is True if the action changed the world or gave the player information.
    """

    observation: str
    reward: float = 0.0
    effective: bool = True
    won: bool = False
    lost: bool = False


class Reading(NamedTuple):
    """The parts of a turn.

    `content` is the text meant as the action (None where the form is wrong), `tool` the tool that
    was called, and `complaint` what is wrong with the form.
    """

    content: str | None
    thoughts: str
    tool: str | None = None
    complaint: str = ""


def tool(name: str, description: str, **parameters: dict[str, Any]) -> dict[str, Any]:
    """Return a function's schema as chat templates take it, with all parameters required."""
    schema = {"type": "object", "properties": parameters, "required": list(parameters)}
    return {
        "type": "function",
        "function": {"name": name, "description": description, "parameters": schema},
    }


class TextGame(Env):
    """The base class of seeded games.

    reset(seed) plays that seed; reset() plays the constructor's seed first and then seeds drawn
    from it. Every game that reset makes can be won within max_turns.

    A step's reward is what the game documents, plus `format_penalty` for a turn without an action.
    `terminated` means that the game is won or lost, `truncated` that `max_turns` are used up.
    `info["ending"]` is success, failure or truncated_turns.
    """

    family = ""
    tools: ClassVar[list[dict[str, Any]]] = []

    def __init__(
        self,
        seed: int = 0,
        max_turns: int = 20,
        format_penalty: float = 0.0,
        state_in: str = "suffix",
    ) -> None:
        if state_in not in STATE_IN:
            raise ValueError(f"state_in is {state_in!r}; it is one of {', '.join(STATE_IN)}")
        if not 1 <= max_turns <= 10_000:
            raise ValueError(f"max_turns is {max_turns}; it is between 1 and 10000")
        self.max_turns = max_turns
        self.format_penalty = format_penalty
        self.state_in = state_in
        self._seed = seed
        self._resets = 0
        self._turns = 0
        self._over = True
        self._next_seeds = random.Random(f"{self.family}/{seed}/next")
        self._random_actions = random.Random(f"{self.family}/{seed}/actions")
        self._rng = random.Random()
        self.task = GameTask(f"{self.family}/{seed}", self.family, seed)

    # -- Methods that a game implements
    # ---------------------------------------------------------------------------------------------

    def _new_game(self, rng: random.Random) -> None:
        """Set up a game from random draws."""
        raise NotImplementedError

    def _instructions(self) -> str:
        """Return the rules as the player reads them at the start."""
        raise NotImplementedError

    def _success_reward(self) -> float:
        """Return the sum of rewards from which on the game counts as won."""
        return 1.0

    def _board(self) -> str:
        """Return the state as the player sees it."""
        raise NotImplementedError

    def _read(self, content: str) -> str | None:
        """Return the action that the content names, in the game's own spelling, or None."""
        raise NotImplementedError

    def _act(self, action: str) -> Move:
        """Carry out an action."""
        raise NotImplementedError

    def legal_actions(self) -> list[str]:
        """Return the actions that the game accepts now, or some of them where they are endless."""
        raise NotImplementedError

    def demonstrator_action(self) -> str | None:
        """Return the planner's next move as a turn, or None where the game cannot be won."""
        raise NotImplementedError

    # -- GEM
    # ---------------------------------------------------------------------------------------------

    def reset(self, seed: int | None = None) -> tuple[str, Info]:
        """Start a game and return the instructions with the board; see `envs.gem.Env.reset`."""
        if seed is None:
            seed = self._next_seeds.randrange(1 << 31) if self._resets else self._seed
        self._resets += 1
        name = f"{self.family}/{seed}"
        self.task = GameTask(name, self.family, seed, self._success_reward())
        self._rng = random.Random(f"{self.family}/{seed}")
        self._turns = 0
        self._over = False
        self._new_game(self._rng)
        info: Info = {
            "task": self.task.name,
            "family": self.family,
            "seed": seed,
            "tools": copy.deepcopy(self.tools),
        }
        return self._tell(self._instructions(), info), info

    def step(self, action: str) -> StepResult:
        """Play one turn; see `envs.gem.Env.step`.

        Raises:
          RuntimeError: the game is over, or was not begun by a reset.
        """
        if self._over:
            raise RuntimeError(f"the game {self.task.name} is over or not begun; call reset()")
        self._turns += 1
        reading = self._read_turn(action)
        meant = None
        if reading.content is not None and len(reading.content) <= _TOO_LONG:
            meant = self._read(reading.content)
        move = self._without_action(reading.complaint) if meant is None else self._act(meant)
        penalty = self.format_penalty if meant is None else 0.0
        terminated = move.won or move.lost
        truncated = self._turns >= self.max_turns and not terminated
        info: Info = {
            "metrics": {
                "action_is_effective": move.effective,
                "action_is_valid": meant is not None,
                "success": move.won,
                "format_penalty": penalty,
            },
            "action": meant,
            "action_content": (reading.content or "")[:_TOO_LONG],
            "think_content": reading.thoughts,
            "parsed_action": meant if reading.tool and meant is not None else action,
            "tool_type": reading.tool,
            "use_tool": reading.tool is not None,
            "tool_arguments": self._tool_arguments(reading),
            "status": "ok" if meant is not None else "malformed",
            "step_counter": self._turns,
        }
        if terminated or truncated:
            self._over = True
            info["ending"] = _ending(move)
        observation = self._tell(move.observation, info)
        return observation, move.reward + penalty, terminated, truncated, info

    async def areset(self, seed: int | None = None) -> tuple[str, Info]:
        """Start a game, for callers in an event loop."""
        return self.reset(seed)  # microseconds: a thread would cost more

    async def astep(self, action: str) -> StepResult:
        """Play one turn, for callers in an event loop."""
        return self.step(action)

    async def aclose(self) -> None:
        """Close the game, for callers in an event loop."""
        self.close()

    def sample_random_action(self) -> str:
        """Return a random legal action as a turn."""
        return as_answer(self._random_actions.choice(self.legal_actions()))

    def spawn(self, same_state: bool = False, **kwargs: Any) -> TextGame:
        """Return a new game of the same settings.

        Args:
          same_state: return a copy that continues from this position, with the same random draws to
            come. Then only max_turns, format_penalty and state_in may be changed.
          **kwargs: arguments of the constructor to change.

        Raises:
          ValueError: same_state with another argument.
        """
        if not same_state:
            return type(self)(**{**self._settings(), **kwargs})
        if unknown := set(kwargs) - {"max_turns", "format_penalty", "state_in"}:
            raise ValueError(
                f"spawn(same_state=True) cannot change {', '.join(sorted(unknown))}: the game is"
                " going on"
            )
        twin = copy.deepcopy(self)
        for name, value in kwargs.items():
            setattr(twin, name, value)
        return twin

    def get_state(self) -> dict[str, Any]:
        """Return the running game as plain data, for `set_state` of a game of equal settings."""
        return copy.deepcopy(vars(self))

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue the game that `get_state` returned."""
        vars(self).update(copy.deepcopy(state))

    # -- Helpers
    # ---------------------------------------------------------------------------------------------

    def _settings(self) -> dict[str, Any]:
        """Return the constructor's arguments; a game with more of them adds its own."""
        return {
            "seed": self._seed,
            "max_turns": self.max_turns,
            "format_penalty": self.format_penalty,
            "state_in": self.state_in,
        }

    def _tell(self, observation: str, info: Info) -> str:
        """Add the board to the observation or to the info."""
        board = self._board()
        if self.state_in == "suffix":
            info["suffix"] = board
            return observation
        return f"{observation}\n{board}"

    def _without_action(self, complaint: str) -> Move:
        """Return the move of a turn without an action, which counts as a turn all the same."""
        known = ", ".join(self.legal_actions()[:4])
        return Move(
            f"At turn {self._turns}, you did not provide a valid action{complaint}. Valid are for"
            f" example: {known}.",
            effective=False,
        )

    def _read_turn(self, action: str) -> Reading:
        """Find the part of a turn that is meant as the action; the module says in which order."""
        thoughts, spoken, _, is_thinking = read_turn(action)
        if is_thinking or "<tool_call>" in spoken or "<function=" in spoken:
            return self._read_call(action, thoughts)
        end = spoken.rfind("</answer>")
        start = spoken.rfind("<answer>", 0, max(end, 0))
        if start >= 0:
            return Reading(spoken[start + len("<answer>") : end].strip(), thoughts)
        start = spoken.rfind("\\boxed{")
        end = spoken.find("}", start)
        if start >= 0 and end >= 0:
            return Reading(spoken[start + len("\\boxed{") : end].strip(), thoughts)
        return Reading(spoken.strip(), thoughts)

    def _read_call(self, action: str, thoughts: str) -> Reading:
        """Read the action of a turn with tool calls: the call's arguments, separated by spaces.

        A turn that ends within its thoughts is read so, too: it has no call and is told why.
        """
        function = self.tools[0]["function"]
        needed = function["parameters"]["required"]
        try:
            calls = parse_tool_calls(action)
        except ToolCallError as error:
            return Reading(None, thoughts, complaint=f": {error}")
        if len(calls) != 1:
            complaint = f": {len(calls)} tool calls in one turn; make one"
            return Reading(None, thoughts, complaint=complaint)
        (call,) = calls
        fits = call.name == function["name"] and set(call.arguments) == set(needed)
        if not fits or not all(isinstance(one, (str, int)) for one in call.arguments.values()):
            complaint = f": the tool is {function['name']}({', '.join(needed)})"
            return Reading(None, thoughts, complaint=complaint)
        try:
            content = " ".join(str(call.arguments[name]) for name in needed)
        except ValueError:  # an integer of more than 4300 digits
            return Reading(None, thoughts, complaint=": a number has too many digits")
        return Reading(content.strip(), thoughts, tool=function["name"])

    def _tool_arguments(self, reading: Reading) -> dict[str, str]:
        if not reading.tool or not reading.content:
            return {}
        names = self.tools[0]["function"]["parameters"]["required"]
        return dict(zip(names, reading.content.split(" "), strict=False))


def _ending(move: Move) -> str:
    if move.won:
        return "success"
    return "failure" if move.lost else "truncated_turns"


def as_answer(action: str) -> str:
    """Return the turn that plays an action."""
    return f"<answer>{action}</answer>"
