"""Other names of the tools: those that files written for other agents use."""

from __future__ import annotations

from collections.abc import Mapping

ALIASES: Mapping[str, tuple[str, ...]] = {
    "shell": ("Shell", "Bash", "bash", "run_shell_command", "ShellTool"),
    "shell_output": ("BashOutput", "TaskOutput"),
    "shell_kill": ("KillShell", "KillBash", "TaskStop"),
    "shell_list": (),
    "read_file": ("Read", "ReadFile", "NotebookRead"),
    "write_file": ("Write", "WriteFile"),
    "edit": ("Edit", "replace", "StrReplaceFile"),
    "multi_edit": ("MultiEdit",),
    "glob": ("Glob", "FindFiles"),
    "search": ("Search", "Grep", "grep", "search_file_content", "SearchText"),
    "list_directory": ("LS", "ReadFolder", "ls"),
    "todo": ("TodoWrite", "TodoRead", "todo_write", "todo_read"),
    "exit_plan_mode": ("ExitPlanMode",),
    "ask_user": ("AskUserQuestion", "AskUser"),
    "save_memory": ("SaveMemory",),
    "skill": ("Skill",),
    "task": ("Task", "Agent"),
    "web_fetch": ("WebFetch",),
}
_NAME_OF = {alias: name for name, aliases in ALIASES.items() for alias in aliases}


def tool_name(name: str) -> str:
    """Return the name of a tool as this agent has it; `mcp__server__tool` becomes server__tool."""
    if name.startswith("mcp__"):
        return name.removeprefix("mcp__")
    return _NAME_OF.get(name, name)


def names_of(name: str) -> tuple[str, ...]:
    """Return all names of a tool, its own first."""
    mcp = (f"mcp__{name}",) if "__" in name else ()
    return (name, *ALIASES.get(name, ()), *mcp)
