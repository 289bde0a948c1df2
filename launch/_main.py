"""Run a command built on absl flags, with every expected failure reported in one line.

A command ends with:

    if __name__ == "__main__":
        run_command("launch.train", main, known_errors=known_errors)

`main(argv) -> int` returns the exit status. `known_errors()` returns exception types that mean a
wrong input or a broken machine, not a fault of the program; it is called only after `main` has
failed, so it may import heavy modules. ValueError and OSError are always known. With ROME_DEBUG=1
the traceback is kept.
"""

from __future__ import annotations

import asyncio
import os
import pathlib
import re
import sys
from collections.abc import Callable, Sequence

from absl import app, flags

from rome.version import describe

Main = Callable[[list[str]], int]
KnownErrors = Callable[[], Sequence[type[BaseException]]]


def run_command(
    name: str,
    main: Main,
    *,
    known_errors: KnownErrors = tuple,
    failure_status: int = 1,
    when_stopped: Callable[[], str] | None = None,
) -> None:
    """Parse the flags, run `main` and exit with its status.

    `--version` prints the version of this code and does nothing else.

    Args:
      name: the command, such as "launch.train"; it begins every error line.
      main: takes the arguments that absl leaves over, with the program's name first.
      known_errors: exception types that become one line, besides ValueError and OSError.
      failure_status: exit status after a known error; 1 or 2.
      when_stopped: text to print after Ctrl-C (exit status 130). None lets KeyboardInterrupt pass.
    """

    def run(argv: list[str]) -> int:
        try:
            return main(argv)
        except (KeyboardInterrupt, asyncio.CancelledError):
            if when_stopped is None:
                raise
            print(when_stopped(), file=sys.stderr)
            return 130
        except Exception as error:
            is_known = isinstance(error, (ValueError, OSError, *known_errors()))
            if not is_known or os.environ.get("ROME_DEBUG"):
                raise
            print(f"{name}: {describe_error(error)}", file=sys.stderr)
            return failure_status

    def parse(argv: list[str]) -> list[str]:
        return parse_flags(name, argv)

    if "--version" in sys.argv[1:]:
        print(f"{name} {describe()}")
        sys.exit()
    app.run(run, flags_parser=parse)


def parse_flags(name: str, argv: list[str]) -> list[str]:
    """Parse absl flags; exit with one line that starts with `name` where they are not understood.

    A config file is loaded while flags are parsed, so its errors are reported here too.
    """
    try:
        return flags.FLAGS(argv)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        text = str(error.args[0] if error.args else error)
        text = _without_traceback(text)
        text = text.strip("'\"").replace("\\'", "'").replace("\\n", " ")
        if isinstance(error, (AttributeError, KeyError)):  # ml_collections names the key alone
            given = _flag_of_key(text, argv)
            text = f"{given}unknown config key: {text} (docs/configuration.md lists all keys)"
        sys.exit(f"{name}: {' '.join(text.split())}")


def _without_traceback(text: str) -> str:
    """Return an error of a config file without the traceback that ml_collections puts before it.

    Where the file itself is wrong (a TypeError), the place in it stays.
    """
    before, is_of_file, trace = text.partition("Error whilst parsing config file:")
    errors = list(re.finditer(r"^\w+: ", trace, re.MULTILINE))
    if not is_of_file or not errors:
        return text
    last = errors[-1]
    if last[0] == "ValueError: ":
        return before + trace[last.end() :]
    places = re.findall(r'File "(.+)", line (\d+)', trace[: last.start()])
    return f"{before}{':'.join(places[-1])}: {trace[last.start() :]}"


def _flag_of_key(text: str, argv: list[str]) -> str:
    """Return the flag that sets the key which `text` begins with, as "--config.KEY: "; or ""."""
    words = text.split()
    key = words[0].strip("'\"") if words else ""
    names = (argument.partition("=")[0] for argument in argv)
    return next((f"{name}: " for name in names if name.endswith(f".{key}")), "")


def describe_error(error: BaseException) -> str:
    """Return the message of an error on one line; an OSError names its file first."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(text.split())


def reject_arguments(argv: list[str], example: str) -> None:
    """Raise ValueError for an argument that is not a flag, with `example` as a correct one."""
    if len(argv) > 1:
        raise ValueError(f"argument {argv[1]!r} is not understood; flags look like {example}")


def use_compilation_cache() -> None:
    """Keep compiled programs in .cache/jax, unless the environment names another place.

    Call it before JAX is imported.
    """
    cache = pathlib.Path(".cache/jax").absolute()
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
