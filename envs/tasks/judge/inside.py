"""The judge; runs inside the sandbox as /tests/judge.py.

It restores the tests, runs them in another process, and writes the reward when none of their
processes lives any more.

The code under test belongs to the agent and shares the tests' process, so neither its output nor an
exit code counts. Only complete reports of runner.py count: it sends them through a pipe, each line
signed with a key that is removed from its standard input before the agent's code is imported. Two
control tests with random names run among the others; one must pass and one must fail. Whatever
changes the outcomes of tests (a conftest, a patched assert, a hook) changes theirs too. One way
remains: code written against this very file could search its own process's memory for the key.

Only the standard library; Python 3.8 and newer. The exit code is 0 whatever the verdict; any other
exit code means that the judge itself died.
"""

import contextlib
import ctypes
import gzip
import hashlib
import hmac
import json
import os
import pathlib
import secrets
import select
import shutil
import signal
import stat
import subprocess
import tarfile
import tempfile
import time

HERE = pathlib.Path(__file__).resolve().parent
REWARDS = HERE.parent / "logs" / "verifier"
PR_SET_DUMPABLE = 4
PR_SET_CHILD_SUBREAPER = 36
END_SECONDS = 5.0  # for processes that were killed to be gone
POLL_SECONDS = 0.02  # between checks of the tests' process
REPORT_BYTES = 64 << 20
OUTPUT_BYTES = 8192
# Files that tell a test framework how to run; an agent's changes to them are undone.
RUNNER_FILES = (
    "conftest.py",
    "pytest.toml",
    ".pytest.toml",
    "pytest.ini",
    ".pytest.ini",
    "tox.ini",
    "sitecustomize.py",
    "usercustomize.py",
)
# Two control tests, of which the first must pass and the second must fail by an assertion.
CONTROL_UNITTEST = """\
import unittest


class T(unittest.TestCase):
    def {good}(self):
        self.assertEqual({good!r}, {good!r})

    def {bad}(self):
        self.assertEqual({good!r}, {bad!r})
"""
CONTROL_PYTEST = """\
def {good}():
    value = {good!r}
    assert value == {good!r}


def {bad}():
    value = {good!r}
    assert value == {bad!r}
"""


def main():
    """Grade the package in the working directory and write the reward."""
    prctl = ctypes.CDLL(None).prctl
    # Orphans of the tests become children of this process, so none of them can hide.
    prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)  # no other process can read the key from this one's memory
    spec = json.loads(gzip.decompress((HERE / "spec.json.gz").read_bytes()))
    root = pathlib.Path(os.getcwd())
    bring_back(root, spec)
    controls = write_controls(root, spec["framework"], spec["control_folder"])
    reports, output, problem = run_tests(root, spec, controls)
    faults = [problem] if problem else judge(reports, spec["tests"], controls)
    for entry in os.listdir(REWARDS):
        remove(REWARDS / entry)
    (REWARDS / "reward.txt").write_text("0\n" if faults else "1\n")
    print(output)
    print(f"{len(spec['tests'])} tests must pass; {len(faults)} faults")
    print("\n".join(faults[:20]))


# -- Files of the tests
# -------------------------------------------------------------------------------------------------


def bring_back(root, spec):
    """Restore the tests and the files that configure them, whatever lies there now.

    Configuration files that the agent added are removed.
    """
    remove_settings(root, set(spec["keep"]))
    for path in spec["remove"]:
        remove(place(root, path))
    with tarfile.open(str(HERE / "files.tar.gz")) as archive:
        for member in archive:
            target = place(root, member.name)
            remove(target)
            target.write_bytes(archive.extractfile(member).read())
            target.chmod(member.mode)


def remove_settings(root, keep):
    """Remove files that configure tests, except for those to keep."""
    for folder, names, files in os.walk(str(root)):
        names[:] = [name for name in names if name not in (".git", "node_modules")]
        for name in files:
            file = os.path.join(folder, name)
            if name in RUNNER_FILES and os.path.relpath(file, str(root)) not in keep:
                os.unlink(file)


def remove(path):
    """Remove a file, a link or a folder, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(str(path))
    elif path.exists() or path.is_symlink():
        path.unlink()


def place(root, path):
    """Return the location of a file below the root, and make its folders.

    Links and files in its way, which could lead elsewhere, are removed.
    """
    target = root
    for part in pathlib.PurePosixPath(path).parts[:-1]:
        target = target / part
        if target.is_symlink() or (target.exists() and not target.is_dir()):
            target.unlink()
        target.mkdir(exist_ok=True)
        target.chmod(stat.S_IMODE(target.stat().st_mode) | 0o700)
    return target / pathlib.PurePosixPath(path).name


def write_controls(root, framework, folder):
    """Write two tests with unpredictable names; return {test id: outcome that it must have}."""
    name = random_name()
    good = random_name()
    bad = random_name()
    path = f"{name}.py" if folder == "." else f"{folder}/{name}.py"
    template = CONTROL_UNITTEST if framework == "unittest" else CONTROL_PYTEST
    place(root, path).write_text(template.format(good=good, bad=bad))
    if framework == "unittest":
        module = path[: -len(".py")].replace("/", ".")
        return {f"{module}.T.{good}": "passed", f"{module}.T.{bad}": "failed"}
    return {f"{path}::{good}": "passed", f"{path}::{bad}": "failed"}


def random_name():
    """Return a name of a test that no one can predict."""
    return f"test_{secrets.token_hex(6)}"


# -- Running
# -------------------------------------------------------------------------------------------------


def run_tests(root, spec, controls):
    """Run the tests.

    Returns:
      ([(test id, outcome)], the end of the output, why the run does not count or "").
    """
    key = secrets.token_bytes(32)
    read, write = os.pipe()
    with tempfile.TemporaryFile() as log:
        order = {
            "key": key.hex(),
            "fd": write,
            "framework": spec["framework"],
            "targets": spec["targets"],
            "controls": sorted(controls),
        }
        environment = dict(os.environ, PYTHONHASHSEED="0")
        for name in ("PYTHONPATH", "TEST_DIR", "PYTHONSAFEPATH"):
            environment.pop(name, None)
        child = subprocess.Popen(
            [*spec["python"], "-B", str(HERE / "runner.py")],
            cwd=str(root),
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            pass_fds=[write],
            env=environment,
            start_new_session=True,
        )
        os.close(write)
        with child.stdin:
            child.stdin.write(json.dumps(order).encode())
        data, late = collect(read, child, time.monotonic() + spec["timeout"])
        end_all(child)
        size = log.seek(0, os.SEEK_END)
        log.seek(max(0, size - OUTPUT_BYTES))
        output = log.read().decode(errors="replace")
    if late:
        return [], output, f"the tests did not end within {spec['timeout']:g} s"
    reports, fault = read_reports(data, key)
    return reports, output, fault


def collect(read, child, deadline):
    """Read the pipe until it is closed or the tests' process has ended.

    Returns:
      (the data, whether the deadline passed first).
    """
    data = bytearray()
    with os.fdopen(read, "rb", 0) as pipe:
        while len(data) <= REPORT_BYTES:
            left = deadline - time.monotonic()
            ended = child.poll() is not None  # a process that it left may hold the pipe open
            if left <= 0:
                return bytes(data), True
            if select.select([pipe], [], [], 0 if ended else min(left, POLL_SECONDS))[0]:
                piece = pipe.read(1 << 16)
                if not piece:
                    break
                data += piece
            elif ended:
                break
    return bytes(data), False


def end_all(child):
    """Kill every process that the tests started, and wait for their end.

    A process that cannot be killed ends this grading.
    """
    deadline = time.monotonic() + END_SECONDS
    while time.monotonic() < deadline:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, signal.SIGKILL)
        for pid in children():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            child.returncode = 0  # it was waited for here
            return
        time.sleep(0.005)
    os.kill(-1, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


def children():
    """Return the ids of this process's children, or [] where /proc cannot be read.

    That is the case in the landlock tier.
    """
    found = []
    try:
        entries = os.listdir("/proc")
    except OSError:
        return []
    for entry in entries:
        if entry.isdigit() and parent_of(entry) == os.getpid():
            found.append(int(entry))
    return found


def parent_of(pid):
    """Return the parent's id of a process, or None where the process is gone."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return None
    return int(fields[1])


def read_reports(data, key):
    """Check the reports: each line is its signature, a space and JSON [number, id, outcome].

    The last one is [number, null, "end"].

    Returns:
      ([(test id, outcome)], fault or "").
    """
    found = []
    lines = data.split(b"\n")
    for number, row in enumerate(lines[:-1]):
        signature, _, body = row.partition(b" ")
        expected = hmac.new(key, body, hashlib.sha256).hexdigest().encode()
        if not hmac.compare_digest(expected, signature):
            return [], f"report {number} is not the runner's: something wrote into its pipe"
        position, name, outcome = json.loads(body)
        if position != number:
            return [], f"report {number} is out of order"
        if name is None:
            is_last = number == len(lines) - 2 and not lines[-1]
            return (found, "") if is_last else ([], "reports follow the last one")
        found.append((name, outcome))
    return [], f"the tests ended before they were done ({len(found)} reports)"


# -- Verdict
# -------------------------------------------------------------------------------------------------


def judge(reports, tests, controls):
    """Return the faults: tests that were not run or did not pass, and wrong controls."""
    outcomes = {}
    for name, outcome in reports:
        outcomes.setdefault(name, set()).add(outcome)
        words = name.split()
        if words and words[0] != name:  # SWE-bench's own parser cuts names at the first space
            outcomes.setdefault(words[0], set()).add(outcome)
    for name, wanted in controls.items():
        if outcomes.get(name) != {wanted}:
            return [
                "the outcomes cannot be believed: a test that must have"
                f" {wanted} was {told(outcomes, name)}"
            ]
    return [f"{name}: {told(outcomes, name)}" for name in tests if outcomes.get(name) != {"passed"}]


def told(outcomes, name):
    """Return a test's outcomes as text."""
    return " and ".join(sorted(outcomes.get(name, ["not run"])))


if __name__ == "__main__":
    main()
