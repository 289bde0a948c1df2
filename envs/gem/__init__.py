"""GEM: environments that talk in text, a registry of them, and the parsing of tool calls."""

from envs.gem.core import Env, Info, StepResult, make, register, registered
from envs.gem.tool_call import ToolCall, ToolCallError, format_tool_call, parse_tool_calls

__all__ = ["Env", "Info", "StepResult", "ToolCall", "ToolCallError", "format_tool_call", "make", "parse_tool_calls", "register", "registered"]
