"""Wrappers around environments: whole-history observations, chat templates, episode statistics;
names and behaviour of gem-llm 0.1.0.

Order matters: first ToolEnvWrapper (envs.gem.tools), then an observation wrapper, last
EpisodeTrackingWrapper. `get_wrapper_fns("concat,episode_tracking")` gives the list that make_vec
takes.
"""

from __future__ import annotations

import copy
from collections import deque
from typing import Any, Protocol

from envs.gem.core import Env, Info, StepResult, close_async, reset_async, step_async


class EnvWrapper(Env):
    """Passes everything on to `env`.

    Subclasses override reset and step, or only `after_reset` and `after_step`.

    Attributes that the wrapper lacks are read from `env` at each access (gem copies them once, at
    construction).
    """

    def __init__(self, env: Env) -> None:
        self.env = env
        self.env_id = getattr(env, "env_id", "")

    def __getattr__(self, name: str) -> Any:
        if (
            name.startswith("_") or name == "env"
        ):  # not found on the way to being copied or unpickled: there is no `env` to ask yet
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return getattr(self.env, name)

    def __dir__(self) -> list[str]:
        return sorted(
            {*super().__dir__(), *(name for name in dir(self.env) if not name.startswith("_"))}
        )

    def after_reset(self, observation: Any, info: Info) -> tuple[Any, Info]:
        """What `reset` returns, made from what the environment returned."""
        return observation, info

    def after_step(self, action: str, result: StepResult) -> StepResult:
        """What `step` returns, made from what the environment returned."""
        return result

    def reset(self, seed: int | None = None) -> tuple[Any, Info]:
        return self.after_reset(*self.env.reset(seed=seed))

    def step(self, action: str) -> StepResult:
        return self.after_step(action, self.env.step(action))

    def close(self) -> None:
        getattr(self.env, "close", lambda: None)()

    async def areset(self, seed: int | None = None) -> tuple[Any, Info]:
        return self.after_reset(*await reset_async(self.env, seed))

    async def astep(self, action: str) -> StepResult:
        return self.after_step(action, await step_async(self.env, action))

    async def aclose(self) -> None:
        await close_async(self.env)

    def sample_random_action(self) -> str:
        return self.env.sample_random_action()

    def spawn(self, same_state: bool = False, **kwargs: Any) -> EnvWrapper:
        """The same wrapper around a spawned environment; without same_state it remembers nothing
        once it is reset.
        """
        inner = self.env.spawn(same_state=same_state, **kwargs)
        state = {
            name: value if name in ("env", "tokenizer") else copy.deepcopy(value)
            for name, value in vars(self).items()
        }
        clone = type(self).__new__(type(self))
        vars(clone).update(state, env=inner)
        return clone

    @property
    def unwrapped(self) -> Env:
        return self.env.unwrapped


class Tokenizer(Protocol):
    """What a chat template needs of a tokenizer: Hugging Face's method."""

    def apply_chat_template(
        self, conversation: list[dict[str, str]], *, tokenize: bool, add_generation_prompt: bool
    ) -> str: ...


def _line(text: str) -> str:
    return text if not text or text.endswith("\n") else text + "\n"


class ObservationWrapper(EnvWrapper):
    """The observation is the whole episode so far: observations, with actions between them, as
    plain lines or as a chat.

    A turn's `info["prefix"]` and `info["suffix"]` (a board, say) stand before and after it. An
    action in the history is `info["parsed_action"]` where there is one. `max_history_length` keeps
    the last actions, and one observation more.
    """

    def __init__(
        self,
        env: Env,
        include_action: bool = True,
        include_chat_template: bool = True,
        apply_chat_template_on_reset: bool = False,
        max_history_length: int | None = None,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        super().__init__(env)
        if include_chat_template and apply_chat_template_on_reset:
            raise ValueError(
                "include_chat_template and apply_chat_template_on_reset exclude each other;"
                " choose one"
            )
        if (include_chat_template or apply_chat_template_on_reset) and tokenizer is None:
            raise ValueError("a chat template needs a tokenizer; pass tokenizer=")
        if include_chat_template and not include_action:
            raise ValueError(
                "a chat without the assistant's turns is none; set include_action=True"
            )
        self.include_action, self.include_chat_template = include_action, include_chat_template
        self.apply_chat_template_on_reset, self.tokenizer = apply_chat_template_on_reset, tokenizer
        self.obs_queue: deque[tuple[str, bool]] = deque(
            maxlen=max_history_length + 1 if max_history_length else None
        )
        self.act_queue: deque[str] = deque(maxlen=max_history_length or None)

    def after_reset(self, observation: str, info: Info) -> tuple[str, Info]:
        self.act_queue.clear()
        self.obs_queue.clear()
        if self.apply_chat_template_on_reset:
            observation = self._render([{"role": "user", "content": observation}])
        self.obs_queue.append((observation, info.get("use_tool", False)))
        return self.observation(info), info

    def after_step(self, action: str, result: StepResult) -> StepResult:
        observation, reward, terminated, truncated, info = result
        self.act_queue.append(info.get("parsed_action", action))
        self.obs_queue.append((observation, info.get("use_tool", False)))
        return self.observation(info), reward, terminated, truncated, info

    def observation(self, info: Info) -> str:
        """The episode so far, with the prefix and suffix of this turn."""
        if self.include_chat_template:
            text = self._render(self._messages())
        else:
            actions = list(self.act_queue) if self.include_action else []
            text = "".join(
                _line(seen) + _line(actions[turn] if turn < len(actions) else "")
                for turn, (seen, _) in enumerate(self.obs_queue)
            )
        return info.get("prefix", "") + text + info.get("suffix", "")

    def _messages(self) -> list[dict[str, str]]:
        messages: list[dict[str, str]] = []
        for turn, (seen, use_tool) in enumerate(self.obs_queue):
            messages.append({"role": "tool" if use_tool else "user", "content": seen})
            if turn < len(self.act_queue):
                messages.append({"role": "assistant", "content": self.act_queue[turn]})
        return messages

    def _render(self, messages: list[dict[str, str]]) -> str:
        return self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )


class EpisodeTrackingWrapper(EnvWrapper):
    """Counts steps and adds up rewards of the episode, into info. The outermost wrapper."""

    def __init__(self, env: Env) -> None:
        super().__init__(env)
        self.step_counter, self.cumulative_rewards = 0, 0.0

    def after_reset(self, observation: Any, info: Info) -> tuple[Any, Info]:
        info["prev_ep_step_counter"], info["prev_ep_cumulative_rewards"] = (
            self.step_counter,
            self.cumulative_rewards,
        )
        self.step_counter, self.cumulative_rewards = 0, 0.0
        info["step_counter"], info["cumulative_rewards"] = (
            self.step_counter,
            self.cumulative_rewards,
        )
        return observation, info

    def after_step(self, action: str, result: StepResult) -> StepResult:
        self.step_counter += 1
        self.cumulative_rewards += result[1]
        result[4]["step_counter"], result[4]["cumulative_rewards"] = (
            self.step_counter,
            self.cumulative_rewards,
        )
        return result
