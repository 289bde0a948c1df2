"""GEM and gymnasium, both ways.

FromGymnasium makes a GEM environment of any gymnasium environment whose actions are text or one of
a few (Discrete). ToGymnasium makes a gymnasium environment of any GEM environment: it passes
gymnasium's env_checker, and runs in gymnasium.vector, shared memory and processes included.
"""

from __future__ import annotations

import copy
import dataclasses
import string
from collections.abc import Callable, Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.vector.utils import (
    create_shared_memory,
    read_from_shared_memory,
    write_to_shared_memory,
)

from envs.gem.core import Env, Info, StepResult

# characters of an observation or action; longer observations are cut (see ToGymnasium)
MAX_TEXT = 16_384
WALL_CLOCK = (
    "seconds",
)  # infos that differ between two runs of the same episode; gymnasium's checker wants those that do not


class AnyText(spaces.Text):
    """Any text of up to max_length characters. gymnasium's Text knows a closed set of characters
    only; samples are of printable ASCII.

    In shared memory a text is its UTF-8 bytes behind their number. Texts that would not fit are cut
    by the environment, not here.
    """

    def __init__(
        self, max_length: int = MAX_TEXT, seed: int | np.random.Generator | None = None
    ) -> None:
        super().__init__(
            max_length,
            min_length=0,
            charset=string.ascii_letters + string.digits + " .,<>/{}\\",
            seed=seed,
        )

    def sample(self, mask: Any = None, probability: Any = None) -> str:
        if mask is None and probability is None:
            mask = (
                int(self.np_random.integers(0, min(self.max_length, 64) + 1)),
                None,
            )  # a random action of 16,000 characters tests nothing
        return super().sample(mask, probability)

    def contains(self, x: Any) -> bool:
        return isinstance(x, str) and len(x) <= self.max_length

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AnyText) and self.max_length == other.max_length

    def __repr__(self) -> str:
        return f"AnyText({self.max_length})"


def _slot(space: AnyText) -> int:
    return 4 + 4 * space.max_length  # a length, and at most 4 bytes a character


@create_shared_memory.register(AnyText)
def _create(space: AnyText, n: int = 1, ctx: Any = None) -> Any:
    return ctx.Array("B", n * _slot(space))


@write_to_shared_memory.register(AnyText)
def _write(space: AnyText, index: int, value: str, shared_memory: Any) -> None:
    data = value.encode("utf-8", "surrogatepass")
    start = index * _slot(space)
    view = memoryview(shared_memory.get_obj()).cast("B")
    view[start : start + 4] = len(data).to_bytes(4, "little")
    view[start + 4 : start + 4 + len(data)] = data


class _SharedTexts(Sequence[str]):
    """The texts that stand in shared memory now. gymnasium asks once for the observations and
    copies them at each step: a copy is a plain tuple.
    """

    def __init__(self, space: AnyText, shared_memory: Any, n: int) -> None:
        self._slot, self._memory, self._n = _slot(space), shared_memory, n

    def __len__(self) -> int:
        return self._n

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return tuple(self)[index]
        start = range(self._n)[index] * self._slot
        view = memoryview(self._memory.get_obj()).cast("B")
        size = int.from_bytes(view[start : start + 4], "little")
        return bytes(view[start + 4 : start + 4 + size]).decode("utf-8", "surrogatepass")

    def __deepcopy__(self, memo: dict[int, Any]) -> tuple[str, ...]:
        return tuple(self)


@read_from_shared_memory.register(AnyText)
def _read(space: AnyText, shared_memory: Any, n: int = 1) -> _SharedTexts:
    return _SharedTexts(space, shared_memory, n)


class ToGymnasium(gymnasium.Env):
    """A GEM environment as a gymnasium one.

    Texts are observations and actions; `render` (mode "ansi") is the last observation.
    """

    metadata = {"render_modes": ["ansi"], "render_fps": 1}

    def __init__(self, env: Env, render_mode: str | None = None, max_text: int = MAX_TEXT) -> None:
        """max_text: length of the longest text; what is longer is cut at the front, since the
        newest stands at the end.
        """
        self.gem_env, self.render_mode = env, render_mode
        self.observation_space, self.action_space = AnyText(max_text), AnyText(max_text)
        self._shown = ""

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, Info]:
        """Without a seed the GEM environment chooses; once there was one, a generator seeded by it
        does, as gymnasium wants.
        """
        super().reset(seed=seed)
        drawn = (
            seed
            if seed is not None or self._np_random is None
            else int(self.np_random.integers(1 << 31))
        )
        observation, info = self.gem_env.reset(seed=drawn)
        return self._show(observation), _repeatable(info)

    def step(self, action: str) -> StepResult:
        observation, reward, terminated, truncated, info = self.gem_env.step(action)
        return (
            self._show(observation),
            float(reward),
            bool(terminated),
            bool(truncated),
            _repeatable(info),
        )

    def render(self) -> str | None:
        return self._shown if self.render_mode == "ansi" else None

    def close(self) -> None:
        getattr(self.gem_env, "close", lambda: None)()

    def _show(self, observation: Any) -> str:
        self._shown = str(observation)[-self.observation_space.max_length :]
        return self._shown


def _repeatable(info: Info) -> Info:
    return copy.deepcopy({name: value for name, value in info.items() if name not in WALL_CLOCK})


@dataclasses.dataclass(frozen=True)
class GymnasiumTask:
    """Which episode is played: the environment's id, and the seed if one was given."""

    name: str
    family: str
    seed: int | None


class FromGymnasium(Env):
    """A gymnasium environment as a GEM one.

    An action's text: the last <answer>...</answer> or \\boxed{...}, or the whole turn; for Discrete
    actions a name from `action_names`, or the number. Text that is no action costs a turn: the
    environment does not move, the observation says what is valid. Observations are text: the
    environment's own, or its "ansi" rendering, or what `describe` makes of them, or else their
    repr.
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
        """env: an environment, or an id for gymnasium.make, which gets make_kwargs. seed: of the
        first reset that names none.
        """
        self.gymnasium_env = gymnasium.make(env, **make_kwargs) if isinstance(env, str) else env
        space = self.gymnasium_env.action_space
        if not isinstance(space, (spaces.Discrete, spaces.Text)):
            raise ValueError(
                f"actions of {self.gymnasium_env} are {space}; a text can name only those of"
                " Discrete and Text spaces"
            )
        if action_names is not None and (
            not isinstance(space, spaces.Discrete) or len(action_names) != space.n
        ):
            raise ValueError(
                f"{len(action_names)} action_names for {space}; give one for each of its actions,"
                " in their order"
            )
        self.action_names = list(action_names) if action_names else None
        self._describe, self._max_turns, self._turns, self._seed = describe, max_turns, 0, seed
        spec = self.gymnasium_env.spec
        self._family = spec.id if spec else type(self.gymnasium_env.unwrapped).__name__
        self.task = GymnasiumTask(self._family, self._family, None)
        self._instruction = (
            instruction
            or f"Give one action in a turn, in the format <answer>action</answer>. {self._valid()}"
        )

    def reset(self, seed: int | None = None) -> tuple[str, Info]:
        seed, self._seed = (self._seed if seed is None else seed), None
        observation, info = self.gymnasium_env.reset(seed=seed)
        self._turns = 0
        self.task = GymnasiumTask(
            self._family if seed is None else f"{self._family}/{seed}", self._family, seed
        )
        return f"{self._instruction}\n{self._text(observation)}", {
            **info,
            "task": self.task.name,
            "family": self._family,
            "seed": seed,
        }

    def step(self, action: str) -> StepResult:
        self._turns += 1
        late = self._turns >= self._max_turns
        chosen = self._read(action)
        told: Info = {
            "metrics": {"action_is_valid": chosen is not None},
            "status": "malformed" if chosen is None else "ok",
            "step_counter": self._turns,
            "use_tool": False,
            "tool_type": None,
            "parsed_action": action,
        }
        if chosen is None:
            observation: Any = (
                f"At turn {self._turns}, you did not provide a valid action. {self._valid()}"
            )
            reward, terminated, truncated = 0.0, False, late
        else:
            seen, reward, terminated, truncated, info = self.gymnasium_env.step(chosen)
            observation, truncated, told = (
                self._text(seen),
                truncated or (late and not terminated),
                {**info, **told},
            )
        if (
            terminated or truncated
        ):  # gymnasium knows no success; a last reward above 0 is taken for one
            told["ending"] = (
                "truncated_turns" if not terminated else "success" if reward > 0 else "failure"
            )
        return observation, float(reward), bool(terminated), bool(truncated), told

    def sample_random_action(self) -> str:
        sample = self.gymnasium_env.action_space.sample()
        if isinstance(sample, str):
            return sample
        return f"<answer>{self._name(int(sample))}</answer>"

    def spawn(self, same_state: bool = False, **kwargs: Any) -> FromGymnasium:
        """A copy of the running environment (deep copy); without same_state it waits for its reset,
        and kwargs may set max_turns and seed.
        """
        if unknown := set(kwargs) - {"max_turns", "seed"}:
            raise ValueError(f"spawn cannot change {', '.join(sorted(unknown))}")
        twin = copy.deepcopy(self)
        twin._max_turns = kwargs.get("max_turns", self._max_turns)
        twin._seed = kwargs.get("seed", None if same_state else self._seed)
        return twin

    def close(self) -> None:
        self.gymnasium_env.close()

    def _name(self, index: int) -> str:
        first = int(self.gymnasium_env.action_space.start)
        return self.action_names[index - first] if self.action_names else str(index)

    def _valid(self) -> str:
        space = self.gymnasium_env.action_space
        if isinstance(space, spaces.Text):
            return f"An action is a text of {space.min_length} to {space.max_length} characters."
        return (
            "Valid actions: "
            + (
                ", ".join(self.action_names)
                if self.action_names
                else f"{space.start} to {space.start + space.n - 1}"
            )
            + "."
        )

    def _read(self, action: str) -> Any:
        end = action.rfind("</answer>")
        start = action.rfind("<answer>", 0, max(end, 0))
        box = action.rfind("\\boxed{")
        if start >= 0:
            content = action[start + len("<answer>") : end]
        elif box >= 0 and "}" in action[box:]:
            content = action[box + len("\\boxed{") : action.index("}", box)]
        else:
            content = action
        content = content.strip()
        space = self.gymnasium_env.action_space
        if isinstance(space, spaces.Text):
            return content if space.contains(content) else None
        names = [name.casefold() for name in self.action_names or []]
        if content.casefold() in names:
            return space.start + names.index(content.casefold())
        number = (
            int(content)
            if content.isascii() and content.lstrip("-").isdigit() and len(content) < 10
            else None
        )
        return number if number is not None and space.contains(number) else None

    def _text(self, observation: Any) -> str:
        if self._describe is not None:
            return self._describe(observation)
        if isinstance(observation, str):
            return observation
        if self.gymnasium_env.render_mode == "ansi":
            return str(self.gymnasium_env.render())
        return repr(
            observation.tolist()
            if isinstance(observation, (np.ndarray, np.generic))
            else observation
        )
