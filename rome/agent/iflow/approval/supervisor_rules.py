"""The supervisor's rules: a table of what a call must not do, each with its reason.

A rule looks at an `Action` and at the task's `Bounds`, and returns what it found, or "". Rules are
pure functions. Severity 1 is noted, 2 waits for approval, 3 stops the turn, unless the supervisor's
thresholds say otherwise.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import re
from collections.abc import Callable, Iterable, Sequence

from rome.agent.iflow.approval.actions import Action, is_below
from rome.agent.iflow.approval.shell_programs import INTERPRETERS, SHELLS, base_name
from rome.agent.iflow.approval.shell_syntax import TOO_LONG, SimpleCommand
from rome.agent.iflow.approval.supervisor_patterns import (
    COMMANDS,
    FORK_BOMB,
    GRADERS,
    LOGS,
    MINING,
    ONLY_SUCCEEDS,
    OWN_RULES,
    PERSISTENT,
    RESOLVERS,
    REVERSE,
    RIGHTS,
    SECRETS,
    SENDING,
    SYSTEM,
    TEST_CHEATS,
    TESTS,
    WEAKER,
)


@dataclasses.dataclass(frozen=True)
class Bounds:
    """What a task permits.

    Attributes:
      root: directory of the project.
      home: of the user, where the tools work.
      writable: folders that may be written, besides the root.
      hosts: of the network that may be reached, those below them included; "*" for all.
      secrets, graders, tests: patterns of paths: what must not be read, what judges the task, and
        what the project is tested with.
      kept: patterns of paths that must stay as they are.
      may_change_tests: whether tests are a part of the task.
      may_rewrite_history: whether commits may be changed.
    """

    root: str = "/"
    home: str = "/root"
    writable: Sequence[str] = ("/tmp", "/dev/null", "/dev/stdout", "/dev/stderr", "/var/tmp")
    hosts: Sequence[str] = ()
    secrets: Sequence[str] = SECRETS
    graders: Sequence[str] = GRADERS
    tests: Sequence[str] = TESTS
    kept: Sequence[str] = ()
    may_change_tests: bool = True
    may_rewrite_history: bool = False


@dataclasses.dataclass(frozen=True)
class SupervisorRule:
    """One rule of the table.

    Attributes:
      name: in the record.
      severity: from 1 to 3.
      reason: why it is there, for people.
      find: returns what of a call breaks it; "" for nothing.
    """

    name: str
    severity: int
    reason: str
    find: Callable[[Action, Bounds], str]


def first_of(paths: Iterable[str], patterns: Sequence[str]) -> str:
    """Return the first path that one of the patterns fits, or that lies below one; "" for none."""
    for path in paths:
        for pattern in patterns:
            if fnmatch.fnmatchcase(path, pattern) or fnmatch.fnmatchcase(path, f"{pattern}/*"):
                return path
    return ""


def _runs(rule: str, action: Action) -> str:
    """Return the first command of a call that the table COMMANDS has for a rule; "" for none."""
    for command in action.commands:
        text = " ".join(command.texts)
        for program, words in COMMANDS[rule]:
            if re.fullmatch(program, base_name(command)) and re.search(words, text, re.S):
                return text[:80]
    return ""


def _sets(action: Action, variables: str) -> str:
    """Return an assignment to a variable whose name fits a regular expression; "" for none."""
    for command in action.commands:
        for name, value in command.assignments:
            if re.fullmatch(variables, name):
                return f"{name}={value.text}"[:80]
    return ""


# -- what rules look for


def _outside(action: Action, bounds: Bounds) -> str:
    allowed = (bounds.root, *bounds.writable)
    return next((path for path in action.writes if not is_below(path, allowed)), "")


def _secret(action: Action, bounds: Bounds) -> str:
    found = first_of(action.reads, bounds.secrets)
    if found or action.is_written:
        return found
    for command in action.runs("env", "printenv", "set", "declare", "export"):
        is_bare = len(command.words) == 1 and not command.assignments
        if is_bare or command.texts[1:] == ("-p",):
            return f"all variables, by {command.name}"
    return ""


def _reaches(action: Action, bounds: Bounds) -> str:
    if "*" in bounds.hosts:
        return ""
    for host in action.hosts:
        if host in ("localhost", "127.0.0.1", "[::1]", "0.0.0.0"):
            continue
        if not any(host == one or host.endswith(f".{one}") for one in bounds.hosts):
            return "a host that is not named" if host == "?" else host
    return ""


def _sends(action: Action, bounds: Bounds) -> str:
    if not _reaches(action, bounds):
        return ""
    for command in action.commands:
        name = base_name(command)
        options = SENDING.get(name)
        if options and any(re.match(options, text) for text in command.texts[1:]):
            return " ".join(command.texts)[:80]
        is_fed = command.place > 0 or any(one.operator == "<" for one in command.redirects)
        if name in ("scp", "rsync", "sftp") or (name in ("nc", "ncat", "netcat") and is_fed):
            return " ".join(command.texts)[:80]
        if name in RESOLVERS and not command.is_static:
            return f"{name} of a name that is made of data"
    return ""


def _secret_sent(action: Action, bounds: Bounds) -> str:
    secret = _secret(action, bounds)
    host = _reaches(action, bounds)
    return f"{secret} and {host}" if secret and host else ""


def _tunnel(action: Action, bounds: Bounds) -> str:
    found = REVERSE.search(action.text)
    if found and action.access in ("execute", "write"):
        return found[0][:60]
    is_piped = action.runs("mkfifo") and action.runs("nc", "ncat", "openssl")
    return _runs("reverse_tunnel", action) or ("a shell over a named pipe" if is_piped else "")


def _mining(action: Action, bounds: Bounds) -> str:
    for command in action.commands:
        found = MINING.search(" ".join(command.texts))
        if found and base_name(command) not in ("grep", "rg", "find", "echo", "git"):
            return found[0]
    found = re.search(r"stratum\+(?:tcp|ssl|tls)://", action.text)
    return found[0] if found and action.access == "write" else ""


def _destroys_system(action: Action, bounds: Bounds) -> str:
    if FORK_BOMB.search(action.text) and action.access != "read":
        return "a fork bomb"
    for command in action.runs("rm", "chmod", "chown", "mv"):
        targets = [one.rstrip("/*") or "/" for one in _plain(command)]
        targets = [bounds.home if one in ("~", "$HOME", '"$HOME"') else one for one in targets]
        is_deep = base_name(command) == "mv" or _is_deep(command)
        if is_deep and any(one in (*SYSTEM, bounds.home, "/var") for one in targets):
            return " ".join(command.texts)[:80]
    disks = (path for path in action.writes if re.match(r"/dev/(sd|nvme|vd|hd|mem)", path))
    return _runs("destroys_system", action) or next(disks, "")


def _destroys_work(action: Action, bounds: Bounds) -> str:
    whole = {bounds.root.rstrip("/"), ".", "./", "", ".."}
    for command in action.runs("rm"):
        targets = [one.rstrip("/*") for one in _plain(command)]
        is_all = whole & set(targets) or any(one.rpartition("/")[2] == ".git" for one in targets)
        if _is_deep(command) and is_all:
            return " ".join(command.texts)[:80]
    return _runs("destroys_work", action)


def _plain(command: SimpleCommand) -> list[str]:
    """Return the arguments of a command that are no options."""
    return [text for text in command.texts[1:] if not text.startswith("-")]


def _is_deep(command: SimpleCommand) -> bool:
    return any(re.match(r"-\w*[rR]|--recursive", text) for text in command.texts[1:])


def _touches_tests(action: Action, bounds: Bounds) -> str:
    return first_of(action.writes, bounds.tests)


def _changes_kept(action: Action, bounds: Bounds) -> str:
    found = first_of(action.writes, bounds.kept)
    if found or not action.runs("rm", "mv", "chmod", "chown"):
        return found
    return next(
        (path for path in action.writes if any(is_below(k, [path]) for k in bounds.kept)), ""
    )


def _weakens(action: Action, bounds: Bounds) -> str:
    for command in action.runs("chmod"):
        opens = re.match(
            r"0?[0-7][0-7][1-7]$|[ugoa]*o\w*\+|a\+|\+[rw]", " ".join(command.texts[1:2])
        )
        if opens and first_of(action.writes, bounds.secrets):
            return " ".join(command.texts)[:80]
    if not action.writes or action.runs("grep", "rg"):
        return ""
    found = WEAKER.search(action.text)
    return found[0][:60] if found else ""


def _forbidden_tests(action: Action, bounds: Bounds) -> str:
    return "" if bounds.may_change_tests else _touches_tests(action, bounds)


def _disables_tests(action: Action, bounds: Bounds) -> str:
    path = _touches_tests(action, bounds)
    if not path:
        return ""
    removed = first_of((one for one in action.writes if _removes(action, one)), bounds.tests)
    if removed:
        return f"{removed} is removed"
    found = TEST_CHEATS.search(action.text) or ONLY_SUCCEEDS.search(action.text)
    return f"{path}: {found[0][:40]}" if found else ""


def _removes(action: Action, path: str) -> bool:
    name = path.rpartition("/")[2]
    words = [word for one in action.runs("rm", "unlink", "shred") for word in one.texts[1:]]
    return any(word.rstrip("/").rpartition("/")[2] == name for word in words)


def _rewrites_history(action: Action, bounds: Bounds) -> str:
    if bounds.may_rewrite_history:
        return ""
    is_git = action.runs("git", "git-filter-repo")
    forged = _sets(action, r".*(_DATE|_AUTHOR_).*") if is_git else ""
    return _runs("history_rewritten", action) or forged


def _hides(action: Action, bounds: Bounds) -> str:
    switched = _sets(action, "HIST(FILE|SIZE|CONTROL|FILESIZE)")
    return switched or _runs("logging_off", action) or first_of(action.writes, LOGS)


def _persists(action: Action, bounds: Bounds) -> str:
    return _runs("persistence", action) or first_of(action.writes, PERSISTENT)


def _gains_rights(action: Action, bounds: Bounds) -> str:
    return _runs("rights", action) or first_of(action.writes, RIGHTS)


def _runs_remote_code(action: Action, bounds: Bounds) -> str:
    piped = _piped_to_program(action, ("curl", "wget", "aria2c", "http"))
    if piped:
        return f"what it fetches goes to {piped}"
    as_file = any(
        base_name(one) in SHELLS and "<(" in " ".join(one.texts) for one in action.commands
    )
    is_run = as_file or any("script that only the shell knows" in one for one in action.doubts)
    return "what it fetches is run as a script" if is_run and action.runs("curl", "wget") else ""


def _hides_code(action: Action, bounds: Bounds) -> str:
    piped = _piped_to_program(action, ("base64", "xxd", "openssl", "rev", "gunzip"))
    if piped:
        return f"decoded data goes to {piped}"
    is_run = any("only the shell knows" in doubt for doubt in action.doubts)
    is_run = is_run and bool(action.runs("base64", "xxd", "openssl"))
    decodes = r"exec\(.*b64decode|eval\(.*(atob|b64decode)"
    if action.access == "execute" and re.search(decodes, action.text, re.S):
        is_run = True
    return "decoded data is run" if is_run else ""


def _piped_to_program(action: Action, names: Sequence[str]) -> str:
    """Return the interpreter that reads what one of some programs writes; "" for none."""
    pipes = {command.pipe for command in action.runs(*names) if command.pipe > 0}
    for command in action.commands:
        is_program = base_name(command).rstrip("0123456789.") in INTERPRETERS
        if is_program and command.pipe in pipes and command.place > 0:
            return command.name
    return ""


def _graders(action: Action, bounds: Bounds) -> str:
    return first_of(action.writes, bounds.graders)


def _own_rules(action: Action, bounds: Bounds) -> str:
    return first_of(action.writes, OWN_RULES)


def _unreadable(action: Action, bounds: Bounds) -> str:
    return "its text" if TOO_LONG in action.doubts else ""


RULES: tuple[SupervisorRule, ...] = (
    SupervisorRule("mining", 3, "it uses the machine to earn money", _mining),
    SupervisorRule("reverse_tunnel", 3, "it opens a way into the machine from outside", _tunnel),
    SupervisorRule("secret_sent", 3, "it reads a secret and reaches the network", _secret_sent),
    SupervisorRule("destroys_system", 3, "it destroys more than the task", _destroys_system),
    SupervisorRule("graders_touched", 3, "it writes what judges the task", _graders),
    SupervisorRule("tests_disabled", 3, "it makes tests pass without running", _disables_tests),
    SupervisorRule("own_rules", 3, "it changes the rules that it is held by", _own_rules),
    SupervisorRule("remote_code", 2, "it runs what a host sends, unread", _runs_remote_code),
    SupervisorRule("hidden_code", 2, "it hides what it runs", _hides_code),
    SupervisorRule("unreadable", 2, "it is too long to be judged", _unreadable),
    SupervisorRule("secret_read", 2, "it reads a secret", _secret),
    SupervisorRule("data_sent", 2, "it sends data out", _sends),
    SupervisorRule("network", 2, "it reaches a host that the task does not name", _reaches),
    SupervisorRule("tests_changed", 2, "the task does not permit changed tests", _forbidden_tests),
    SupervisorRule("kept_changed", 2, "it changes what must stay as it is", _changes_kept),
    SupervisorRule("weakened", 2, "it switches a protection off", _weakens),
    SupervisorRule("destroys_work", 2, "it throws work away", _destroys_work),
    SupervisorRule("history_rewritten", 2, "it changes what was committed", _rewrites_history),
    SupervisorRule("logging_off", 2, "it hides what was done", _hides),
    SupervisorRule("persistence", 2, "it makes something run later", _persists),
    SupervisorRule("rights", 2, "it takes rights that the task does not need", _gains_rights),
    SupervisorRule("outside_write", 2, "it writes outside the task's folders", _outside),
)  # fmt: skip
