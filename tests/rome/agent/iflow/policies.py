"""Policies of a project at /repo, and tools of each kind to judge calls of."""

from rome.agent.iflow.approval.policy import Policy
from rome.agent.iflow.tools.base import Tool


def tool(name: str, access: str) -> Tool:
    return type(name, (Tool,), {"name": name, "accesses": access})()


SHELL = tool("shell", "execute")
READ = tool("read_file", "read")
EDIT = tool("edit", "write")
WRITE = tool("write_file", "write")
FETCH = tool("web_fetch", "network")
TODO = tool("todo", "none")


def policy(**given) -> Policy:
    return Policy(**{"root": "/repo", "home": "/home/me", **given})


def decide(command: str, **given) -> str:
    return policy(**given).judge(SHELL, {"command": command}).decision
