"""The interface of a tool, and the wrapper that lets a model use tools in an environment.

The protocol is gem-llm 0.1.0's.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from envs.gem.core import Env, Info, StepResult, close_async, reset_async, step_async
from envs.gem.wrappers import EnvWrapper

# (whether a call of this tool was found, whether it failed, observation, the action up to the end
# of the call)
ToolResult = tuple[bool, bool, str, str]
_COUNTERS = ("tool_use_counter", "tool_success_counter")
_LAST_USE = (
    "\n\nReached the maximum number of tool use. Please output final answer directly."  # gem-llm's
)


class BaseTool:
    """A tool that finds its calls in the model's text.

    Any text is allowed, and none makes a tool raise. Only a SandboxError that is trouble with the
    infrastructure, and no AgentFault, is raised: it must not become a bad observation or a reward
    of 0.
    """

    tool_type = "base"

    def __init__(self, num_workers: int = 1) -> None:
        """Accept gem-llm's argument `num_workers`, which none of our tools reads."""
        self.num_workers = num_workers

    def instruction_string(self) -> str:
        """Return how to call the tool, for the model to read at the start of an episode."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it is called")

    def execute_action(self, action: str) -> ToolResult:
        """Run the first call of this tool in a turn, if there is one.

        Returns:
          (found, failed, observation, parsed_action): whether the turn calls this tool, whether the
          call failed, its output, and the turn up to the end of the call.
        """
        raise NotImplementedError(f"{type(self).__name__} cannot run")

    def spawn(self) -> BaseTool:
        """Return a tool with the same settings for another environment.

        A tool without state returns itself.
        """
        return self

    def reset(self) -> None:
        """Discard the state of the last episode."""

    def close(self) -> None:
        """Free what the tool holds. It may be closed twice, and used again afterwards."""


class _Use(NamedTuple):
    """A call of a tool that was found in a turn, and its result."""

    tool: Any
    failed: bool
    observation: str
    parsed_action: str


class ToolEnvWrapper(EnvWrapper):
    """An environment with tools: a turn that calls one gets its output as the observation.

    Any other turn goes to the environment. Two differences from gem-llm: a failed call stays that
    tool's when the tools after it find no call of theirs (gem-llm passes it to the environment),
    and each wrapper has its own copy of tools that keep state.

    Args:
      env: the environment.
      tools: asked in this order.
      tool_reward: the reward of each call.
      tool_success_reward: added for a call that did not fail.
      max_tool_uses: calls in an episode, after which the tools are not asked any more; None for no
        limit.
    """

    def __init__(
        self,
        env: Env,
        tools: Sequence[Any],
        tool_reward: float = 0.0,
        tool_success_reward: float = 0.0,
        max_tool_uses: int | None = 10,
    ) -> None:
        super().__init__(env)
        self.tools = [tool.spawn() if hasattr(tool, "spawn") else tool for tool in tools]
        # a tool that was not copied belongs to the caller, who resets and closes it
        pairs = zip(self.tools, tools, strict=True)
        self._own_tools = [own for own, given in pairs if own is not given]
        self.tool_reward = tool_reward
        self.tool_success_reward = tool_success_reward
        self.max_tool_uses = math.inf if max_tool_uses is None else max_tool_uses
        self.tool_use_counter = 0
        self.tool_success_counter = 0

    def reset(self, seed: int | None = None) -> tuple[str, Info]:
        self._reset_own_tools()
        observation, info = self.env.reset(seed=seed)
        return self.after_reset(observation, info)

    def step(self, action: str) -> StepResult:
        tool_step = self._use_tools(action)
        if tool_step is not None:
            return tool_step
        return self.after_step(action, self.env.step(action))

    async def areset(self, seed: int | None = None) -> tuple[str, Info]:
        await asyncio.to_thread(self._reset_own_tools)
        observation, info = await reset_async(self.env, seed)
        return self.after_reset(observation, info)

    async def astep(self, action: str) -> StepResult:
        tool_step = await asyncio.to_thread(self._use_tools, action)
        if tool_step is not None:
            return tool_step
        return self.after_step(action, await step_async(self.env, action))

    def close(self) -> None:
        self._close_own_tools()
        super().close()

    async def aclose(self) -> None:
        await asyncio.to_thread(self._close_own_tools)
        await close_async(self.env)

    def after_reset(self, observation: str, info: Info) -> tuple[str, Info]:
        info["prev_ep_tool_use_counter"] = self.tool_use_counter
        info["prev_ep_tool_success_counter"] = self.tool_success_counter
        self.tool_use_counter = 0
        self.tool_success_counter = 0
        info["use_tool"] = False
        self._note_counters(info)
        heading = "Available tools:\n" if len(self.tools) > 1 else ""
        instructions = "\n".join(tool.instruction_string() for tool in self.tools)
        return f"{observation}\n{heading}{instructions}", info

    def after_step(self, action: str, result: StepResult) -> StepResult:
        *_, info = result
        info["use_tool"] = True  # after each step, as in gem-llm
        self._note_counters(info)
        return result

    def spawn(self, same_state: bool = False, **kwargs: Any) -> ToolEnvWrapper:
        """Return the same wrapper around a spawned environment.

        Tools that keep state start afresh, also with `same_state`.
        """
        uses = None if self.max_tool_uses == math.inf else int(self.max_tool_uses)
        inner = self.env.spawn(same_state=same_state, **kwargs)
        clone = type(self)(inner, self.tools, self.tool_reward, self.tool_success_reward, uses)
        if same_state:
            clone.tool_use_counter = self.tool_use_counter
            clone.tool_success_counter = self.tool_success_counter
        return clone

    def get_state(self) -> dict[str, Any]:
        """Return the environment's state and the two counters."""
        state = dict(self.env.get_state())
        self._note_counters(state)
        return state

    def set_state(self, state: dict[str, Any]) -> None:
        """Restore a state of `get_state`."""
        inner = {name: value for name, value in state.items() if name not in _COUNTERS}
        self.env.set_state(inner)
        self.tool_use_counter = state.get("tool_use_counter", 0)
        self.tool_success_counter = state.get("tool_success_counter", 0)

    def _use_tools(self, action: str) -> StepResult | None:
        """Return the step that a tool makes of a turn; None where no tool is called."""
        if self.tool_use_counter >= self.max_tool_uses:
            return None
        use = self._find_use(action)
        if use is None:
            return None
        observation = use.observation
        reward = self.tool_reward
        self.tool_use_counter += 1
        if self.tool_use_counter == self.max_tool_uses:
            observation += _LAST_USE
        if not use.failed:
            self.tool_success_counter += 1
            reward += self.tool_success_reward
        info: Info = {"parsed_action": use.parsed_action, "tool_type": use.tool.tool_type}
        return self.after_step(action, (observation, reward, False, False, info))

    def _find_use(self, action: str) -> _Use | None:
        """Ask the tools in turn; the first call that does not fail wins, else the first found."""
        first_failed = None
        for tool in self.tools:
            found, failed, observation, parsed_action = tool.execute_action(action)
            if not found:
                continue
            use = _Use(tool, failed, observation, parsed_action)
            if not failed:
                return use
            first_failed = first_failed or use
        return first_failed

    def _note_counters(self, info: dict[str, Any]) -> None:
        info["tool_use_counter"] = self.tool_use_counter
        info["tool_success_counter"] = self.tool_success_counter

    def _reset_own_tools(self) -> None:
        for tool in self._own_tools:
            tool.reset()

    def _close_own_tools(self) -> None:
        for tool in self._own_tools:
            tool.close()
