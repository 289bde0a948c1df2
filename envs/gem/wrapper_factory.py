"""Wrappers by name, as gem-llm's training scripts ask for them.

functions = get_wrapper_fns("python_tool,concat,episode_tracking")
vector = make_vec(["game/frozen_lake"] * 8, wrappers=functions)
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from envs.gem.core import Env
from envs.gem.tools import BM25Index, PythonCodeTool, SearchTool, ShellTool, ToolEnvWrapper
from envs.gem.wrappers import EpisodeTrackingWrapper, ObservationWrapper, Tokenizer

WrapperFn = Callable[..., Env]
TOOL_SECONDS = 5
MAX_TOOL_USES = 5
SEARCH_RESULTS = 3


def _python(reward: float, success_reward: float, last_line: bool = False) -> WrapperFn:
    tool = PythonCodeTool(timeout=TOOL_SECONDS, keep_error_last_line=last_line)
    return partial(
        ToolEnvWrapper,
        tools=[tool],
        tool_reward=reward,
        tool_success_reward=success_reward,
        max_tool_uses=MAX_TOOL_USES,
    )


# The order of a stack: first a tool wrapper, then an observation wrapper, last episode tracking.
# Rewards and numbers of uses are gem-llm's.
WRAPPER_FACTORY: dict[str, WrapperFn] = {
    "python_tool": _python(0.05, 0.25),
    "python_tool_no_int_reward": _python(0.0, 0.0),
    "python_tool_no_int_reward_last_line_error": _python(0.0, 0.0, last_line=True),
    "shell_tool": partial(
        ToolEnvWrapper, tools=[ShellTool(timeout=TOOL_SECONDS)], max_tool_uses=MAX_TOOL_USES
    ),
    "concat": partial(ObservationWrapper, include_action=False, include_chat_template=False),
    "concat_chat": partial(ObservationWrapper, include_action=True, include_chat_template=True),
    "concat_with_action": partial(
        ObservationWrapper, include_action=True, include_chat_template=False
    ),
    "concat_chat_on_reset": partial(
        ObservationWrapper,
        include_action=True,
        include_chat_template=False,
        apply_chat_template_on_reset=True,
    ),
    "episode_tracking": EpisodeTrackingWrapper,
}
TOKENIZER_REQUIRED = ("concat_chat", "concat_chat_on_reset")
# wrappers that search an index, and the reward of a search
INDEX_REQUIRED = {"search_tool": 0.3, "search_tool_no_int_reward": 0.0}


def get_wrapper_fns(
    wrappers: str, tokenizer: Tokenizer | None = None, index: BM25Index | None = None
) -> list[WrapperFn]:
    """Return the wrappers of a comma-separated list, for `make_vec`.

    Args:
      wrappers: keys of WRAPPER_FACTORY and INDEX_REQUIRED; the first is the innermost.
      tokenizer: for the wrappers in TOKENIZER_REQUIRED.
      index: for the wrappers in INDEX_REQUIRED.

    Raises:
      ValueError: a name is unknown, or a search has no index.
    """
    names = [part.strip() for part in wrappers.split(",")]
    return [_wrapper(name, tokenizer, index) for name in names if name]


def _wrapper(name: str, tokenizer: Tokenizer | None, index: BM25Index | None) -> WrapperFn:
    if name in INDEX_REQUIRED:
        if index is None:
            raise ValueError(f"wrapper {name!r} searches an index; pass index=BM25Index(documents)")
        return partial(
            ToolEnvWrapper,
            tools=[SearchTool(index, topk=SEARCH_RESULTS)],
            tool_reward=INDEX_REQUIRED[name],
            max_tool_uses=MAX_TOOL_USES,
        )
    if name not in WRAPPER_FACTORY:
        known = ", ".join([*WRAPPER_FACTORY, *INDEX_REQUIRED])
        raise ValueError(f"wrapper {name!r} is unknown; there are {known}")
    if name in TOKENIZER_REQUIRED and tokenizer is not None:
        return partial(WRAPPER_FACTORY[name], tokenizer=tokenizer)
    return WRAPPER_FACTORY[name]
