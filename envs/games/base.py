"""What all text games share: seeds, turns, reading an action out of any text, and the infos that
trainers read.

An action is a turn of text. Read, in this order: one tool call; the last <answer>...</answer>
(ROLL's form); the last \\boxed{...} (gem's form); the whole text, thoughts and chat marks removed.
What names no action of the game costs a turn and `format_penalty`, and the observation says what an
action is.

The board is told in `info["suffix"]`, as ROLL and gem do (their observation wrappers put the newest
board last and keep no older ones), or with state_in="observation" at the end of each observation,
for loops that only append.
"""

from __future__ import annotations

import copy
import dataclasses
import random
from typing import Any

from envs.gem import Env, Info, StepResult, ToolCallError, parse_tool_calls

STATE_IN = ("suffix", "observation")
CHAT_MARKS = ("<|im_start|>", "<|im_end|>")
_TOO_LONG = 200  # characters; no action of any game is longer


@dataclasses.dataclass(frozen=True)
class GameTask:
    """Which game an episode is: its name "family/seed" is all that is needed to play it again."""

    name: str
    family: str
    seed: int


@dataclasses.dataclass(frozen=True)
class Move:
    """What an action did. `effective`: the world changed, or something was learnt."""

    observation: str
    reward: float = 0.0
    effective: bool = True
    won: bool = False
    lost: bool = False


def tool(name: str, description: str, **parameters: dict[str, Any]) -> dict[str, Any]:
    """A function's schema in the form that chat templates take; all parameters are required."""
    schema = {"type": "object", "properties": parameters, "required": list(parameters)}
    return {
        "type": "function",
        "function": {"name": name, "description": description, "parameters": schema},
    }


class TextGame(Env):
    """A seeded game. reset(seed) plays that seed; reset() plays the constructor's seed first, then
    seeds drawn from it.

    Rewards: what the game documents, `format_penalty` for a turn without an action, 0 otherwise.
    `terminated` is a won or lost game, `truncated` the end of `max_turns`; `info["ending"]` is
    success, failure or truncated_turns. Every game that reset makes can be won within max_turns.
    """

    family = ""
    tools: list[dict[str, Any]] = []

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
        self.max_turns, self.format_penalty, self.state_in = max_turns, format_penalty, state_in
        self._seed, self._resets, self._turns, self._over = seed, 0, 0, True
        self._next_seeds = random.Random(f"{self.family}/{seed}/next")
        self._random_actions = random.Random(f"{self.family}/{seed}/actions")
        self._rng = random.Random()
        self.task = GameTask(f"{self.family}/{seed}", self.family, seed)

    # -- what a game brings
    # ---------------------------------------------------------------------------------------------

    def _new_game(self, rng: random.Random) -> None:
        raise NotImplementedError

    def _instructions(self) -> str:
        raise NotImplementedError

    def _board(self) -> str:
        """The state as the player sees it."""
        raise NotImplementedError

    def _read(self, content: str) -> str | None:
        """The action that the content names, in the game's own spelling; None for none."""
        raise NotImplementedError

    def _act(self, action: str) -> Move:
        raise NotImplementedError

    def legal_actions(self) -> list[str]:
        """Actions that the game understands at this moment; for endless ones, some."""
        raise NotImplementedError

    def demonstrator_action(self) -> str | None:
        """What a planner does next, as a turn; None where the game cannot be won any more."""
        raise NotImplementedError

    # -- GEM
    # ---------------------------------------------------------------------------------------------

    def reset(self, seed: int | None = None) -> tuple[str, Info]:
        if seed is None:
            seed = self._next_seeds.randrange(1 << 31) if self._resets else self._seed
        self._resets += 1
        self.task = GameTask(f"{self.family}/{seed}", self.family, seed)
        self._rng = random.Random(f"{self.family}/{seed}")
        self._turns, self._over = 0, False
        self._new_game(self._rng)
        info: Info = {
            "task": self.task.name,
            "family": self.family,
            "seed": seed,
            "tools": copy.deepcopy(self.tools),
        }
        return self._tell(self._instructions(), info), info

    def step(self, action: str) -> StepResult:
        if self._over:
            raise RuntimeError(f"the game {self.task.name} is over or not begun; call reset()")
        self._turns += 1
        content, thoughts, tool_name, complaint = self._content(action)
        meant = self._read(content) if content is not None and len(content) <= _TOO_LONG else None
        if meant is None:
            move = self._without_action(complaint)
        else:
            move = self._act(meant)
        penalty = self.format_penalty if meant is None else 0.0
        truncated = self._turns >= self.max_turns and not (move.won or move.lost)
        info: Info = {
            "metrics": {
                "action_is_effective": move.effective,
                "action_is_valid": meant is not None,
                "success": move.won,
                "format_penalty": penalty,
            },
            "action": meant,
            "action_content": (content or "")[:_TOO_LONG],
            "think_content": thoughts,
            "parsed_action": meant if tool_name and meant is not None else action,
            "tool_type": tool_name,
            "use_tool": tool_name is not None,
            "tool_arguments": (
                dict(zip(self.tools[0]["function"]["parameters"]["required"], content.split(" ")))
                if tool_name and content
                else {}
            ),
            "status": "ok" if meant is not None else "malformed",
            "step_counter": self._turns,
        }
        if move.won or move.lost or truncated:
            self._over = True
            info["ending"] = (
                "success" if move.won else "failure" if move.lost else "truncated_turns"
            )
        observation = self._tell(move.observation, info)
        return observation, move.reward + penalty, move.won or move.lost, truncated, info

    async def areset(self, seed: int | None = None) -> tuple[str, Info]:
        return self.reset(seed)  # microseconds: a thread would cost more

    async def astep(self, action: str) -> StepResult:
        return self.step(action)

    async def aclose(self) -> None:
        self.close()

    def sample_random_action(self) -> str:
        return as_answer(self._random_actions.choice(self.legal_actions()))

    def spawn(self, same_state: bool = False, **kwargs: Any) -> TextGame:
        """same_state: a copy that goes on from the same position, and as the original would; the
        arguments then change the rules only.
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
        """The running game as plain data, for set_state of a game of the same settings."""
        return copy.deepcopy(vars(self))

    def set_state(self, state: dict[str, Any]) -> None:
        vars(self).update(copy.deepcopy(state))

    # -- small helpers
    # ---------------------------------------------------------------------------------------------

    def _settings(self) -> dict[str, Any]:
        """The constructor's arguments; games with more of them add theirs."""
        return {
            "seed": self._seed,
            "max_turns": self.max_turns,
            "format_penalty": self.format_penalty,
            "state_in": self.state_in,
        }

    def _tell(self, observation: str, info: Info) -> str:
        board = self._board()
        if self.state_in == "suffix":
            info["suffix"] = board
            return observation
        return f"{observation}\n{board}"

    def _without_action(self, complaint: str) -> Move:
        """A turn without an action; time passes all the same."""
        known = ", ".join(self.legal_actions()[:4])
        return Move(
            f"At turn {self._turns}, you did not provide a valid action{complaint}. Valid are for"
            f" example: {known}.",
            effective=False,
        )

    def _content(self, action: str) -> tuple[str | None, str, str | None, str]:
        """(what is said to be the action, thoughts, the tool that was called, a complaint about the
        form).
        """
        for mark in CHAT_MARKS:
            action = action.replace(mark, "")
        thoughts, spoken = "", action
        if "</think>" in action:
            thoughts, spoken = action.rsplit("</think>", 1)
            thoughts = thoughts.replace("<think>", "").strip()
        if "<tool_call>" in spoken or "<function=" in spoken:
            return self._called(spoken, thoughts)
        end = spoken.rfind("</answer>")
        start = spoken.rfind("<answer>", 0, max(end, 0))
        if start >= 0:
            return spoken[start + len("<answer>") : end].strip(), thoughts, None, ""
        start = spoken.rfind("\\boxed{")
        end = spoken.find("}", start)
        if start >= 0 and end >= 0:
            return spoken[start + len("\\boxed{") : end].strip(), thoughts, None, ""
        return spoken.strip(), thoughts, None, ""

    def _called(self, spoken: str, thoughts: str) -> tuple[str | None, str, str | None, str]:
        function = self.tools[0]["function"]
        try:
            calls = parse_tool_calls(spoken)
        except ToolCallError as error:
            return None, thoughts, None, f": {error}"
        if len(calls) != 1:
            return None, thoughts, None, f": {len(calls)} tool calls in one turn; make one"
        arguments, needed = calls[0].arguments, function["parameters"]["required"]
        if (
            calls[0].name != function["name"]
            or set(arguments) != set(needed)
            or not all(isinstance(one, (str, int)) for one in arguments.values())
        ):
            return None, thoughts, None, f": the tool is {function['name']}({', '.join(needed)})"
        try:
            content = " ".join(str(arguments[name]) for name in needed)
        except ValueError:  # an integer of more than 4300 digits
            return None, thoughts, None, ": a number has too many digits"
        return content.strip(), thoughts, function["name"], ""


def as_answer(action: str) -> str:
    """The turn that plays an action."""
    return f"<answer>{action}</answer>"
