"""What a shell script installs or fetches before it works, read from its text.

The test scripts of published tasks begin with `apt-get install curl`, `curl .../uv/install.sh | sh`
and `uv pip install pytest==8.4.1`. A sandbox has no network, so all of it must be there already:
`needs_of` lists it, and toolchain.py looks for it before anyone plays.
"""

from __future__ import annotations

import dataclasses
import posixpath
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence

Row = tuple[int, str]  # number of a line, its text
Found = tuple[str, str, str]  # kind, name, version of a need

# Where uv's installer comes from; the tool chain has a uv of its own.
UV_INSTALLER = "astral.sh/uv"
_MAX_CHARS = 1 << 18  # searched of a script
_MAX_ROW_CHARS = 4000  # searched of a command
MAX_SHOWN_CHARS = 80
_MAY_NEED = re.compile(
    r"\b(?:apt|pip|uv|uvx|pipx|pytest|py\.test|curl|wget|apk|yum|dnf|microdnf|zypper|npm|pnpm|yarn"
    r"|npx|git|cargo|go|gem|conda|mamba)"
)
_HERE = r"(?!localhost|127\.|0\.0\.0\.0|\[::1\]|\$)"
_URL = re.compile(rf"\b(?:https?|ftp)://{_HERE}")
_FETCHES = re.compile(
    r"\b(?:apk|yum|dnf|microdnf|zypper)\s+(?:-\S+\s+)*(?:update|upgrade|install|add)\b"
    r"|\b(?:npm|pnpm|yarn)\s+(?:install|ci|add|i)\b|\bnpx\s"
    r"|\bgit\s+clone\b.*(?:https?|ssh|git)://|\bgit\s+clone\b.*git@"
    r"|\bcargo\s+(?:install|fetch|add)\b|\bgo\s+(?:get|install)\b|\bgo\s+mod\s+download\b"
    r"|\bgem\s+install\b|\b(?:conda|mamba)\s+(?:install|create)\b"
)
_HEREDOC = re.compile(r"(?<!<)<<-?\s*([\"']?)(\w+)\1")
_ASSIGNMENT = re.compile(r"[A-Za-z_]\w*=")
# Words before a command that leave it what it is.
_PREFIX_WORDS = "if then else elif while until do ! { sudo exec time env nohup"
_PREFIXES = frozenset(_PREFIX_WORDS.split())
_SEPARATORS = frozenset(";&|()")
_REQUIREMENT = re.compile(r"([A-Za-z0-9](?:[\w.-]*[A-Za-z0-9])?)(?:\[[^\]]*\])?\s*((?:[=<>!~].*)?)")
# The tool chain answers for the installers themselves.
_INSTALLERS = frozenset(["pip", "setuptools", "wheel", "uv"])
# Options of pip and uv that take the next word.
_OPTIONS_WITH_VALUE = """
-i --index-url --extra-index-url --index --default-index -f --find-links -c --constraint
-p --python --python-version -t --target --prefix --project --directory --group --extra
--env-file --timeout --cache-dir --root --platform --no-binary --only-binary
"""
_WITH_VALUE = frozenset(_OPTIONS_WITH_VALUE.split())
_WITH_REQUIREMENT = frozenset(["-w", "--with", "--from"])

# Debian packages without a program of their own, or of a recording harness.
_PACKAGES_WITHOUT_PROGRAM = """
apt-utils asciinema ca-certificates gnupg locales python3-pip python3-venv
software-properties-common tmux tzdata
"""
_WITHOUT_PROGRAM = frozenset(_PACKAGES_WITHOUT_PROGRAM.split())
_PROGRAMS = {
    "build-essential": ("gcc", "make"),
    "coreutils": ("ls",),
    "findutils": ("find",),
    "gawk": ("awk",),
    "mawk": ("awk",),
    "ripgrep": ("rg",),
    "procps": ("ps",),
    "python3-minimal": ("python3",),
    "python-is-python3": ("python3",),
    "nodejs": ("node",),
    "golang": ("go",),
    "xz-utils": ("xz",),
    "bsdmainutils": ("column",),
    "openssh-client": ("ssh",),
    "netcat-openbsd": ("nc",),
    "diffutils": ("diff",),
}


@dataclasses.dataclass(frozen=True)
class Need:
    """Something that a script installs, or fetches, or takes for installed.

    Attributes:
      line: its line in the script.
      command: the command, as far as messages show it.
      kind: "system" (a Debian package), "python" (a Python package) or "network" (all else).
      name: of the package; "" for the network.
      version: what a Python package is asked to be, such as "==8.4.1"; "" for any.
    """

    line: int
    command: str
    kind: str
    name: str = ""
    version: str = ""


def needs_of(text: str, read: Mapping[str, bytes] | None = None) -> list[Need]:
    """Return the needs of a shell script, in its order; comments and here-documents have none.

    Args:
      text: the script.
      read: files beside it, by name, for `pip install -r NAME`.
    """
    found: list[Need] = []
    fetchers: set[str] = set()  # programs that it uses for more than uv's installer
    for rows in _logical_rows(text[:_MAX_CHARS]):
        found += needs_of_rows(rows, read)
        for words in _commands(_joined(rows)):
            if words[0] in ("curl", "wget") and not any(UV_INSTALLER in word for word in words):
                fetchers.add(words[0])
    answered = {"curl", "wget"} - fetchers
    return [need for need in found if need.kind != "system" or need.name not in answered]


def needs_of_rows(rows: Sequence[Row], read: Mapping[str, bytes] | None = None) -> list[Need]:
    """Return the needs of one list of commands, which may go over several lines."""
    found = []
    for words in _commands(_joined(rows)):
        for kind, name, version in _of_command(words, read or {}):
            shown = re.compile(rf"(?<![\w-]){re.escape(name or words[0])}", re.IGNORECASE)
            line = next((number for number, row in rows if shown.search(row)), rows[0][0])
            found.append(Need(line, " ".join(words)[:MAX_SHOWN_CHARS], kind, name, version))
    return found


def calls_installer(rows: Sequence[Row]) -> bool:
    """Return whether a list of commands calls an installer, for something or for nothing."""
    programs = {words[0] for words in _commands(_joined(rows))}
    return bool(programs & {"apt", "apt-get", "pip", "pip3", "uv", "uvx", "curl", "wget"})


def programs_of(package: str) -> tuple[str, ...]:
    """Return the programs that stand for a Debian package: it counts as installed with them."""
    if package in _WITHOUT_PROGRAM:
        return ()
    return _PROGRAMS.get(package, (package,))


# -- reading shell
# -------------------------------------------------------------------------------------------------


def _logical_rows(text: str) -> Iterator[list[Row]]:
    """Yield the lines of each command list with their numbers, without here-documents."""
    rows: list[Row] = []
    end = ""
    for number, row in enumerate(text.splitlines(), 1):
        if end:
            end = "" if row.strip() == end else end
            continue
        continues = row.endswith("\\")
        rows.append((number, row.removesuffix("\\")))
        if continues:
            continue
        if match := _HEREDOC.search(row):
            end = match[2]
        yield rows
        rows = []
    if rows:
        yield rows


def _joined(rows: Sequence[Row]) -> str:
    """Return the lines as one, without comments."""
    text = " ".join(re.sub(r"(^|\s)#.*", "", row[:_MAX_ROW_CHARS]) for _, row in rows)
    return text[:_MAX_ROW_CHARS]


def _commands(text: str) -> list[list[str]]:
    """Return the simple commands of a line that may need something, as words.

    A line that is not whole by itself, such as one within a quoted text, is split at blanks.
    """
    if not _MAY_NEED.search(text):
        return []
    lexer = shlex.shlex(text, posix=True, punctuation_chars=";&|()")
    lexer.whitespace_split = True
    lexer.commenters = ""
    try:
        tokens = list(lexer)
    except ValueError:
        tokens = text.split()
    commands: list[list[str]] = [[]]
    for token in tokens:
        if set(token) <= _SEPARATORS:
            commands.append([])
        else:
            commands[-1].append(token)
    return [words for command in commands if (words := _without_prefixes(command))]


def _without_prefixes(words: list[str]) -> list[str]:
    """Return a command without keywords, assignments and sudo before it, its program by name."""
    index = 0
    while index < len(words):
        word = words[index]
        is_option_of_prefix = index > 0 and word.startswith("-")
        if word in _PREFIXES or _ASSIGNMENT.match(word) or is_option_of_prefix:
            index += 1
        else:
            return [posixpath.basename(word) or word, *words[index + 1 :]]
    return []


# -- what a command needs
# -------------------------------------------------------------------------------------------------


def _of_command(words: list[str], read: Mapping[str, bytes]) -> list[Found]:
    program = words[0]
    rest = words[1:]
    if program in ("apt", "apt-get"):
        return _of_apt(rest)
    if re.fullmatch(r"pip[\d.]*", program):
        return _of_pip(rest, read)
    if re.fullmatch(r"python[\d.]*", program):
        return _of_python(rest, read)
    if program == "uv":
        return _of_uv(rest, read)
    if program in ("uvx", "pipx"):
        return _of_tool(rest, read)
    if program in ("pytest", "py.test"):
        return [("python", "pytest", "")]
    if program in ("curl", "wget"):
        urls = [word for word in rest if _URL.search(word) and UV_INSTALLER not in word]
        return [("network", "", "")] if urls else []
    return [("network", "", "")] if _FETCHES.search(" ".join(words)) else []


def _of_apt(arguments: list[str]) -> list[Found]:
    names = [word for word in arguments if not word.startswith("-")]
    if not names or names[0] != "install":
        return []
    found: list[Found] = []
    for word in names[1:]:
        if re.search(r"[$<>*/]", word):
            break  # a redirection, a file, or a name that is known at run time only
        found.append(("system", word.partition("=")[0], ""))
    return found


def _of_python(arguments: list[str], read: Mapping[str, bytes]) -> list[Found]:
    if "-m" not in arguments:
        return []
    module, *rest = arguments[arguments.index("-m") + 1 :] or [""]
    if module == "pip":
        return _of_pip(rest, read)
    return [("python", "pytest", "")] if module == "pytest" else []


def _of_pip(arguments: list[str], read: Mapping[str, bytes]) -> list[Found]:
    verb = next((word for word in arguments if not word.startswith("-")), "")
    if verb == "install" and "--no-index" not in arguments:
        return _requirements(arguments[arguments.index(verb) + 1 :], read)
    return [("network", "", "")] if verb in ("download", "wheel") else []


def _of_uv(arguments: list[str], read: Mapping[str, bytes]) -> list[Found]:
    verb = next((word for word in arguments if not word.startswith("-")), "")
    rest = arguments[arguments.index(verb) + 1 :] if verb else []
    if verb == "pip":
        return _of_pip(rest, read)
    if verb == "add":
        return _requirements(rest, read)
    if verb == "sync":
        return [("network", "", "")]
    if verb == "tool":
        return _of_tool(rest, read)
    if verb == "run":
        found, inner = _take_options(rest, read)
        return found + (_of_command(_without_prefixes(inner), read) if inner else [])
    return []


def _of_tool(arguments: list[str], read: Mapping[str, bytes]) -> list[Found]:
    """Return the needs of uvx, `uv tool run`, `uv tool install` and pipx."""
    found, rest = _take_options(arguments, read)
    if rest and rest[0] in ("run", "install"):
        more, rest = _take_options(rest[1:], read)
        found += more
    if rest and "--from" not in arguments:
        name, _, version = rest[0].partition("@")
        found += _requirement(f"{name}=={version}" if version else name)
    return found


def _take_options(arguments: list[str], read: Mapping[str, bytes]) -> tuple[list[Found], list[str]]:
    """Return the needs that options name, and the arguments after the options."""
    found: list[Found] = []
    index = 0
    while index < len(arguments) and arguments[index].startswith("-"):
        option, equals, value = arguments[index].partition("=")
        takes_next = option in _WITH_VALUE or option in _WITH_REQUIREMENT
        if takes_next and not equals:
            index += 1
            value = arguments[index] if index < len(arguments) else ""
        if option in _WITH_REQUIREMENT:
            found += _requirements(value.split(","), read)
        index += 1
    return found, arguments[index:]


def _requirements(arguments: list[str], read: Mapping[str, bytes]) -> list[Found]:
    found: list[Found] = []
    words = iter(arguments)
    for word in words:
        if word in ("-r", "--requirement", "--requirements"):
            found += _of_file(next(words, ""), read)
        elif word in _WITH_VALUE:
            next(words, "")
        elif re.match(r"\d*[<>]", word):
            break  # a redirection
        elif word in ("-e", "--editable"):
            found.append(("network", "", ""))
            next(words, "")
        elif not word.startswith("-"):
            found += _requirement(word)
    return found


def _of_file(name: str, read: Mapping[str, bytes]) -> list[Found]:
    """Return the requirements in a file beside the script; one that is elsewhere is not known."""
    content = read.get(posixpath.basename(name))
    if content is None:
        return [("network", "", "")]
    rows = re.sub(r"(^|\s)#.*", "", content.decode(errors="replace"), flags=re.MULTILINE)
    lines = [row.partition(";")[0].strip() for row in rows.splitlines()]
    return [one for line in lines if line for one in _requirement(line)]


def _requirement(text: str) -> list[Found]:
    match = _REQUIREMENT.fullmatch(text.strip())
    if match is None:
        return [("network", "", "")]  # a path, a URL, or known at run time only
    name = normalized(match[1])
    return [] if name in _INSTALLERS else [("python", name, match[2].strip())]


def normalized(name: str) -> str:
    """Return a Python package's name as indexes write it."""
    return re.sub(r"[-_.]+", "-", name).lower()
