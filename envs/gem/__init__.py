"""GEM: text environments, a registry of them, vectors, wrappers, and parsing of tool calls.

    import envs.gem as gem
    import envs.games  # registers game/...

    env = gem.make("game/frozen_lake", seed=17)
    observation, info = env.reset()
    observation, reward, terminated, truncated, info = env.step("<answer>Right</answer>")

The interface is that of gem-llm 0.1.0, so code written for it runs unchanged. Tools are in
envs.gem.tools, wrappers by name in envs.gem.wrapper_factory, gymnasium's environments in
envs.gem.gymnasium, the REST service in envs.gem.server and its client in envs.gem.remote.
"""

from envs.gem.core import (
    Env,
    Info,
    StepResult,
    UnplayableTaskError,
    make,
    print_envs,
    register,
    registered,
)
from envs.gem.tool_call import (
    ToolCall,
    ToolCallError,
    format_tool_call,
    parse_tool_calls,
    read_turn,
)
from envs.gem.vector import (
    AsyncioVectorEnv,
    AsyncVectorEnv,
    AutoresetMode,
    SyncVectorEnv,
    VectorEnv,
    make_vec,
)
from envs.gem.wrappers import EnvWrapper, EpisodeTrackingWrapper, ObservationWrapper

__all__ = [
    "AsyncVectorEnv",
    "AsyncioVectorEnv",
    "AutoresetMode",
    "Env",
    "EnvWrapper",
    "EpisodeTrackingWrapper",
    "Info",
    "ObservationWrapper",
    "StepResult",
    "SyncVectorEnv",
    "ToolCall",
    "ToolCallError",
    "UnplayableTaskError",
    "VectorEnv",
    "format_tool_call",
    "make",
    "make_vec",
    "parse_tool_calls",
    "print_envs",
    "read_turn",
    "register",
    "registered",
]
