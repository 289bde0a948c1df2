"""Tools for GEM environments: Python, a shell, search, MCP servers; and the wrapper around them.

env = ToolEnvWrapper(env, tools=[PythonCodeTool(timeout=5)], max_tool_uses=5)
"""

from envs.gem.tools.base import BaseTool, ToolEnvWrapper, ToolResult
from envs.gem.tools.mcp import MCPTool
from envs.gem.tools.sandboxed import PythonCodeTool, ShellTool
from envs.gem.tools.search import BM25Index, SearchTool

__all__ = [
    "BM25Index",
    "BaseTool",
    "MCPTool",
    "PythonCodeTool",
    "SearchTool",
    "ShellTool",
    "ToolEnvWrapper",
    "ToolResult",
]
