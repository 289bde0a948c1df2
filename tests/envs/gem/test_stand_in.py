"""A program that was written for gem-llm runs without it."""

import importlib.util
import subprocess
import sys

import pytest

PROGRAM = """
from envs.gem import stand_in
stand_in.install()
import random

import gem
from gem import Env
from gem.core import EnvWrapper, ObsType
from gem.envs.registration import make_vec
from gem.tools.base_tool import BaseTool
from gem.tools.tool_env_wrapper import ToolEnvWrapper
from gem.vector.async_vector_env import AsyncVectorEnv
from gem.wrappers.wrapper_factory import get_wrapper_fns


class Coin(Env):
    def __init__(self, sides=2, **_):
        super().__init__()
        self.sides = sides

    def reset(self, seed=None):
        super().reset(seed)
        self.side = random.randrange(self.sides)
        return "guess", {"suffix": "0 or 1?"}

    def step(self, action):
        return "over", float(action == str(self.side)), True, False, {}

    def sample_random_action(self):
        return str(random.randrange(self.sides))


class Oracle(BaseTool):
    tool_type = "oracle"

    def instruction_string(self):
        return "ask"

    def execute_action(self, action):
        return (action == "ask", False, "no idea", action)


class Louder(EnvWrapper):
    def reset(self, seed=None):
        obs, info = self.env.reset(seed)
        return obs.upper(), info

    def step(self, action):
        return self.env.step(action)


gem.register("coin", Coin, sides=2)
env = gem.make(env_id="coin")
sides = [env.reset(seed=3) and env.side for _ in range(2)]  # drawn from the global generator
assert sides == [env.reset(seed=3) and env.side] * 2
env = ToolEnvWrapper(Louder(env), tools=[Oracle()], tool_reward=0.1)
assert env.reset(seed=1)[0] == "GUESS\\nask" and env.sides == 2
assert env.step("ask")[:2] == ("no idea", 0.1)
assert env.step(str(env.unwrapped.side))[1] == 1.0
wrappers = [Louder, *get_wrapper_fns("concat,episode_tracking")]
vec = make_vec(["coin"] * 3, wrappers=wrappers, async_mode=True, seed=0)
assert isinstance(vec, AsyncVectorEnv)
assert vec.reset()[0] == ["GUESS\\n0 or 1?"] * 3
obs, reward, terminated, truncated, info = vec.step(["0", "1", "0"])
assert terminated.all() and not truncated.any() and len(reward) == 3
try:
    import gem.multiagent
except ImportError:
    print("as it should be")
"""


@pytest.mark.skipif(
    importlib.util.find_spec("gem") is not None, reason="gem-llm itself is installed"
)
def test_a_program_for_gem_runs_on_the_stand_in():
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60
    )
    assert (ended.stdout, ended.returncode) == ("as it should be\n", 0), ended.stderr


@pytest.mark.skipif(importlib.util.find_spec("gem") is None, reason="gem-llm is not installed")
def test_where_gem_is_installed_there_is_no_stand_in():
    program = "from envs.gem import stand_in\nstand_in.install()"
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60
    )
    assert "no stand-in is needed" in ended.stderr
