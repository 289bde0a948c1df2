"""What a tool is, and the wrapper that lets a model use tools before it acts on the environment
(gem-llm 0.1.0's protocol).
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from envs.gem.core import Env, Info, StepResult, close_async, reset_async, step_async
from envs.gem.wrappers import EnvWrapper

ToolResult = tuple[
    bool, bool, str, str
]  # (a call of this tool was found, it failed, observation, the action up to the end of the call)


class BaseTool:
    """One tool.

    It reads its calls out of the model's text; any text is fine, and none makes it raise.

    Only trouble with the infrastructure (SandboxError) is raised: it must not become a bad
    observation or a reward of 0.
    """

    tool_type = "base"

    def __init__(self, num_workers: int = 1) -> None:
        self.num_workers = num_workers  # gem's tools have it; none of ours reads it

    def instruction_string(self) -> str:
        """How to call the tool, told to the model at the start."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it is called")

    def execute_action(self, action: str) -> ToolResult:
        """Runs the first call in the text, if there is one."""
        raise NotImplementedError(f"{type(self).__name__} cannot run")

    def spawn(self) -> BaseTool:
        """A tool of the same settings for another environment.

        One without state of its own is its own copy.
        """
        return self

    def reset(self) -> None:
        """Forgets what the last episode left behind."""

    def close(self) -> None:
        """Frees what the tool holds. Safe to call twice; the tool can be used again."""


class ToolEnvWrapper(EnvWrapper):
    """A step that calls a tool returns the tool's output; any other goes to the environment.

    Differences from gem: a call that failed stays that tool's call when the tools after it find
    none of theirs (gem then hands it to the environment), and each wrapper has its own copy of
    tools that keep state.
    """

    def __init__(
        self,
        env: Env,
        tools: Sequence[Any],
        tool_reward: float = 0.0,
        tool_success_reward: float = 0.0,
        max_tool_uses: int | None = 10,
    ) -> None:
        """tool_reward: for each call; tool_success_reward: on top for one that did not fail.

        Past max_tool_uses the tools are not asked.
        """
        super().__init__(env)
        self.tools = [tool.spawn() if hasattr(tool, "spawn") else tool for tool in tools]
        self._own_tools = [
            mine for mine, given in zip(self.tools, tools) if mine is not given
        ]  # those of others are theirs to reset and close
        self.tool_reward, self.tool_success_reward = tool_reward, tool_success_reward
        self.max_tool_uses = float("inf") if max_tool_uses is None else max_tool_uses
        self.tool_use_counter = self.tool_success_counter = 0

    def reset(self, seed: int | None = None) -> tuple[str, Info]:
        self._each_own_tool("reset")
        return self.after_reset(*self.env.reset(seed=seed))

    def step(self, action: str) -> StepResult:
        return self._use_tools(action) or self.after_step(action, self.env.step(action))

    async def areset(self, seed: int | None = None) -> tuple[str, Info]:
        await asyncio.to_thread(self._each_own_tool, "reset")
        return self.after_reset(*await reset_async(self.env, seed))

    async def astep(self, action: str) -> StepResult:
        return await asyncio.to_thread(self._use_tools, action) or self.after_step(
            action, await step_async(self.env, action)
        )

    def close(self) -> None:
        self._each_own_tool("close")
        super().close()

    async def aclose(self) -> None:
        await asyncio.to_thread(self._each_own_tool, "close")
        await close_async(self.env)

    def after_reset(self, observation: str, info: Info) -> tuple[str, Info]:
        info["prev_ep_tool_use_counter"], info["prev_ep_tool_success_counter"] = (
            self.tool_use_counter,
            self.tool_success_counter,
        )
        self.tool_use_counter = self.tool_success_counter = 0
        info["use_tool"] = False
        self._count(info)
        instructions = "\n".join(tool.instruction_string() for tool in self.tools)
        return (
            f"{observation}\n"
            + ("Available tools:\n" if len(self.tools) > 1 else "")
            + instructions,
            info,
        )

    def after_step(self, action: str, result: StepResult) -> StepResult:
        result[4]["use_tool"] = True  # as gem does
        self._count(result[4])
        return result

    def spawn(self, same_state: bool = False, **kwargs: Any) -> ToolEnvWrapper:
        """Tools that keep state start afresh, also with same_state."""
        uses = None if self.max_tool_uses == float("inf") else int(self.max_tool_uses)
        clone = type(self)(
            self.env.spawn(same_state=same_state, **kwargs),
            self.tools,
            self.tool_reward,
            self.tool_success_reward,
            uses,
        )
        if same_state:
            clone.tool_use_counter, clone.tool_success_counter = (
                self.tool_use_counter,
                self.tool_success_counter,
            )
        return clone

    def get_state(self) -> dict[str, Any]:
        return {
            **self.env.get_state(),
            "tool_use_counter": self.tool_use_counter,
            "tool_success_counter": self.tool_success_counter,
        }

    def set_state(self, state: dict[str, Any]) -> None:
        self.env.set_state(
            {
                name: value
                for name, value in state.items()
                if name not in ("tool_use_counter", "tool_success_counter")
            }
        )
        self.tool_use_counter = state.get("tool_use_counter", 0)
        self.tool_success_counter = state.get("tool_success_counter", 0)

    def _use_tools(self, action: str) -> StepResult | None:
        """The step that a tool made; None where no tool is called."""
        if self.tool_use_counter >= self.max_tool_uses:
            return None
        used, answer = None, None
        for tool in self.tools:
            found, failed, observation, parsed_action = tool.execute_action(action)
            if found and (used is None or not failed):
                used, answer = tool, (failed, observation, parsed_action)
            if found and not failed:
                break
        if used is None:
            return None
        failed, observation, parsed_action = answer
        self.tool_use_counter += 1
        if self.tool_use_counter == self.max_tool_uses:
            observation = (
                f"{observation}\n\nReached the maximum number of tool use. Please output final"
                " answer directly."
            )
        reward = self.tool_reward
        if not failed:
            self.tool_success_counter += 1
            reward += self.tool_success_reward
        info: Info = {"parsed_action": parsed_action, "tool_type": used.tool_type}
        return self.after_step(action, (observation, reward, False, False, info))

    def _count(self, info: Info) -> None:
        info["tool_use_counter"], info["tool_success_counter"] = (
            self.tool_use_counter,
            self.tool_success_counter,
        )

    def _each_own_tool(self, method: str) -> None:
        for tool in self._own_tools:
            getattr(tool, method)()
