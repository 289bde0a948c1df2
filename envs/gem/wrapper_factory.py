"""Wrappers by name, as gem's training scripts ask for them:
`get_wrapper_fns("python_tool,concat,episode_tracking")`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from envs.gem.core import Env
from envs.gem.tools import BM25Index, PythonCodeTool, SearchTool, ShellTool, ToolEnvWrapper
from envs.gem.wrappers import EpisodeTrackingWrapper, ObservationWrapper, Tokenizer

WrapperFn = Callable[[Env], Env]


def _python(reward: float, success: float, last_line: bool = False) -> WrapperFn:
    tool = PythonCodeTool(timeout=5, keep_error_last_line=last_line)
    return partial(
        ToolEnvWrapper,
        tools=[tool],
        tool_reward=reward,
        tool_success_reward=success,
        max_tool_uses=5,
    )


# First a tool wrapper, then an observation wrapper, last episode tracking. Rewards and numbers of
# uses are gem's.
WRAPPER_FACTORY: dict[str, WrapperFn] = {
    "python_tool": _python(0.05, 0.25),
    "python_tool_no_int_reward": _python(0.0, 0.0),
    "python_tool_no_int_reward_last_line_error": _python(0.0, 0.0, last_line=True),
    "shell_tool": partial(ToolEnvWrapper, tools=[ShellTool(timeout=5)], max_tool_uses=5),
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
INDEX_REQUIRED = {
    "search_tool": 0.3,
    "search_tool_no_int_reward": 0.0,
}  # name -> reward of a search


def get_wrapper_fns(
    wrappers: str, tokenizer: Tokenizer | None = None, index: BM25Index | None = None
) -> list[WrapperFn]:
    """The wrappers of a comma-separated list, for make_vec.

    `tokenizer` is for the chats, `index` for the search tools.
    """
    functions: list[WrapperFn] = []
    for name in filter(None, (part.strip() for part in wrappers.split(","))):
        if name in INDEX_REQUIRED:
            if index is None:
                raise ValueError(
                    f"wrapper {name!r} searches an index; pass index=BM25Index(documents)"
                )
            functions.append(
                partial(
                    ToolEnvWrapper,
                    tools=[SearchTool(index, topk=3)],
                    tool_reward=INDEX_REQUIRED[name],
                    max_tool_uses=5,
                )
            )
        elif name in TOKENIZER_REQUIRED and tokenizer is not None:
            functions.append(partial(WRAPPER_FACTORY[name], tokenizer=tokenizer))
        elif name in WRAPPER_FACTORY:
            functions.append(WRAPPER_FACTORY[name])
        else:
            raise ValueError(
                f"wrapper {name!r} is unknown; there are"
                f" {', '.join([*WRAPPER_FACTORY, *INDEX_REQUIRED])}"
            )
    return functions
