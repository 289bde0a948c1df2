"""Wrappers around environments: whole-history observations, chat templates, episode statistics.

Names and behaviour are those of gem-llm 0.1.0. The order matters: first ToolEnvWrapper
(envs.gem.tools), then an observation wrapper, last EpisodeTrackingWrapper.

    env = EpisodeTrackingWrapper(ObservationWrapper(env, include_chat_template=False))
"""

from __future__ import annotations

import copy
from collections import deque
from typing import Any, Protocol

from envs.gem.core import (
    Env,
    Info,
    StepResult,
    close_async,
    judge_async,
    reset_async,
    step_async,
)


class EnvWrapper(Env):
    """An environment that passes everything on to `env`.

    Subclasses override `reset` and `step`, or only `after_reset` and `after_step`. Attributes that
    the wrapper lacks are read from `env` at each access (gem-llm copies them once, at
    construction).
    """

    def __init__(self, env: Env) -> None:
        self.env = env
        self.env_id = getattr(env, "env_id", "")

    def __getattr__(self, name: str) -> Any:
        # while a wrapper is being copied or unpickled there is no `env` yet that could be asked
        if name.startswith("_") or name == "env":
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return getattr(self.env, name)

    def __dir__(self) -> list[str]:
        inner = [name for name in dir(self.env) if not name.startswith("_")]
        return sorted({*super().__dir__(), *inner})

    def after_reset(self, observation: Any, info: Info) -> tuple[Any, Info]:
        """Return what `reset` is to return, given what the environment's returned."""
        return observation, info

    def after_step(self, action: str, result: StepResult) -> StepResult:
        """Return what `step` is to return, given what the environment's returned."""
        return result

    def reset(self, seed: int | None = None) -> tuple[Any, Info]:
        observation, info = self.env.reset(seed=seed)
        return self.after_reset(observation, info)

    def step(self, action: str) -> StepResult:
        return self.after_step(action, self.env.step(action))

    def close(self) -> None:
        if hasattr(self.env, "close"):  # gem-llm's environments may lack it
            self.env.close()

    async def areset(self, seed: int | None = None) -> tuple[Any, Info]:
        observation, info = await reset_async(self.env, seed)
        return self.after_reset(observation, info)

    async def astep(self, action: str) -> StepResult:
        return self.after_step(action, await step_async(self.env, action))

    async def ajudge(self, ending: str) -> StepResult:
        return await judge_async(self.env, ending)

    async def aclose(self) -> None:
        await close_async(self.env)

    def sample_random_action(self) -> str:
        return self.env.sample_random_action()

    def spawn(self, same_state: bool = False, **kwargs: Any) -> EnvWrapper:
        """Return the same wrapper around a spawned environment.

        Its state is copied in any case; without `same_state` the next reset discards it.
        """
        clone = type(self).__new__(type(self))
        clone.env = self.env.spawn(same_state=same_state, **kwargs)
        for name, value in vars(self).items():
            if name == "tokenizer":
                clone.__dict__[name] = value
            elif name != "env":
                clone.__dict__[name] = copy.deepcopy(value)
        return clone

    @property
    def unwrapped(self) -> Env:
        return self.env.unwrapped


class Tokenizer(Protocol):
    """The method of a Hugging Face tokenizer that renders a chat."""

    def apply_chat_template(
        self, conversation: list[dict[str, str]], *, tokenize: bool, add_generation_prompt: bool
    ) -> str:
        """Return the messages as text."""


class ObservationWrapper(EnvWrapper):
    """An environment whose observation is the whole episode so far.

    Observations, and optionally the actions between them, are joined as lines or as a chat. The
    texts `info["prefix"]` and `info["suffix"]` of a turn, such as a board, stand before and after
    it. An action in the history is `info["parsed_action"]` where there is one.

    Args:
      env: the environment.
      include_action: put the actions between the observations.
      include_chat_template: render the episode as a chat.
      apply_chat_template_on_reset: render only the first observation as a chat.
      max_history_length: number of actions to keep, and one observation more; None keeps all.
      tokenizer: renders chats.

    Raises:
      ValueError: the options contradict each other, or a chat has no tokenizer.
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
            raise ValueError("a chat needs the assistant's turns; set include_action=True")
        self.include_action = include_action
        self.include_chat_template = include_chat_template
        self.apply_chat_template_on_reset = apply_chat_template_on_reset
        self.tokenizer = tokenizer
        max_observations = max_history_length + 1 if max_history_length else None
        # (observation, whether a tool made it)
        self.obs_queue: deque[tuple[str, bool]] = deque(maxlen=max_observations)
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
        """Return the episode so far, between the prefix and the suffix of this turn."""
        text = self._render(self._messages()) if self.include_chat_template else self._lines()
        return info.get("prefix", "") + text + info.get("suffix", "")

    def _lines(self) -> str:
        parts = []
        for turn, (observation, _) in enumerate(self.obs_queue):
            parts.append(_line(observation))
            if self.include_action and turn < len(self.act_queue):
                parts.append(_line(self.act_queue[turn]))
        return "".join(parts)

    def _messages(self) -> list[dict[str, str]]:
        messages: list[dict[str, str]] = []
        for turn, (observation, is_from_tool) in enumerate(self.obs_queue):
            role = "tool" if is_from_tool else "user"
            messages.append({"role": role, "content": observation})
            if turn < len(self.act_queue):
                messages.append({"role": "assistant", "content": self.act_queue[turn]})
        return messages

    def _render(self, messages: list[dict[str, str]]) -> str:
        if self.tokenizer is None:
            raise ValueError("a chat template needs a tokenizer; pass tokenizer=")
        return self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )


def _line(text: str) -> str:
    """Return a text with a newline at its end; an empty one stays empty."""
    return text if not text or text.endswith("\n") else text + "\n"


class EpisodeTrackingWrapper(EnvWrapper):
    """An environment that counts steps and adds up rewards, in each info. The outermost wrapper.

    Infos get `step_counter` and `cumulative_rewards`; a reset's info also has those of the episode
    before, with the prefix `prev_ep_`.
    """

    def __init__(self, env: Env) -> None:
        super().__init__(env)
        self.step_counter = 0
        self.cumulative_rewards = 0.0

    def after_reset(self, observation: Any, info: Info) -> tuple[Any, Info]:
        info["prev_ep_step_counter"] = self.step_counter
        info["prev_ep_cumulative_rewards"] = self.cumulative_rewards
        self.step_counter = 0
        self.cumulative_rewards = 0.0
        self._note_statistics(info)
        return observation, info

    def after_step(self, action: str, result: StepResult) -> StepResult:
        _, reward, _, _, info = result
        self.step_counter += 1
        self.cumulative_rewards += reward
        self._note_statistics(info)
        return result

    def _note_statistics(self, info: Info) -> None:
        info["step_counter"] = self.step_counter
        info["cumulative_rewards"] = self.cumulative_rewards
