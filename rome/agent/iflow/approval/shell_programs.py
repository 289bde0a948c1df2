"""Commands that run other commands, and commands that only read.

`commands_of` goes through wrappers (env, sudo, xargs, find -exec, bash -c, eval ...) to what they
run. `is_read_only` says of one command that it can change nothing, whatever its arguments are.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping, Sequence

from rome.agent.iflow.approval.shell_commands import Line, SimpleCommand, Word
from rome.agent.iflow.approval.shell_syntax import parse

MAX_NESTING = 5  # of lines in lines, as in bash -c "bash -c ..."
SHELLS = frozenset({
    "sh", "bash", "dash", "zsh", "ksh", "ash", "fish", "rbash", "mksh", "csh", "tcsh",
})  # fmt: skip
RIGHTS = frozenset({"sudo", "doas", "su", "runuser", "pkexec", "chroot", "unshare", "nsenter"})
# Wrapper -> the options that it may have; those that take a value end in "=". Any other one is a
# problem: it may take a value, write a file (`time -o`), or go to another folder (`env -C`).
WRAPPERS: Mapping[str, str] = {
    **dict.fromkeys(("nohup", "builtin", "busybox", "toybox"), ""),
    "command": "-p",
    "setsid": "-c -f -w --ctty --fork --wait",
    "caffeinate": "-d -i -m -s -u -t= -w=",
    "env": "-i -0 -v --ignore-environment --null --debug -u= --unset=",
    "sudo": "-E -H -n -k -S -b -A -P -u= --user= -g= --group= -h= -p= -C= -R= -T=",
    "doas": "-n -u= -C=",
    "nice": "-n= --adjustment= -0 -1 -2 -3 -4 -5 -6 -7 -8 -9",
    "ionice": "-t -c= -n= --class= --classdata=",
    "time": "-p -v -q -f= --format=",
    "timeout": "-v --verbose --foreground --preserve-status -k= -s= --kill-after= --signal=",
    "stdbuf": "-i= -o= -e= --input= --output= --error=",
    "xargs": "-0 -r -t -x -i -l --null --no-run-if-empty --verbose --exit --replace --max-lines"
    " -d= -E= -I= -L= -n= -P= -s= --delimiter= --max-args= --max-procs= --max-chars=",
    "exec": "-c -l -a=",
    "strace": "-f -c -C -q -y -t -v -o= -e= -p= -s=",
    "watch": "-d -t -b -e -g -c -x -n=",
    "parallel": "-k -0 -j= -a=",
    "flock": "-s -x -n -u -o -w= -E=",
}
# Wrappers that may give their words to a shell, or, as `strace -o "|rm x"`, their options.
_MAY_USE_A_SHELL = ("watch", "parallel", "flock", "strace")
_SKIPPED_FIRST = {"timeout": 1, "flock": 1}  # arguments before the command
_PROBLEMS: Mapping[str, Collection[str]] = {
    "changes what a name means": ("alias", "enable", "hash", "shopt", "complete", "bind"),
    "is not understood": ("coproc", "function", "select"),
    "runs a file in this shell": ("source", "."),
    "runs something with other rights": RIGHTS,
}
_FIND_RUNS = ("-exec", "-execdir", "-ok", "-okdir")
# Interpreters that read a program from standard input where no file is named.
INTERPRETERS = SHELLS | {"python", "python3", "perl", "ruby", "node", "php", "lua"}


def commands_of(text: str, nesting: int = 0) -> Line:
    """Return all commands that a line runs, those inside wrappers in place of the wrappers."""
    line = parse(text)
    found: list[SimpleCommand] = []
    problems = list(line.problems)
    for command in line.commands:
        inner = _inside(command, nesting)
        found += inner.commands
        problems += inner.problems
    return Line(tuple(found), tuple(dict.fromkeys(problems)))


def is_interpreter(command: SimpleCommand) -> bool:
    """Return whether a command is a shell or another program that runs programs, as python3.12."""
    return command.program.rstrip("0123456789.") in INTERPRETERS


def _inside(command: SimpleCommand, nesting: int) -> Line:
    """Return a command, or what it runs in its place."""
    if nesting > MAX_NESTING:
        return Line((command,), ("commands nested too deeply",))
    if command.words and (not command.words[0].is_static or command.words[0].has_pattern):
        return Line((command,), ("a program whose name only the shell knows",))
    name = command.program
    if name in SHELLS:
        return _of_shell(command, nesting)
    if name in ("eval", "trap"):
        script = command.words[1:] if name == "eval" else command.words[1:2]
        return _of_script(command, " ".join(word.text for word in script), script, nesting)
    if name == "find":
        return _of_find(command, nesting)
    if name in WRAPPERS:
        return _of_wrapper(command, name, nesting)
    effect = next((effect for effect, names in _PROBLEMS.items() if name in names), "")
    return Line((command,), (f"{name} {effect}",) if effect else ())


def _of_script(command: SimpleCommand, script: str, words: Sequence[Word], nesting: int) -> Line:
    """Return a command whose words are a script, and what the script runs."""
    if not all(word.is_static and not word.has_pattern for word in words):
        return Line((command,), ("a script that only the shell knows",))
    inner = commands_of(script, nesting + 1)
    inside = (dataclasses.replace(one, runs_as=command.runs_as) for one in inner.commands)
    return Line((*inside, *_leftovers(command)), inner.problems)


def _leftovers(command: SimpleCommand) -> tuple[SimpleCommand, ...]:
    """Return what stands around a wrapper: its variables and its redirections."""
    if not command.assignments and not command.redirects:
        return ()
    return (dataclasses.replace(command, words=()),)


def _of_shell(command: SimpleCommand, nesting: int) -> Line:
    """Take `bash -c SCRIPT`, `bash <<END`, `... | bash` and `bash FILE`."""
    options = []
    rest = list(command.words[1:])
    while rest and rest[0].is_static and re.match(r"[-+]", rest[0].text):
        options.append(rest.pop(0).text)
        if options[-1] in ("-o", "+o", "-O", "+O", "--rcfile", "--init-file") and rest:
            rest.pop(0)
    if any(re.fullmatch(r"-[a-z]*c[a-z]*", option) for option in options):
        if not rest:
            return Line((command,), ("a shell without its script",))
        return _of_script(command, rest[0].text, rest[:1], nesting)
    if rest:
        if any(word.text.startswith("-") for word in rest[:1]):
            return Line((command,), ("a shell whose options are not understood",))
        return Line((command,))  # a file, which a rule may name
    bodies = [one for one in command.redirects if one.operator in ("<<", "<<<")]
    if bodies:
        body = bodies[-1].target
        return _of_script(command, body.text, [body], nesting)
    return Line((command,), ("a shell that runs what it reads",))


def _of_find(command: SimpleCommand, nesting: int) -> Line:
    """Take `find ... -exec COMMAND ;`: find itself, and each command of it."""
    found: list[SimpleCommand] = []
    problems: list[str] = []
    own = []
    rest = list(command.words)
    while rest:
        word = rest.pop(0)
        if word.text not in _FIND_RUNS:
            own.append(word)
            continue
        inner = []
        while rest and (part := rest.pop(0)).text not in (";", "+"):
            inner.append(Word(part.text, part.is_static and "{}" not in part.text))
        made = dataclasses.replace(command, words=tuple(inner), redirects=(), assignments=())
        line = _inside(made, nesting + 1)
        found += line.commands
        problems += line.problems
    return Line((dataclasses.replace(command, words=tuple(own)), *found), tuple(problems))


def _of_wrapper(command: SimpleCommand, name: str, nesting: int) -> Line:
    """Take `env A=B COMMAND` and its like."""
    rest = list(command.words[1:])
    assignments = list(command.assignments)
    problems = []
    skipped = _SKIPPED_FIRST.get(name, 0)
    known = frozenset(WRAPPERS[name].split())
    while rest:
        text = rest[0].text
        if not rest[0].is_static:
            break
        if text == "--":
            rest.pop(0)
            break
        if name == "env" and text.startswith(("-S", "--split")):
            problems.append("env -S splits a text into a command")
            rest.pop(0)
        elif name == "command" and text in ("-v", "-V"):
            return Line((command,))
        elif text.startswith("-"):
            count = _option_words(text, known)
            if not count:
                problems.append(f"an option of {name} that is not understood")
            del rest[: count or 1]
        elif name in ("env", "sudo", "time") and re.match(r"\w+=", text):
            variable, _, value = text.partition("=")
            assignments.append((variable, Word(value)))
            rest.pop(0)
        elif skipped:
            skipped -= 1
            rest.pop(0)
        else:
            break
    if not rest:
        is_query = name in ("env", "command", "exec", "time")
        return Line((command,), tuple(problems) if is_query else (f"{name} without a command",))
    if name in ("xargs", "parallel"):
        rest.append(Word("*", is_static=False))  # what it reads
    made = dataclasses.replace(
        command,
        words=tuple(rest),
        assignments=tuple(assignments),
        runs_as=(*command.runs_as, name) if name in RIGHTS else command.runs_as,
    )
    if name in _MAY_USE_A_SHELL:
        problems.append(f"{name} may give its words to a shell")
    inner = _inside(made, nesting + 1)
    return Line(inner.commands, (*problems, *inner.problems))


def _option_words(text: str, known: Collection[str]) -> int:
    """Return how many words an option fills, its value included; 0 where it is not known."""
    if text.startswith("--"):
        name, has_value, _ = text.partition("=")
        if f"{name}=" in known:
            return 1 if has_value else 2
        return int(text in known)
    for place, letter in enumerate(text[1:], 2):  # short ones may stand together
        if f"-{letter}=" in known:
            return 1 if text[place:] else 2
        if f"-{letter}" not in known:
            return 0
    return 1


# -- commands that only read

# Program -> options with which it writes or runs something. Short ones count in clusters too, long
# ones also where they are cut short, as GNU's programs take them.
READ_ONLY: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(
        (
            "cat", "head", "tail", "wc", "ls", "pwd", "echo", "true", "false", "[", ":", "stat",
            "du", "df", "whoami", "id", "uname", "which", "type", "basename", "dirname", "realpath",
            "readlink", "nl", "cut", "tr", "comm", "cmp", "md5sum", "sha1sum", "sha256sum",
            "sha512sum", "cksum", "od", "hexdump", "strings", "egrep", "fgrep", "grep", "column",
            "paste", "fold", "expand", "rev", "tac", "seq", "sleep", "nproc", "free", "uptime",
            "ps", "jq", "lsof", "cd", "tty", "locale", "arch", "groups", "pgrep",
        ),
        (),
    ),
    "test": ("-v", "-R"),
    "printf": ("-v",),
    "date": ("-s", "--set"),
    "sort": ("-o", "--output", "--compress-program", "-T", "--temporary-directory"),
    "diff": ("--output", "-l", "--paginate"),
    "file": ("-C", "--compile", "-m"),
    "tree": ("-o", "--output", "-R"),
    "rg": ("--pre", "--hostname-bin", "-z", "--search-zip"),
    "find": (
        "-exec", "-execdir", "-ok", "-okdir", "-delete", "-fprint", "-fprint0", "-fprintf", "-fls",
    ),
    "command": (),
}  # fmt: skip
_GIT_WRITES = (
    "--output", "--ext-diff", "--textconv", "-O", "--open-files-in-pager", "--exec", "--filters",
)  # fmt: skip
GIT_READ_ONLY = frozenset({
    "status", "log", "diff", "show", "rev-parse", "ls-files", "ls-tree", "blame", "describe",
    "shortlog", "grep", "cat-file", "merge-base", "rev-list", "name-rev", "for-each-ref",
    "count-objects",
})  # fmt: skip
_GIT_LISTS: Mapping[str, tuple[str, ...]] = {  # only with these words after it, or with none
    "branch": ("-a", "-r", "-v", "-vv", "--list", "--show-current", "--all"),
    "tag": ("-l", "--list"),
    "remote": ("-v",),
    "stash": ("list",),
    "worktree": ("list",),
}


def is_read_only(command: SimpleCommand) -> bool:
    """Return whether a command can change nothing: no file, no process, no variable.

    All its words must be known. Where it reads is for the caller to judge.
    """
    if not command.words or command.runs_as or command.assignments:
        return False
    # A pattern that becomes an option does no harm where no option does.
    if not command.is_static and READ_ONLY.get(command.name, ("",)):
        return False
    if not all(word.is_static for word in command.words):
        return False
    if any(redirect.writes for redirect in command.redirects):
        return False
    name, *arguments = command.texts
    if name == "git":
        return _git_reads(arguments)
    if name == "cd":
        return len(arguments) == 1 and not arguments[0].startswith("-")
    if name == "sed":
        return len(arguments) >= 2 and _sed_prints(arguments)
    if name == "date" and any(re.fullmatch(r"\d{8,}(\.\d+)?", text) for text in arguments):
        return False  # it sets the clock
    if name == "ps" and any(re.match(r"[^-]*e|-\w*E", text) for text in arguments):
        return False  # it shows the variables of processes
    if name == "jq" and any("env" in text.lower() for text in arguments):
        return False  # it shows its own
    if name == "command":
        return arguments[:1] in (["-v"], ["-V"])
    if name not in READ_ONLY:
        return False
    return not any(_is_option(text, READ_ONLY[name], name == "find") for text in arguments)


def _git_reads(arguments: Sequence[str]) -> bool:
    arguments = [text for text in arguments if text != "--no-pager"]
    if not arguments:
        return False
    verb, *rest = arguments
    if verb in _GIT_LISTS:
        lists = rest or verb not in ("stash", "worktree")  # `git stash` alone takes changes away
        return bool(lists) and all(text in _GIT_LISTS[verb] for text in rest)
    return verb in GIT_READ_ONLY and not any(_is_option(text, _GIT_WRITES) for text in rest)


def _sed_prints(arguments: Sequence[str]) -> bool:
    """Return whether sed only prints lines by number: `sed -n 10,20p FILE`."""
    if arguments[0] != "-n" or any(text.startswith("-") for text in arguments[1:]):
        return False
    return bool(re.fullmatch(r"(\d+|\$)(,(\d+|\$))?p", arguments[1]))


def _is_option(text: str, options: Sequence[str], has_long_with_one_dash: bool = False) -> bool:
    """Return whether an argument is, or may be, one of the options."""
    for option in options:
        if has_long_with_one_dash:
            if text == option:
                return True
        elif option.startswith("--"):
            given = text.partition("=")[0]
            if len(given) > 2 and option.startswith(given):
                return True
        elif re.match(r"-[A-Za-z0-9]", text) and option[1] in text:
            return True
    return False
