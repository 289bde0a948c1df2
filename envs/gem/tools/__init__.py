"""Tools that a GEM environment can be given: Python, a shell, search, MCP servers; and the wrapper
that gives them.
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
