"""Records what shell scripts do; runs inside a sandbox that has bash, as record.py does.

    python3 record_shell.py record PACKAGE SEED LIMIT > tests.jsonl
    python3 record_shell.py run FILE PATH < ASKED > outcomes.jsonl

A statement is a line of bash in a fresh folder, where $HERE is the folder that holds the package:
a call of a function of a sourced file, or of a script, with drawn arguments and standard input.
"""

import contextlib
import json
import os
import pathlib
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile

from calls import Target, draw_tests

TEST_SECONDS = 1  # of processor time
WAIT_SECONDS = 10.0
MAX_OUTCOME = 2000
TRACE_FD = 9
TRACE_FILE = "trace-of-tests.sh"
# Read by each bash at its start; PS4 of the environment is not used where bash runs as root.
TRACE = f"PS4='+\x01${{BASH_SOURCE-}}:${{LINENO}}\x01' BASH_XTRACEFD={TRACE_FD}; set -x\n"
WORDS = (
    "''", "a", "abc", "'a b'", "0", "1", "2", "-1", "7", "12", "1000", "0.5", "1.2.3", "1.10.0",
    "v2.0.1-rc1", "a/b/c.txt", "/x/y/", "'  pad  '", "x=1", "'a,b,c'", "Hello", "'*'", "2024-02-29",
)  # fmt: skip
INPUTS = (
    "''", "'a\\nb\\n'", "'b 2\\na 1\\nb 2\\n'", "'x=1\\n# note\\ny = two\\n'",
    "'a,b\\n1,2\\n3,4\\n'", "'one\\n\\ntwo  words\\n'", "'5\\n10\\n7\\n'",
)  # fmt: skip
_FUNCTION = re.compile(
    r"^[ \t]*(?:function[ \t]+([A-Za-z_][\w:.-]*)[ \t]*(?:\(\))?|([A-Za-z_][\w:.-]*)[ \t]*\(\))"
    r"[ \t]*\n?[ \t]*\{(.*?)^[ \t]*\}",
    re.MULTILINE | re.DOTALL,
)
_PLACE = re.compile(r"\$\{?#?(\d)")
_READER = re.compile(r"\b(read|cat|sed|awk|grep|sort|uniq|head|tail|cut|tr|wc|mapfile|readarray)\b")
_OPTION = re.compile(r"(?<![\w-])(--?[A-Za-z][\w-]*)(?=[|)=\s])")
_LITERAL = re.compile(r"'[^'\\\n]{1,16}'")


def main(package, seed, limit):
    """Print the tests of a package."""
    targets = []
    for path in sorted(pathlib.Path(package).rglob("*")):
        if path.is_file() and is_script(path):
            targets += targets_of(str(path))

    def watch(module, statements):
        outcome, lines = observe(package, statements)
        text = json.dumps(outcome)
        if outcome is None or len(text) > MAX_OUTCOME or "/case-" in text or "/work-" in text:
            return None, {}
        return outcome, lines

    rng = random.Random(f"record/{package}/{seed}")
    for test in draw_tests((), targets, watch, rng, limit):
        print(json.dumps(test), flush=True)


def is_script(path):
    """Return whether a file is a script of a Bourne shell."""
    with open(path, "rb") as file:
        first = file.readline(200)
    return path.suffix in (".sh", ".bash") or re.match(rb"#!.*\b(ba|da)?sh\b", first) is not None


def targets_of(path):
    """Return the ways to use a script: its functions if it only defines some, or all of it."""
    text = pathlib.Path(path).read_text(errors="replace")
    values = [*WORDS, *sorted(set(_LITERAL.findall(text)))[:40]]
    given = [("", INPUTS, False)]
    start = 'printf "%b" {} | '
    functions = {one or other: body for one, other, body in _FUNCTION.findall(text)}
    if functions and defines_only(path):
        found = []
        for name, body in sorted(functions.items()):
            count = max([0, *map(int, _PLACE.findall(body))])
            words = [("", values, False)] * count + [("", values, True)]
            fed = given if _READER.search(body) else [("", INPUTS[:1], False)]
            form = f'. "$HERE/{path}"; {start}{name} {{}}'
            found.append(Target(path, form, fed, words, separator=" "))
        return found
    options = sorted(set(_OPTION.findall(text)))[:30]
    words = [("", [*options, *values], True)] * 4
    form = f'{start}bash "$HERE/{path}" {{}}'
    return [Target(path, form, given, words, separator=" ", weight=20)]


def defines_only(path):
    """Return whether a script does nothing when it is sourced."""
    outcome, _ = observe(path.split("/")[0], [f'. "$HERE/{path}"'])
    return outcome == [[1, ""]]


def observe(package, statements):
    """Return (what the statements show, {file: lines that they run}), or (None, {})."""
    with tempfile.TemporaryFile() as trace:
        outcome = perform(statements, trace)
        trace.seek(0)
        text = trace.read(8 << 20).decode(errors="replace")
    here = re.escape(os.getcwd())
    lines = {}
    for file, line in re.findall(rf"\x01{here}/({re.escape(package)}/[^\x01\n]*):(\d+)\x01", text):
        lines.setdefault(file, set()).add(int(line))
    return outcome, {file: sorted(numbers) for file, numbers in lines.items()}


def perform(statements, trace=None):
    """Return [whether it succeeded, text and status] of each statement, None if one is endless."""
    environment = {"PATH": os.environ["PATH"], "HERE": os.getcwd(), "LC_ALL": "C", "TZ": "UTC"}
    descriptors = ()
    if trace is not None:
        pathlib.Path(TRACE_FILE).write_text(TRACE)
        environment["BASH_ENV"] = os.path.abspath(TRACE_FILE)
        descriptors = (TRACE_FD,)
    outcome = []
    for statement in statements:
        if trace is not None:
            os.dup2(trace.fileno(), TRACE_FD)
        status, text = run_bash(statement, environment, descriptors)
        if status < 0:
            return None
        outcome.append([int(status == 0), text if status == 0 else f"{text}[status {status}]"])
    return outcome


def run_bash(statement, environment, descriptors):
    """Return (exit status, output) of a statement in a fresh folder; a status below 0 if killed."""
    folder = tempfile.TemporaryDirectory(prefix="work-", ignore_cleanup_errors=True)
    with folder as work, tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            ["bash", "-c", statement],
            cwd=work,
            env={**environment, "HOME": work},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.DEVNULL,
            pass_fds=descriptors,
            start_new_session=True,
            preexec_fn=limit,
        )
        try:
            status = process.wait(WAIT_SECONDS)
        except subprocess.TimeoutExpired:
            status = -1
        finally:
            end(process)
        output.seek(0)
        return status, output.read(1 << 20).decode(errors="replace")


def limit():
    """Limit the processor time of a test, and the size of its files."""
    resource.setrlimit(resource.RLIMIT_CPU, (TEST_SECONDS, TEST_SECONDS))
    resource.setrlimit(resource.RLIMIT_FSIZE, (16 << 20, 16 << 20))


def end(process):
    """Kill what a test left behind."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run(file, path):
    """Put a file in the place of the package's own, and print the outcome of each asked test."""
    shutil.copyfile(file, path)
    for line in sys.stdin:
        outcome = perform(json.loads(line)["statements"])
        print(json.dumps(outcome), flush=True)
        if outcome is None:  # an endless loop: the run has failed, and the others would only wait
            break


if __name__ == "__main__":
    if sys.argv[1] == "record":
        main(sys.argv[2], sys.argv[3], int(sys.argv[4]))
    else:
        run(sys.argv[2], sys.argv[3])
