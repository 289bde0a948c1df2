r"""Conversion between GEM environments and gymnasium's, both ways.

    env = FromGymnasium("FrozenLake-v1", action_names=["Left", "Down", "Right", "Up"])
    vector = gymnasium.vector.SyncVectorEnv([lambda: ToGymnasium(make("game/sokoban"))])

FromGymnasium takes any gymnasium environment whose actions are text or one of a few (Discrete).
ToGymnasium takes any GEM environment; the result passes gymnasium's env_checker and runs in
gymnasium.vector, with shared memory and processes too.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from envs.gem.core import Env, Info, StepResult
from envs.gem.text_space import MAX_TEXT, AnyText

# Infos that differ between two runs of the same episode, which gymnasium's checker does not allow.
WALL_CLOCK_INFOS = ("seconds",)
ANSWER_OPEN = "<answer>"
ANSWER_CLOSE = "</answer>"
BOX_OPEN = "\\boxed{"
MAX_DIGITS = 9  # of an action that is given by its number
ActionSpace = spaces.Discrete | spaces.Text


class ToGymnasium(gymnasium.Env):
    """A GEM environment as a gymnasium one.

    Observations and actions are texts.

    Args:
      env: the GEM environment.
      render_mode: None, or "ansi" for a `render` that returns the last observation.
      max_text: characters of an observation. A longer one is cut at the front, since the newest
        part stands at the end.
    """

    # gymnasium declares it without ClassVar
    metadata: dict[str, Any] = {"render_modes": ["ansi"], "render_fps": 1}  # noqa: RUF012

    def __init__(self, env: Env, render_mode: str | None = None, max_text: int = MAX_TEXT) -> None:
        self.gem_env = env
        self.render_mode = render_mode
        self.observation_space = AnyText(max_text)
        self.action_space = AnyText(max_text)
        self._max_text = max_text
        self._shown = ""

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, Info]:
        """Begin an episode.

        Args:
          seed: the episode's. Without one, a generator draws it that the last given seed began, as
            gymnasium wants; if there was none, the GEM environment chooses.
          options: ignored.
        """
        super().reset(seed=seed)
        if seed is None and self._np_random is not None:
            seed = int(self.np_random.integers(1 << 31))
        observation, info = self.gem_env.reset(seed=seed)
        return self._show(observation), _repeatable(info)

    def step(self, action: str) -> StepResult:
        """Play one turn."""
        observation, reward, terminated, truncated, info = self.gem_env.step(action)
        shown = self._show(observation)
        return shown, float(reward), bool(terminated), bool(truncated), _repeatable(info)

    def render(self) -> str | None:
        """Return the last observation in the mode "ansi", else None."""
        return self._shown if self.render_mode == "ansi" else None

    def close(self) -> None:
        """Close the GEM environment, if it can be closed."""
        if hasattr(self.gem_env, "close"):
            self.gem_env.close()

    def _show(self, observation: Any) -> str:
        self._shown = str(observation)[-self._max_text :]
        return self._shown


def _repeatable(info: Info) -> Info:
    kept = {name: value for name, value in info.items() if name not in WALL_CLOCK_INFOS}
    return copy.deepcopy(kept)


@dataclasses.dataclass(frozen=True)
class GymnasiumTask:
    """The episode that is played: the environment's id, with the seed if one was given."""

    name: str
    family: str
    seed: int | None


class FromGymnasium(Env):
    r"""A gymnasium environment as a GEM one.

    The action is the last <answer>...</answer> or \boxed{...} of a turn, or the whole turn. For
    Discrete actions it is a name or a number. A turn without a valid action leaves the environment
    as it is; the observation then says what is valid.

    Observations are what `describe` returns, or the environment's own text, or its "ansi"
    rendering, or else their repr.

    Args:
      env: an environment, or an id for gymnasium.make.
      action_names: a name for each Discrete action, in their order.
      describe: turns an observation into text.
      instruction: begins the first observation; by default it explains the format of actions.
      max_turns: the episode is truncated after so many turns.
      seed: of the first reset that names none.
      **make_kwargs: arguments for gymnasium.make.

    Raises:
      ValueError: the action space is neither Discrete nor Text, or the names do not fit it.
    """

    def __init__(
        self,
        env: gymnasium.Env | str,
        action_names: Sequence[str] | None = None,
        describe: Callable[[Any], str] | None = None,
        instruction: str = "",
        max_turns: int = 200,
        seed: int | None = None,
        **make_kwargs: Any,
    ) -> None:
        self.gymnasium_env = gymnasium.make(env, **make_kwargs) if isinstance(env, str) else env
        space = self._action_space()
        if action_names is not None and _count_actions(space) != len(action_names):
            raise ValueError(
                f"{len(action_names)} action_names for {space}; give one for each of its actions,"
                " in their order"
            )
        self.action_names = list(action_names) if action_names else None
        self._describe = describe
        self.max_turns = max_turns
        self._turns = 0
        self._seed = seed
        spec = self.gymnasium_env.spec
        self._family = spec.id if spec else type(self.gymnasium_env.unwrapped).__name__
        self.task = GymnasiumTask(self._family, self._family, None)
        self._instruction = instruction or (
            f"Give one action in a turn, in the format <answer>action</answer>. {self._valid()}"
        )

    def reset(self, seed: int | None = None) -> tuple[str, Info]:
        if seed is None:
            seed = self._seed
        self._seed = None
        self._turns = 0
        observation, info = self.gymnasium_env.reset(seed=seed)
        name = self._family if seed is None else f"{self._family}/{seed}"
        self.task = GymnasiumTask(name, self._family, seed)
        described = {**info, "task": name, "family": self._family, "seed": seed}
        return f"{self._instruction}\n{self._text(observation)}", described

    def step(self, action: str) -> StepResult:
        self._turns += 1
        is_last_turn = self._turns >= self.max_turns
        chosen = self._parse(action)
        info = self._turn_info(action, is_valid=chosen is not None)
        if chosen is None:
            text = f"At turn {self._turns}, you did not provide a valid action. {self._valid()}"
            if is_last_turn:
                info["ending"] = "truncated_turns"
            return text, 0.0, False, is_last_turn, info
        observation, given_reward, terminated, truncated, own_info = self.gymnasium_env.step(chosen)
        reward = float(given_reward)
        truncated = truncated or (is_last_turn and not terminated)
        info = {**own_info, **info}
        if truncated and not terminated:  # gymnasium knows no success: the rewards say it
            info["ending"] = "truncated_turns"
        return self._text(observation), reward, bool(terminated), bool(truncated), info

    def _turn_info(self, action: str, is_valid: bool) -> Info:
        return {
            "metrics": {"action_is_valid": is_valid},
            "status": "ok" if is_valid else "malformed",
            "step_counter": self._turns,
            "use_tool": False,
            "tool_type": None,
            "parsed_action": action,
        }

    def sample_random_action(self) -> str:
        sample = self._action_space().sample()
        if isinstance(sample, str):
            return sample
        return f"{ANSWER_OPEN}{self._name(int(sample))}{ANSWER_CLOSE}"

    def spawn(self, same_state: bool = False, **kwargs: Any) -> FromGymnasium:
        """Return a deep copy of the environment.

        Args:
          same_state: keep the running episode. Otherwise the copy is to be reset first.
          **kwargs: `max_turns` and `seed` may be changed.
        """
        unknown = sorted(set(kwargs) - {"max_turns", "seed"})
        if unknown:
            raise ValueError(f"spawn cannot change {', '.join(unknown)}")
        clone = copy.deepcopy(self)
        default_seed = None if same_state else self._seed
        clone.max_turns = kwargs.get("max_turns", self.max_turns)
        clone._seed = kwargs.get("seed", default_seed)
        return clone

    def close(self) -> None:
        self.gymnasium_env.close()

    def _action_space(self) -> ActionSpace:
        space = self.gymnasium_env.action_space
        if isinstance(space, (spaces.Discrete, spaces.Text)):
            return space
        raise ValueError(
            f"actions of {self.gymnasium_env} are {space}; a text can name only those of Discrete"
            " and Text spaces"
        )

    def _name(self, action: int) -> str:
        """Return the text for a Discrete action."""
        space = self._action_space()
        if self.action_names is None or isinstance(space, spaces.Text):
            return str(action)
        return self.action_names[action - int(space.start)]

    def _valid(self) -> str:
        """Return a sentence that says which actions are valid."""
        space = self._action_space()
        if isinstance(space, spaces.Text):
            return f"An action is a text of {space.min_length} to {space.max_length} characters."
        if self.action_names:
            return f"Valid actions: {', '.join(self.action_names)}."
        return f"Valid actions: {space.start} to {space.start + space.n - 1}."

    def _parse(self, action: str) -> Any:
        """Return the gymnasium action that a turn names; None if it names none."""
        content = _answer(action).strip()
        space = self._action_space()
        if isinstance(space, spaces.Text):
            return content if space.contains(content) else None
        names = [name.casefold() for name in self.action_names or []]
        if content.casefold() in names:
            return space.start + names.index(content.casefold())
        number = _parse_number(content)
        return number if number is not None and space.contains(number) else None

    def _text(self, observation: Any) -> str:
        if self._describe is not None:
            return self._describe(observation)
        if isinstance(observation, str):
            return observation
        if self.gymnasium_env.render_mode == "ansi":
            return str(self.gymnasium_env.render())
        if isinstance(observation, (np.ndarray, np.generic)):
            return repr(observation.tolist())
        return repr(observation)


def _count_actions(space: ActionSpace) -> int | None:
    """Return the number of actions; None for texts."""
    return int(space.n) if isinstance(space, spaces.Discrete) else None


def _answer(action: str) -> str:
    r"""Return the last <answer>...</answer> or \boxed{...} of a turn, or the whole turn."""
    end = action.rfind(ANSWER_CLOSE)
    start = action.rfind(ANSWER_OPEN, 0, max(end, 0))
    if start >= 0:
        return action[start + len(ANSWER_OPEN) : end]
    box = action.rfind(BOX_OPEN)
    if box >= 0 and "}" in action[box:]:
        return action[box + len(BOX_OPEN) : action.index("}", box)]
    return action


def _parse_number(text: str) -> int | None:
    is_number = text.isascii() and text.removeprefix("-").isdigit()
    if not is_number or len(text) > MAX_DIGITS:
        return None
    return int(text)
