r"""iFlow: an agent on the files of this directory. Also installed as the command `iflow`.

    iflow -p "fix the failing test" --base_url=http://127.0.0.1:8000/v1          # in a sandbox
    iflow -p "fix the failing test" --workspace=host --mode=accept_edits        # on these files
    iflow -p "and now the docs" --continue --output-format=json | jq .result

Settings are read from .agents/, .claude/ and .iflow/, here and in the home directory, and from
IFLOW_* variables (docs/iflow.md). Exit status: 0 finished, 1 usage, 2 infrastructure (no model, no
sandbox), 3 a limit, 4 aborted.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import pathlib
import re
import signal
import sys
import threading
import time
from collections.abc import Coroutine, Iterator, Sequence
from typing import Any

from rome.version import describe

USAGE = 1
INFRASTRUCTURE = 2
ABORTED = 4
END_SECONDS = 10.0  # for the process to end, once the session has
MODES = ("plan", "default", "accept_edits", "yolo")
FORMATS = ("text", "json", "stream-json")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    try:
        return _main(argv)
    except (KeyboardInterrupt, asyncio.CancelledError):  # also before there is a session
        return ABORTED


def _main(argv: Sequence[str] | None) -> int:
    given = sys.argv[1:] if argv is None else list(argv)
    arguments = _parser().parse_args([_as_flag(word) for word in given])
    from rome.agent.iflow.event_log import EventError
    from rome.agent.iflow.models.model import ModelError
    from rome.agent.iflow.options import UsageError
    from rome.agent.iflow.places.workspace import WorkspaceError
    from rome.agent.iflow.places.worktree import WorktreeError
    from rome.agent.iflow.sessions import SessionUnavailable
    from rome.agent.iflow.specs.spec_files import SpecError

    try:
        if arguments.list_sessions:
            return _list_sessions(arguments)
        if not arguments.worktree:
            return _end_for_sure(_run(arguments))
        with _worktree(arguments):
            return _end_for_sure(_run(arguments))
    except (UsageError, SpecError, EventError, SessionUnavailable, WorktreeError) as error:
        return _fail(error, USAGE)
    except (ModelError, WorkspaceError, OSError) as error:
        return _fail(error, INFRASTRUCTURE)


def _end_for_sure(work: Coroutine[Any, Any, int]) -> int:
    """Run to the end; a tool that ignores its own end does not hold the process for ever."""
    watchdogs: list[threading.Timer] = []

    async def run() -> int:
        this = asyncio.current_task()
        assert this is not None
        # So that what was opened is closed, MCP servers among it.
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, this.cancel)
        status = await work
        watchdog = threading.Timer(END_SECONDS, os._exit, [status])
        watchdog.daemon = True
        watchdog.start()
        watchdogs.append(watchdog)
        return status

    try:
        return asyncio.run(run())
    finally:
        for watchdog in watchdogs:
            watchdog.cancel()


@contextlib.contextmanager
def _worktree(arguments: argparse.Namespace) -> Iterator[None]:
    """Let the agent work in a git worktree; one where nothing was done is removed."""
    from rome.agent.iflow.places.worktree import close_worktree, open_worktree

    worktree = open_worktree(arguments.directory, arguments.worktree)
    arguments.directory = str(worktree.path)
    try:
        yield
    finally:
        if not close_worktree(worktree):
            where = f"{worktree.path}, branch {worktree.branch}"
            print(f"iflow: the work is in {where}", file=sys.stderr)


async def _run(arguments: argparse.Namespace) -> int:
    """Open the session that was asked for, put the agent together, and let it work."""
    from rome.agent.iflow.assemble import assemble
    from rome.agent.iflow.headless import run_headless
    from rome.agent.iflow.options import UsageError

    if arguments.serve_mcp:
        return await _serve_mcp(arguments)
    if arguments.acp or arguments.http is not None or _is_for_terminal(arguments):
        return await _serve_person(arguments)
    prompt = arguments.prompt
    goes_on = arguments.resume or arguments.go_on or arguments.fork
    if prompt == "-":
        prompt = sys.stdin.buffer.read().decode(errors="replace") if sys.stdin else ""
    if not prompt and not goes_on:
        raise UsageError('say what is to be done: iflow -p "fix the failing test"')
    options = _options(arguments)
    stored = _session(arguments)
    if not prompt and stored.is_at_rest:
        stored.close()
        raise UsageError(f"session {stored.id} has nothing left to go on with; say more by -p")
    session = await assemble(options, stored)
    return await run_headless(session, prompt, output=arguments.output_format)


def _is_for_terminal(arguments: argparse.Namespace) -> bool:
    """Return whether a person at a terminal wants to talk with the agent."""
    if arguments.interactive:
        return True
    is_headless = arguments.prompt or arguments.output_format != "text"
    streams = (sys.stdin, sys.stdout)  # None where it is closed
    return not is_headless and all(stream and stream.isatty() for stream in streams)


async def _serve_person(arguments: argparse.Namespace) -> int:
    """Let a person talk with the agent: in this terminal, through an editor, or over HTTP."""
    from rome.agent.iflow.opening import SessionOpener, ask_trust

    options = _options(arguments)
    opener = SessionOpener(options)
    if arguments.acp:
        from rome.agent.iflow.protocols.acp_agent import serve

        await serve(opener)
        return 0
    from rome.agent.iflow.protocols import http_api
    from rome.agent.iflow.tui.slash_commands import ACTIONS
    from rome.agent.iflow.tui.terminal import Terminal

    directory = str(options.directory.resolve())
    if sys.stdin.isatty() and sys.stdout.isatty():
        with contextlib.suppress(EOFError):
            ask_trust(options, input)
    session = await opener.open_stored(_session(arguments), directory)
    if arguments.http is not None:
        token = os.environ.get("IFLOW_HTTP_TOKEN", "")
        await http_api.serve(session, host="127.0.0.1", port=arguments.http, token=token)
    history = pathlib.Path.home() / ".iflow" / "history"
    terminal = Terminal(opener, session, directory, ACTIONS, history=history)
    return await terminal.run(arguments.interactive)


async def _serve_mcp(arguments: argparse.Namespace) -> int:
    """Serve the tools to a client of MCP on stdio."""
    from rome.agent.iflow.opening import tool_server
    from rome.agent.iflow.protocols.mcp_server import serve_stdio

    async with tool_server(_options(arguments)) as served:
        await serve_stdio(served)
    return 0


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"a port from 0 (any) to 65535, not {text!r}")
    return int(text)


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"a whole number from 0 on, not {text!r}")
    return int(text)


def _amount(text: str) -> float:
    try:
        amount = float(text)
    except ValueError:
        amount = -1.0
    if not 0 <= amount < float("inf"):
        raise argparse.ArgumentTypeError(f"a number from 0 on, not {text!r}")
    return amount


def _options(arguments: argparse.Namespace):
    from rome.agent.iflow.limits import Limits
    from rome.agent.iflow.models.endpoint_model import Prices
    from rome.agent.iflow.options import Options, UsageError

    if arguments.max_price and not any(arguments.prices):
        raise UsageError("--max_price needs --prices: without them nothing has a price")
    if len(arguments.prices) > 3:
        raise UsageError("--prices takes at most three numbers: read, written, read from a cache")
    if not os.path.isdir(arguments.directory):
        raise UsageError(f"--directory {arguments.directory} is no directory")
    tools = None
    if arguments.tools is not None:
        tools = tuple(name.strip() for name in arguments.tools.split(",") if name.strip())
    return Options(
        directory=pathlib.Path(arguments.directory),
        workspace=arguments.workspace,
        model=arguments.model,
        base_url=arguments.base_url or os.environ.get("OPENAI_BASE_URL", ""),
        api_key=arguments.api_key or os.environ.get("OPENAI_API_KEY", ""),
        engine=arguments.engine,
        tokenizer=arguments.tokenizer,
        mode="yolo" if arguments.yolo else arguments.mode,
        tools=tools,
        context_tokens=arguments.context_tokens,
        max_tokens=arguments.max_answer_tokens,
        temperature=arguments.temperature,
        prices=Prices(*arguments.prices),
        limits=Limits(
            turns=arguments.max_turns,
            tokens=arguments.max_tokens,
            seconds=arguments.time_limit,
            price=arguments.max_price,
        ),
        egress=tuple(arguments.egress),
        has_web=arguments.web,
        trust=arguments.trust,
    )


def _session(arguments: argparse.Namespace):
    from rome.agent.iflow.sessions import SessionStore

    store = SessionStore(pathlib.Path(arguments.directory))
    if arguments.fork:
        return store.fork(arguments.fork)
    if arguments.resume:
        return store.open(arguments.resume)
    return store.latest() if arguments.go_on else store.new()


def _list_sessions(arguments: argparse.Namespace) -> int:
    from rome.agent.iflow.sessions import SessionStore

    for info in SessionStore(pathlib.Path(arguments.directory)).list():
        changed = time.strftime("%Y-%m-%d %H:%M", time.localtime(info.changed))
        print(f"{info.id}  {changed}  {info.size / 1024:8.0f} KiB  {info.title}")
    return 0


def _parser() -> argparse.ArgumentParser:
    """Return the flags; words of a long flag may be joined by - or by _."""
    parser = _Parser(
        prog="iflow",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("-p", "--prompt", default="", help='what is to be done; "-" reads it from standard input')
    add("-i", "--interactive", metavar="TEXT", default="", help="say this first, and talk on")
    add("--acp", action="store_true", help="serve an editor on stdio (Agent Client Protocol)")
    add(
        "--http",
        metavar="PORT",
        type=_port,
        help="serve the session over HTTP on this machine; IFLOW_HTTP_TOKEN is the token",
    )
    add(
        "--serve_mcp",
        choices=("stdio",),
        help="serve the tools over MCP, without a model",
    )
    add("--output_format", default="text", choices=FORMATS, help="what is printed")
    add("-c", "--continue", dest="go_on", action="store_true", help="go on with the last session")
    add("-r", "--resume", metavar="ID", default="", help="go on with a session")
    add("--fork", metavar="ID", default="", help="go on with a copy of a session")
    add("--list_sessions", action="store_true", help="show this directory's sessions")
    add("-m", "--model", default="", help="name of the model")
    add("--base_url", default="", help="of an OpenAI-compatible server, with /v1")
    add("--engine", default="", help="URL of launch.serve or SGLang, for exact tokens")
    add("--tokenizer", default="", help="folder with the engine's tokenizer")
    add("--api_key", default="", help="for it; better in OPENAI_API_KEY or IFLOW_apiKey")
    add("--temperature", type=_amount, help="of sampling")
    add("--context_tokens", type=_count, default=0, help="of a conversation")
    add("--max_answer_tokens", type=_count, default=0, help="of one answer")
    add("--max_turns", type=_count, default=0, help="answers of the model in one turn of the user")
    add("--max_tokens", type=_count, default=0, help="read and written in one turn of the user")
    add("--time_limit", type=_amount, default=0.0, help="seconds of one turn of the user")
    add("--max_price", type=_amount, default=0.0, help="of one turn of the user; needs --prices")
    add(
        "--prices",
        type=_amount,
        nargs="+",
        default=(0.0, 0.0),
        metavar="PRICE",
        help="of a million tokens: read, written, and read from a cache",
    )
    add("--mode", default="", choices=MODES, help="of approval")
    add("-y", "--yolo", action="store_true", help="as --mode=yolo: nothing is asked")
    add("--workspace", default="sandbox", choices=("sandbox", "host"), help="where tools work")
    add("--egress", action="append", default=[], metavar="HOST:PORT", help="open to a sandbox")
    add("--worktree", metavar="NAME", default="", help="work in a git worktree of this name")
    add("--directory", default=".", help="of the project")
    add("--tools", help="the only tools there are, such as shell,read_file,server__*")
    add("--web", action="store_true", help="let the agent fetch pages of the web")
    add("--trust", action="store_true", help="trust this directory's hooks, servers and rules")
    add("--version", action="version", version=f"iflow {describe()}")
    return parser


class _Parser(argparse.ArgumentParser):
    """Ends with the exit status of a wrong usage."""

    def error(self, message: str):
        """Say what is wrong on one line."""
        self.exit(USAGE, f"iflow: {message} (--help shows the flags)\n")


def _as_flag(word: str) -> str:
    """Return a flag with _ between the words of its name."""
    match = re.match(r"--[A-Za-z][A-Za-z-]*", word)
    return match[0][:2] + match[0][2:].replace("-", "_") + word[match.end() :] if match else word


def _fail(error: Exception, status: int) -> int:
    if os.environ.get("ROME_DEBUG"):
        raise error
    print(f"iflow: {' '.join(str(error).split())}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
