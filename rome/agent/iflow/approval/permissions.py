"""What the tools of a session may do: which of them there are, and the rules of approval."""

from __future__ import annotations

import fnmatch
import functools
import os
import pathlib
from collections.abc import Callable

from rome.agent.iflow.approval.policy import Policy
from rome.agent.iflow.options import Options, UsageError
from rome.agent.iflow.places.workspace import Workspace
from rome.agent.iflow.specs.projects import Projects
from rome.agent.iflow.specs.settings import Settings


def is_wanted(name: str, options: Options, settings: Settings, *, is_own: bool = True) -> bool:
    """Return whether neither the options nor the settings leave a tool out.

    Args:
      name: of the tool.
      options: of the user.
      settings: with the tools that there are, and those that are not.
      is_own: whether it is one of this project, and not of an MCP server.
    """
    if options.tools is not None:
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in options.tools)
    is_core = settings.core_tools is None or name in settings.core_tools or not is_own
    return is_core and name not in settings.exclude_tools


def hides(options: Options, settings: Settings) -> Callable[[str], bool]:
    """Return what says of a file of the project whether a rule forbids to read it.

    Raises:
      UsageError: a rule is wrong.
    """
    try:
        return Policy(root=str(options.directory.resolve()), deny=settings.deny).hides
    except ValueError as error:
        raise UsageError(str(error)) from error


def make_policy(
    options: Options,
    settings: Settings,
    workspace: Workspace,
    folder: pathlib.Path,
    projects: Projects,
) -> Policy:
    """Return the rules of approval of a session.

    Args:
      options: of the user.
      settings: with rules.
      workspace: where tools work.
      folder: of the session, where whole outputs are kept.
      projects: keeps the rules that the user adds.

    Raises:
      UsageError: a rule is wrong.
    """
    project = options.directory.resolve()
    # What runs in a sandbox can harm only itself.
    mode = settings.mode or ("yolo" if workspace.is_isolated else "default")
    outputs = workspace.outputs if workspace.is_isolated else str(folder)
    try:
        return Policy(
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
    except ValueError as error:
        raise UsageError(str(error)) from error


def _follow(path: str) -> str:
    """Return a path with links followed; one that no file can have stays as it is."""
    try:
        return os.path.realpath(path)
    except ValueError:
        return path
