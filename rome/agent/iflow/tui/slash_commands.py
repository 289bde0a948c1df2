"""The slash commands of the terminal."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Any

from rich.table import Table
from rich.text import Text

from rome.agent.iflow import events
from rome.agent.iflow.feedback import make_feedback
from rome.agent.iflow.interfaces import MODES
from rome.agent.iflow.protocols.mcp_tools import printable
from rome.agent.iflow.tui.terminal import Action, ActionError, Terminal

ACTIONS: dict[str, Action] = {}


def action(name: str, help: str) -> Callable[[Any], Any]:
    """Return a decorator that makes a function a slash command."""

    def decorate(do: Callable[[Terminal, str], Awaitable[None]]) -> Any:
        ACTIONS[name] = Action(help, do)
        return do

    return decorate


@action("help", "shows this")
async def _help(terminal: Terminal, words: str) -> None:
    rows = [(f"/{name}", what) for name, what in terminal.command_names()]
    rows += [
        ("!command", "runs a command in the agent's workspace"),
        ("@path, @server:uri", "brings in a file, or a resource of an MCP server"),
        ("Shift-Tab", "goes on to the next mode"),
        ("Alt-Enter", "begins a new line"),
    ]
    _print_rows(terminal, rows)


@action("plan", "turns plan mode on or off: the agent only reads, and presents a plan")
async def _plan(terminal: Terminal, words: str) -> None:
    agent = terminal.session.agent
    is_on = agent.conversation.mode == "plan"
    agent.set_mode("default" if is_on else "plan")


@action("mode", "shows or changes the mode of approval")
async def _mode(terminal: Terminal, words: str) -> None:
    if not words:
        now = terminal.session.agent.conversation.mode
        rows = [(f"{'*' if mode == now else ' '} {mode}", what) for mode, what in MODES.items()]
        _print_rows(terminal, rows)
    elif words in MODES:
        terminal.session.agent.set_mode(words)
    else:
        raise ActionError(f"no mode {words!r}; there are {', '.join(MODES)}")


@action("model", "shows or changes the model")
async def _model(terminal: Terminal, words: str) -> None:
    session = terminal.session
    if words:
        session.agent.set_model(await session.make_model(words))
        return
    now = session.agent.model.name
    names = dict.fromkeys([now, *session.models])
    _print_rows(terminal, [("*" if name == now else " ", name) for name in names])


@action("compact", "makes the context shorter; words after it say what to keep above all")
async def _compact(terminal: Terminal, words: str) -> None:
    terminal.start(terminal.session.agent.compact(words))


@action("rewind", "goes back to before a message: NUMBER [conversation | files | both]")
async def _rewind(terminal: Terminal, words: str) -> None:
    requests = terminal.session.agent.conversation.requests
    if not words:
        rows = [(str(number), one.text.strip()) for number, one in enumerate(requests, 1)]
        _print_rows(terminal, rows or [("", "nothing was said yet")])
        return
    number, _, what = words.partition(" ")
    what = what.strip() or "both"
    if not number.isdecimal() or not 1 <= int(number) <= len(requests):
        raise ActionError(f"no message {number!r}; /rewind lists {len(requests)}")
    if what not in ("conversation", "files", "both"):
        raise ActionError(f"rewind conversation, files or both, not {what!r}")
    await terminal.session.agent.rewind(
        requests[int(number) - 1].number, conversation=what != "files", files=what != "conversation"
    )


@action("resume", "lists the sessions of this project, or goes on with one: ID")
async def _resume(terminal: Terminal, words: str) -> None:
    if words:
        await terminal.open(resume=words)
        return
    rows = [
        (one.id, f"{time.strftime('%Y-%m-%d %H:%M', time.localtime(one.changed))}  {one.title}")
        for one in terminal.opener.sessions(terminal.directory)
    ]
    _print_rows(terminal, rows or [("", "no sessions")])


@action("clear", "begins a new session; this one stays and can be resumed")
async def _clear(terminal: Terminal, words: str) -> None:
    await terminal.open()


@action("later", "gives the agent a message once it has finished this turn")
async def _later(terminal: Terminal, words: str) -> None:
    if not words:
        for text in terminal.queue:
            terminal.screen.say(text)
        return
    terminal.queue.append(words)
    if not terminal.is_working:
        raise ActionError("the agent does nothing now; write the message without /later")


@action("todo", "shows the agent's list of what is to do")
async def _todo(terminal: Terminal, words: str) -> None:
    items = terminal.session.agent.conversation.todo
    terminal.screen.take(events.TodoChanged(items=items))
    if not items:
        terminal.screen.say("the list is empty")


@action("tools", "lists the tools")
async def _tools(terminal: Terminal, words: str) -> None:
    tools = terminal.session.agent.tools.values()
    _print_rows(terminal, [(tool.name, tool.description) for tool in tools])


@action("agents", "lists the sub-agents, and those that run")
async def _agents(terminal: Terminal, words: str) -> None:
    session = terminal.session
    rows = [(spec.name, spec.when) for spec in session.agents.values()]
    running = session.agent.conversation.subagents.values()
    rows += [(one.id, f"runs: {one.agent}: {one.prompt}") for one in running]
    _print_rows(terminal, rows or [("", "no sub-agents; .agents/agents/NAME.md defines one")])


@action("skills", "lists the skills")
async def _skills(terminal: Terminal, words: str) -> None:
    rows = [(skill.name, skill.description) for skill in terminal.session.skills.values()]
    _print_rows(terminal, rows or [("", "no skills; .agents/skills/NAME/SKILL.md defines one")])


@action("mcp", "lists the MCP servers; restart NAME opens one again")
async def _mcp(terminal: Terminal, words: str) -> None:
    servers = terminal.session.servers
    if servers is None or not servers.servers:
        terminal.screen.say("no MCP servers; mcpServers in .iflow/settings.json defines them")
        return
    order, _, name = words.partition(" ")
    if order == "restart":
        if name not in servers.servers:
            raise ActionError(f"no MCP server {name!r}; there are {', '.join(servers.servers)}")
        before = {tool.name for tool in servers.tools}
        await servers.restart(name)
        tools = terminal.session.agent.tools
        for gone in before - {tool.name for tool in servers.tools}:
            tools.pop(gone, None)
        tools.update({tool.name: tool for tool in servers.tools})
    rows = []
    for server in servers.servers.values():
        said = f"{server.state}, {len(server.tools)} tools, {server.resources} resources"
        said += f", {len(server.prompts)} prompts"
        if withheld := sum(tool.is_withheld for tool in server.tools.values()):
            said += f", {withheld} withheld until you agree to their change"
        rows.append((server.name, f"{said} {server.reason}"))
    _print_rows(terminal, rows)


@action("memory", "shows what the agent is told at the beginning; words after it are remembered")
async def _memory(terminal: Terminal, words: str) -> None:
    if not words:
        terminal.screen.console.print(Text(printable(terminal.session.agent.conversation.system)))
        return
    text = f"Remember this with save_memory, and do nothing else: {words}"
    if terminal.is_working:
        terminal.session.agent.steer(text)
    else:
        terminal.start(terminal.play(text))


@action("cost", "shows tokens, price and context")
async def _cost(terminal: Terminal, words: str) -> None:
    agent = terminal.session.agent
    used = agent.conversation.usage
    context = agent.conversation.context_tokens
    rows = [
        ("read", f"{used.prompt:,} tokens, {used.cached:,} of them from a cache"),
        ("written", f"{used.completion:,} tokens"),
        ("context", f"{context:,} of {agent.model.context_tokens:,} tokens"),
        ("price", f"{used.price:.4g}" if used.price else "no prices are set"),
    ]
    _print_rows(terminal, rows)


@action("feedback", "judges the last answer: accept, reject, rate 1-5, correct WORDS [comment]")
async def _feedback(terminal: Terminal, words: str) -> None:
    log = terminal.session.agent.log
    answers = [one for one in log.events if isinstance(one, events.AssistantMessage)]
    if not answers:
        raise ActionError("there is no answer yet")
    verdict, _, text = words.partition(" ")
    rating = 0
    if verdict == "rate":
        number, _, text = text.strip().partition(" ")
        rating = int(number) if number.isdecimal() else 0
    target = answers[-1].number
    log.append(make_feedback(log, verdict, target=target, rating=rating, text=text.strip()))


@action("quit", "ends the program; the session can be resumed")
async def _quit(terminal: Terminal, words: str) -> None:
    terminal.quit()


def _print_rows(terminal: Terminal, rows: list[tuple[str, str]]) -> None:
    """Print two columns; what is long in the second one is broken."""
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=terminal.screen.console.width >= 60, style="bold")
    table.add_column()
    for left, right in rows:
        shown = printable(right).strip().partition("\n")[0][:300]
        table.add_row(Text(printable(left)), Text(shown))
    terminal.screen.console.print(table)
