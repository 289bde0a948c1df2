"""The wrapper that gives tools to an environment: its bookkeeping, and each episode's own shell."""

import asyncio

import pytest

from envs.gem.tools import BaseTool, ShellTool, ToolEnvWrapper
from envs.rock import SandboxConfig, SandboxError
from tests.envs.gem.worlds import Counter

CONFIG = SandboxConfig(isolation="best_available")


class Echo(BaseTool):
    tool_type = "echo"

    def __init__(self, mark, fails=False):
        super().__init__()
        self.mark, self.fails = mark, fails

    def instruction_string(self):
        return f"write {self.mark}"

    def execute_action(self, action):
        return (
            (True, self.fails, f"{self.mark} ran", action.split(self.mark)[0] + self.mark)
            if self.mark in action
            else (False, True, "", action)
        )


def test_the_wrapper_counts_uses_pays_and_passes_on():
    env = ToolEnvWrapper(
        Counter(),
        [Echo("!"), Echo("?", fails=True)],
        tool_reward=0.1,
        tool_success_reward=0.5,
        max_tool_uses=2,
    )
    observation, info = env.reset(seed=1)
    assert observation == "start 1\nAvailable tools:\nwrite !\nwrite ?"
    counts = {
        "tool_use_counter": 0,
        "tool_success_counter": 0,
        "prev_ep_tool_use_counter": 0,
        "prev_ep_tool_success_counter": 0,
    }
    assert info == {"suffix": "[0]", "use_tool": False, **counts}
    used = {
        "parsed_action": "a!",
        "tool_type": "echo",
        "use_tool": True,
        "tool_use_counter": 1,
        "tool_success_counter": 1,
    }
    assert env.step("a! b") == ("! ran", 0.6, False, False, used)
    observation, reward, *_ = env.step("b?")
    assert (
        observation
        == "? ran\n\nReached the maximum number of tool use. Please output final answer directly."
        and reward == 0.1
    )
    observation, *_, info = env.step("c!")  # no more tools
    assert (
        observation == "c! at 1"
        and info["tool_use_counter"] == 2
        and info["tool_success_counter"] == 1
    )
    assert env.reset()[1]["prev_ep_tool_use_counter"] == 2


def test_of_two_tools_that_are_called_the_one_that_works_counts():
    env = ToolEnvWrapper(Counter(), [Echo("?", fails=True), Echo("!")])
    env.reset()
    assert env.step("?!")[0] == "! ran"
    assert env.step("?")[0] == "? ran"  # its own failure is told, not handed to the environment
    assert env.unwrapped.turn == 0
    both_fail = ToolEnvWrapper(Counter(), [Echo("?", fails=True), Echo("!", fails=True)])
    both_fail.reset()
    assert both_fail.step("?!")[0] == "? ran"


def test_a_lost_sandbox_is_raised_and_no_observation():
    class Lost(Echo):
        def execute_action(self, action):
            raise SandboxError("gone")

    env = ToolEnvWrapper(Counter(), [Lost("!")])
    env.reset()
    for step in (lambda: env.step("!"), lambda: asyncio.run(env.astep("!"))):
        with pytest.raises(SandboxError):
            step()


def test_each_environment_has_a_shell_of_its_own():
    tool = ShellTool(sandbox_config=CONFIG)
    one, other = ToolEnvWrapper(Counter(), [tool]), ToolEnvWrapper(Counter(), [tool])
    twin = one.spawn()
    assert len({id(env.tools[0]) for env in (one, other, twin)} | {id(tool)}) == 4
    one.reset(), other.reset()
    try:
        one.step("<bash>touch mine</bash>")
        assert (
            one.step("<bash>ls</bash>")[0] == "Command output: mine\n"
            and other.step("<bash>ls</bash>")[0] == "Command output: (none)\n"
        )
        one.reset()
        assert one.step("<bash>ls</bash>")[0] == "Command output: (none)\n"
    finally:
        one.close(), other.close()
