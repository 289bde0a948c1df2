"""`import gem` for programs written for gem-llm, where gem-llm is not installed: the names of the
package, served by envs.gem.

    from envs.gem import stand_in
    stand_in.install()      # once, before the program's own `import gem`

Only what we have an equal for is there; any other module of gem is an ImportError, as without this.
"""

from __future__ import annotations

import sys
import types
from typing import Any, SupportsFloat, TypeVar

import envs.gem as ours
from envs.gem import core, tools, vector, wrapper_factory, wrappers

_ANY = {
    "ActType": TypeVar("ActType"),
    "ObsType": TypeVar("ObsType"),
    "SupportsFloat": SupportsFloat,
}


def _modules() -> dict[str, dict[str, Any]]:
    """gem's modules and their public names."""
    core_names = {"Env": ours.Env, "EnvWrapper": ours.EnvWrapper, **_ANY}
    registration = {
        name: getattr(ours, name) for name in ("make", "make_vec", "print_envs", "register")
    }
    vectors = {
        name: getattr(vector, name)
        for name in ("AutoresetMode", "VectorEnv", "SyncVectorEnv", "AsyncVectorEnv")
    }
    return {
        "gem": {"Env": ours.Env, **registration},
        "gem.core": core_names,
        "gem.envs": {},
        "gem.envs.registration": {**registration, **core_names},
        "gem.vector": {},
        **{
            f"gem.vector.{name}": vectors
            for name in ("vector_env", "sync_vector_env", "async_vector_env")
        },
        "gem.wrappers": {},
        "gem.wrappers.observation_wrapper": {
            "ObservationWrapper": wrappers.ObservationWrapper,
            "WrapperObsType": _ANY["ObsType"],
        },
        "gem.wrappers.episode_tracking_wrapper": {
            "EpisodeTrackingWrapper": wrappers.EpisodeTrackingWrapper
        },
        "gem.wrappers.wrapper_factory": {
            name: getattr(wrapper_factory, name)
            for name in ("WRAPPER_FACTORY", "TOKENIZER_REQUIRED", "get_wrapper_fns")
        },
        "gem.tools": {},
        "gem.tools.base_tool": {"BaseTool": tools.BaseTool},
        "gem.tools.tool_env_wrapper": {"ToolEnvWrapper": tools.ToolEnvWrapper},
        "gem.tools.python_code_tool": {"PythonCodeTool": tools.PythonCodeTool},
        "gem.tools.search_tool": {"SearchTool": tools.SearchTool},
        "gem.tools.mcp_tool": {"MCPTool": tools.MCPTool},
    }


def install() -> None:
    """Makes `import gem` find envs.gem.

    ImportError where gem-llm itself is installed: it then works, and knows our environments.
    """
    if core._gem is not None:
        raise ImportError(
            "gem-llm is installed, and its `import gem` works with our environments; no stand-in is"
            " needed"
        )
    built = {
        name: types.ModuleType(name, f"Served by envs.gem (see {__name__}).") for name in _modules()
    }
    for name, names in _modules().items():
        vars(built[name]).update(names, __path__=[])
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(built[parent], child, built[name])
    sys.modules.update(built)
