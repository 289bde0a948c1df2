"""What the tools of a session may do: which of them there are, and the rules of approval."""

from __future__ import annotations

import fnmatch
import functools
import os
import pathlib
from collections.abc import Callable
from typing import Any

from rome.agent.iflow.approval.policy import Policy
from rome.agent.iflow.options import Options, UsageError
from rome.agent.iflow.places.workspace import Workspace
from rome.agent.iflow.specs.projects import Projects
from rome.agent.iflow.specs.settings import Settings


def is_wanted(name: str, options: Options, settings: Settings, *, is_own: bool = True) -> bool:
    """Return whether neither the options nor the settings leave a tool out.

    A tool that is not this project's own is an MCP server's, which `core_tools` is not about.
    """
    if options.tools is not None:
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in options.tools)
    is_core = settings.core_tools is None or name in settings.core_tools or not is_own
    return is_core and name not in settings.exclude_tools


def hides(options: Options, settings: Settings) -> Callable[[str], bool]:
    """Return what says of a file of the project whether a rule forbids to read it."""
    return _policy(root=str(options.directory.resolve()), deny=settings.deny).hides


def make_policy(
    options: Options,
    settings: Settings,
    workspace: Workspace,
    folder: pathlib.Path,
    projects: Projects,
) -> Policy:
    """Return the rules of approval of a session, which has a folder for whole outputs.

    Raises:
      UsageError: a rule is wrong.
    """
    project = options.directory.resolve()
    # What runs in a sandbox can harm only itself.
    mode = settings.mode or ("yolo" if workspace.is_isolated else "default")
    outputs = workspace.outputs if workspace.is_isolated else str(folder)
    return _policy(
        mode=options.mode or mode,
        root=workspace.root,
        allow=(*settings.allow, *projects.rules(project)),
        ask=settings.ask,
        deny=settings.deny,
        directories=(outputs, *settings.additional_directories),
        servers=[one.name for one in settings.mcp_servers.values() if one.is_trusted],
        follow=None if workspace.is_isolated else _follow,
        keep_rule=functools.partial(projects.add_rule, project),
    )


def _policy(**given: Any) -> Policy:
    try:
        return Policy(**given)
    except ValueError as error:
        raise UsageError(str(error)) from error


def _follow(path: str) -> str:
    """Return a path with links followed; one that no file can have stays as it is."""
    try:
        return os.path.realpath(path)
    except ValueError:
        return path
