"""Both kinds of workspace, and a hand that uses tools there, for tests that tell them not apart."""

from __future__ import annotations

import asyncio
import json
import pathlib
from collections.abc import Awaitable, Callable
from typing import TypeVar

from envs.rock import Sandbox, SandboxConfig
from rome.agent.iflow.events import Event, ToolCall
from rome.agent.iflow.places.host_workspace import HostWorkspace
from rome.agent.iflow.places.sandbox_workspace import SandboxWorkspace
from rome.agent.iflow.places.workspace import Workspace, WorkspaceError
from rome.agent.iflow.tools.base import Tool, ToolContext, ToolError, ToolResult, read_arguments

KINDS = ("host", "sandbox")
T = TypeVar("T")
CONFIG = SandboxConfig(
    isolation="best_available", max_output_bytes=4 << 20, disk_mb=64, memory_mb=512
)


def work(kind: str, folder: pathlib.Path, body: Callable[[Workspace], Awaitable[T]]) -> T:
    """Run `body` on a fresh workspace of a kind and return its result."""

    async def on_host() -> T:
        root = folder / "project"
        root.mkdir(exist_ok=True)
        workspace = HostWorkspace(str(root), str(folder / "session"))
        try:
            return await body(workspace)
        finally:
            await workspace.aclose()

    async def in_sandbox() -> T:
        async with Sandbox(CONFIG) as sandbox:
            workspace = SandboxWorkspace(sandbox)
            try:
                return await body(workspace)
            finally:
                await workspace.aclose()

    return asyncio.run(on_host() if kind == "host" else in_sandbox())


class Hand:
    """Calls tools as the loop does, on one workspace; keeps what they emit."""

    def __init__(self, workspace: Workspace, answers: tuple[str, ...] = (), **state) -> None:
        self.events: list[Event] = []
        self.questions: list[tuple[str, tuple[str, ...]]] = []
        self._answers = list(answers)
        self.context = ToolContext(
            call=ToolCall("c1", "", ""),
            workspace=workspace,
            emit=self._emit,
            asker=self,
            session_folder=workspace.root,
            **state,
        )

    async def question(self, question: str, choices=()) -> str:
        self.questions.append((question, tuple(choices)))
        return self._answers.pop(0) if self._answers else ""

    async def use(self, tool: Tool, **arguments) -> ToolResult:
        """Run a call; a ToolError is returned as its message, as the model gets it."""
        try:
            read = read_arguments(tool, json.dumps(arguments))
            return await tool.run(read, self.context)
        except (ToolError, WorkspaceError) as error:
            return ToolResult(str(error), "error")

    def _emit(self, event: Event) -> Event:
        self.events.append(event)
        return event
