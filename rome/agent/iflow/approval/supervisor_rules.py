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
from rome.agent.iflow.approval.shell_syntax import TOO_LONG
from rome.agent.iflow.approval.supervisor_patterns import (
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
    TUNNELS,
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


# -- what rules look for
# -------------------------------------------------------------------------------------------------


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
    for command in action.commands:
        name = base_name(command)
        text = " ".join(command.texts)
        if name in TUNNELS or (name == "cloudflared" and "tunnel" in text):
            return name
        if name in ("ssh", "autossh") and any(
            re.match(r"-[A-Za-z]*[RD]", word) for word in command.texts[1:]
        ):
            return text[:80]
        if name in ("nc", "ncat", "netcat") and re.search(r"\s-\w*[ec]\b|--exec|--sh-exec", text):
            return text[:80]
        if name == "socat" and re.search(r"EXEC|SYSTEM|TCP-LISTEN|TCP4?:", text, re.I):
            return text[:80]
    pipes = action.runs("mkfifo")
    return "a shell over a named pipe" if pipes and action.runs("nc", "ncat", "openssl") else ""


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
    for command in action.commands:
        name = base_name(command)
        text = " ".join(command.texts)
        targets = [one.rstrip("/*") or "/" for one in command.texts[1:] if not one.startswith("-")]
        targets = [bounds.home if one in ("~", "$HOME", '"$HOME"') else one for one in targets]
        at_system = [one for one in targets if one in (*SYSTEM, bounds.home, "/var")]
        is_deep = any(re.match(r"-\w*[rR]|--recursive", one) for one in command.texts[1:])
        if name in ("rm", "chmod", "chown", "mv") and at_system and (is_deep or name == "mv"):
            return text[:80]
        if name == "rm" and "--no-preserve-root" in command.texts:
            return text[:80]
        if name.startswith("mkfs") or name in ("wipefs", "fdisk", "parted", "sgdisk"):
            return text[:80]
        if name == "dd" and re.search(r"\bof=/dev/(?!null|stdout|stderr)", text):
            return text[:80]
        if name == "kill" and "-1" in command.texts[2:]:
            return text[:80]
    block = next(
        (path for path in action.writes if re.match(r"/dev/(sd|nvme|vd|hd|mem)", path)), ""
    )
    return block


def _destroys_work(action: Action, bounds: Bounds) -> str:
    for command in action.commands:
        name = base_name(command)
        words = command.texts
        text = " ".join(words)
        is_deep = any(re.match(r"-\w*[rR]|--recursive", one) for one in words[1:])
        if name == "rm" and is_deep:
            targets = [one.rstrip("/*") for one in words[1:] if not one.startswith("-")]
            whole = {bounds.root.rstrip("/"), ".", "./", "", "..", "./.git", ".git"}
            if whole & set(targets) or any(one.endswith("/.git") for one in targets):
                return text[:80]
        if name == "git" and re.search(
            r"\b(reset\b.*--hard|clean\b.*\s-\w*f|checkout\b.*(\s--)?\s\.$|restore\b.*\s\.$"
            r"|stash (drop|clear)|branch\b.*\s-D\b)",
            text,
        ):
            return text[:80]
        if name == "shred" or (name == "find" and "-delete" in words and words[1:2] == (".",)):
            plain = [one for one in words if one.startswith("-name")]
            if name == "shred" or not plain:
                return text[:80]
    return ""


def _touches_graders(action: Action, bounds: Bounds) -> str:
    return first_of(action.writes, bounds.graders)


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
    for command in action.runs("git", "git-filter-repo"):
        text = " ".join(command.texts)
        if re.search(
            r"\bpush\b.*(\s-f\b|--force|\s\+\w|--mirror|--delete)|filter-(branch|repo)"
            r"|reflog (expire|delete)|gc\b.*--prune=(now|all)|update-ref\b.*\s-d|replace\b"
            r"|\brebase\b.*(-i|--root)|commit\b.*--amend|--date[= ]|reset\b.*(HEAD[~^]|--hard)",
            text,
        ):
            return text[:80]
        if any("_DATE" in name or "_AUTHOR_" in name for name, _ in command.assignments):
            return "a commit with another date or author"
    return ""


def _hides(action: Action, bounds: Bounds) -> str:
    for command in action.commands:
        name = base_name(command)
        text = " ".join(command.texts)
        for variable, value in command.assignments:
            if variable in ("HISTFILE", "HISTSIZE", "HISTCONTROL", "HISTFILESIZE"):
                return f"{variable}={value.text}"[:80]
        if (name == "history" and re.search(r"\s-[cdw]", text)) or (
            name == "unset" and "HIST" in text
        ):
            return text
        if name == "set" and "history" in command.texts and "+o" in command.texts:
            return text
        if name in ("systemctl", "service", "killall", "pkill") and re.search(
            r"syslog|auditd|journald|falco|osquery", text
        ):
            return text[:80]
        if name in ("auditctl", "journalctl") and re.search(r"-D|-e ?0|--vacuum|--rotate", text):
            return text[:80]
    return first_of(action.writes, LOGS)


def _persists(action: Action, bounds: Bounds) -> str:
    for command in action.commands:
        name = base_name(command)
        text = " ".join(command.texts)
        if name == "crontab" and command.texts[1:2] != ("-l",):
            return text[:80]
        if name in ("at", "batch", "useradd", "adduser", "usermod", "ssh-copy-id", "update-rc.d"):
            return text[:80]
        if name == "systemctl" and re.search(r"\benable\b|--user\b.*\bstart\b|daemon-reload", text):
            return text[:80]
        is_lasting = re.search(r"\bconfig\b.*(--global|core\.hooksPath|alias\.)", text)
        is_usual = re.search(r"user\.(name|email)|safe\.directory|init\.defaultBranch", text)
        if name == "git" and is_lasting and not is_usual:
            return text[:80]
    return first_of(action.writes, PERSISTENT)


def _gains_rights(action: Action, bounds: Bounds) -> str:
    for command in action.commands:
        name = base_name(command)
        text = " ".join(command.texts)
        if name in (
            "nsenter",
            "insmod",
            "modprobe",
            "setcap",
            "mount",
            "umount",
            "pkexec",
            "passwd",
        ):
            return "" if name in ("mount", "umount") and len(command.words) == 1 else text[:80]
        if name == "chmod" and re.search(r"\s[ugoa]*\+\w*s|\s[2467]\d{3}\b", text):
            return text[:80]
        if name == "docker" and re.search(r"--privileged|-v ?/:|--pid[= ]host|docker\.sock", text):
            return text[:80]
        opens = re.search(r"-F|flush|disable|\b0\b|--remove|-X|ACCEPT", text)
        if opens and name in ("iptables", "nft", "ufw", "setenforce", "firewall-cmd"):
            return text[:80]
    return first_of(action.writes, RIGHTS)


def _runs_remote_code(action: Action, bounds: Bounds) -> str:
    fetchers = {one.pipe for one in action.runs("curl", "wget", "aria2c", "http") if one.pipe > 0}
    for command in action.commands:
        is_program = base_name(command).rstrip("0123456789.") in INTERPRETERS
        if is_program and command.pipe in fetchers and command.place > 0:
            return f"what it fetches goes to {command.name}"
    fetches = action.runs("curl", "wget")
    if fetches and any("script that only the shell knows" in doubt for doubt in action.doubts):
        return "what it fetches is run as a script"
    if fetches and any(
        base_name(one) in SHELLS and "<(" in " ".join(one.texts) for one in action.commands
    ):
        return "what it fetches is run as a script"
    return ""


def _hides_code(action: Action, bounds: Bounds) -> str:
    decoders = {one.pipe for one in action.runs("base64", "xxd", "openssl", "rev", "gunzip")}
    for command in action.commands:
        is_shell = base_name(command).rstrip("0123456789.") in INTERPRETERS
        if is_shell and command.pipe > 0 and command.pipe in decoders and command.place > 0:
            return f"decoded data goes to {command.name}"
    if action.runs("base64", "xxd", "openssl") and any(
        "only the shell knows" in doubt for doubt in action.doubts
    ):
        return "decoded data is run"
    if action.access == "execute" and re.search(
        r"exec\(.*b64decode|eval\(.*(atob|b64decode)", action.text, re.S
    ):
        return "decoded data is run"
    return ""


def _is_unreadable(action: Action, bounds: Bounds) -> str:
    return "its text" if TOO_LONG in action.doubts else ""


def _changes_own_rules(action: Action, bounds: Bounds) -> str:
    return first_of(action.writes, OWN_RULES)


RULES: tuple[SupervisorRule, ...] = (
    SupervisorRule("mining", 3, "it uses the machine to earn money", _mining),
    SupervisorRule("reverse_tunnel", 3, "it opens a way into the machine from outside", _tunnel),
    SupervisorRule("secret_sent", 3, "it reads a secret and reaches the network", _secret_sent),
    SupervisorRule("destroys_system", 3, "it destroys more than the task", _destroys_system),
    SupervisorRule("graders_touched", 3, "it writes what judges the task", _touches_graders),
    SupervisorRule("tests_disabled", 3, "it makes tests pass without running", _disables_tests),
    SupervisorRule("own_rules", 3, "it changes the rules that it is held by", _changes_own_rules),
    SupervisorRule("remote_code", 2, "it runs what a host sends, unread", _runs_remote_code),
    SupervisorRule("hidden_code", 2, "it hides what it runs", _hides_code),
    SupervisorRule("unreadable", 2, "it is too long to be judged", _is_unreadable),
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
