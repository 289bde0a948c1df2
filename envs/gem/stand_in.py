"""Make `import gem` work without gem-llm: the names of that package, served by envs.gem.

    from envs.gem import stand_in
    stand_in.install()      # once, before the program's own `import gem`

Only modules for which envs.gem has an equivalent exist; any other module of gem is an ImportError.
"""

from __future__ import annotations

import sys
import types
from typing import Any, SupportsFloat, TypeVar

import envs.gem as ours
from envs.gem import core, tools, vector, wrapper_factory, wrappers

# names that gem's modules export for annotations
_TYPE_NAMES = {
    "ActType": TypeVar("ActType"),
    "ObsType": TypeVar("ObsType"),
    "SupportsFloat": SupportsFloat,
}
_REGISTRATION = {
    "make": ours.make,
    "make_vec": ours.make_vec,
    "print_envs": ours.print_envs,
    "register": ours.register,
}
_CORE = {"Env": ours.Env, "EnvWrapper": ours.EnvWrapper, **_TYPE_NAMES}
_VECTORS = {
    "AutoresetMode": vector.AutoresetMode,
    "VectorEnv": vector.VectorEnv,
    "SyncVectorEnv": vector.SyncVectorEnv,
    "AsyncVectorEnv": vector.AsyncVectorEnv,
}
# gem's modules, parents first, and the public names of each
_MODULES: dict[str, dict[str, Any]] = {
    "gem": {"Env": ours.Env, **_REGISTRATION},
    "gem.core": _CORE,
    "gem.envs": {},
    "gem.envs.registration": {**_REGISTRATION, **_CORE},
    "gem.vector": {},
    "gem.vector.vector_env": _VECTORS,
    "gem.vector.sync_vector_env": _VECTORS,
    "gem.vector.async_vector_env": _VECTORS,
    "gem.wrappers": {},
    "gem.wrappers.observation_wrapper": {
        "ObservationWrapper": wrappers.ObservationWrapper,
        "WrapperObsType": _TYPE_NAMES["ObsType"],
    },
    "gem.wrappers.episode_tracking_wrapper": {
        "EpisodeTrackingWrapper": wrappers.EpisodeTrackingWrapper,
    },
    "gem.wrappers.wrapper_factory": {
        "WRAPPER_FACTORY": wrapper_factory.WRAPPER_FACTORY,
        "TOKENIZER_REQUIRED": wrapper_factory.TOKENIZER_REQUIRED,
        "get_wrapper_fns": wrapper_factory.get_wrapper_fns,
    },
    "gem.tools": {},
    "gem.tools.base_tool": {"BaseTool": tools.BaseTool},
    "gem.tools.tool_env_wrapper": {"ToolEnvWrapper": tools.ToolEnvWrapper},
    "gem.tools.python_code_tool": {"PythonCodeTool": tools.PythonCodeTool},
    "gem.tools.search_tool": {"SearchTool": tools.SearchTool},
    "gem.tools.mcp_tool": {"MCPTool": tools.MCPTool},
}


def install() -> None:
    """Make `import gem` find envs.gem.

    Raises:
      ImportError: gem-llm itself is installed. It works with our environments without a stand-in.
    """
    if core._gem is not None:
        raise ImportError(
            "gem-llm is installed, and its `import gem` works with our environments; no stand-in is"
            " needed"
        )
    built: dict[str, types.ModuleType] = {}
    for name, names in _MODULES.items():
        module = types.ModuleType(name, f"Served by envs.gem (see {__name__}).")
        vars(module).update(names, __path__=[])
        built[name] = module
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(built[parent], child, module)
    sys.modules.update(built)
