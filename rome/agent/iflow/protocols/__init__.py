"""The agent in other programs: MCP, ACP (editors) and HTTP."""
