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
END_SECONDS, POLL_SECONDS = (
    5.0,
    0.02,
)  # for processes that were killed to be gone; between looks at the tests' process
REPORT_BYTES = 64 << 20
OUTPUT_BYTES = 8192
# What tells a test framework how to run: an agent's change to it is undone.
RUNNER_FILES = (
    "conftest.py",
    "pytest.ini",
    ".pytest.ini",
    "tox.ini",
    "sitecustomize.py",
    "usercustomize.py",
)


def main():
    """Grade the package in the working directory and write the reward."""
    prctl = ctypes.CDLL(None).prctl
    prctl(
        PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0
    )  # whoever loses its parent becomes a child of this process, and cannot hide
    prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)  # nobody reads the key here
    spec = json.loads(gzip.decompress((HERE / "spec.json.gz").read_bytes()))
    root = pathlib.Path(os.getcwd())
    bring_back(root, spec)
    controls = write_controls(root, spec["framework"], spec["control_folder"])
    reports, output, problem = run_tests(root, spec, controls)
    faults = [problem] if problem else judge(reports, spec["tests"], controls)
    for entry in os.listdir(REWARDS):
        path = REWARDS / entry
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    (REWARDS / "reward.txt").write_text("0\n" if faults else "1\n")
    print(output)
    print("%d tests must pass; %d faults" % (len(spec["tests"]), len(faults)))
    print("\n".join(faults[:20]))


# -- the files of the tests
# -------------------------------------------------------------------------------------------------


def bring_back(root, spec):
    """Restore the tests and the files that configure them, whatever lies there now.

    Configuration files that the agent added are removed.
    """
    keep = set(spec["keep"])
    for folder, names, files in os.walk(str(root)):
        names[:] = [name for name in names if name not in (".git", "node_modules")]
        for name in files:
            path = os.path.relpath(os.path.join(folder, name), str(root))
            if name in RUNNER_FILES and path not in keep:
                os.unlink(os.path.join(folder, name))
    for path in spec["remove"]:
        target = place(root, path)
        if target.is_dir() and not target.is_symlink():
            shutil.rmtree(str(target))
        elif target.exists() or target.is_symlink():
            target.unlink()
    with tarfile.open(str(HERE / "files.tar.gz")) as archive:
        for member in archive:
            target = place(root, member.name)
            if target.is_dir() and not target.is_symlink():
                shutil.rmtree(str(target))
            elif target.exists() or target.is_symlink():
                target.unlink()
            target.write_bytes(archive.extractfile(member).read())
            target.chmod(member.mode)


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
    name, good, bad = (
        "%s_%s" % (prefix, secrets.token_hex(6)) for prefix in ("test", "test", "test")
    )
    path = (folder + "/" if folder != "." else "") + name + ".py"
    # the failing one fails by the assertion that the tests of this framework use
    place(root, path).write_text(
        "import unittest\n\n\nclass T(unittest.TestCase):\n    def %s(self):\n       "
        " self.assertEqual(%r, %r)\n\n    def %s(self):\n        self.assertEqual(%r, %r)\n"
        % (good, good, good, bad, good, bad)
        if framework == "unittest"
        else (
            "def %s():\n    value = %r\n    assert value == %r\n\n\ndef %s():\n    value = %r\n   "
            " assert value == %r\n"
        )
        % (good, good, good, bad, good, bad)
    )
    if framework == "unittest":
        module = path[:-3].replace("/", ".")
        return {module + ".T." + good: "passed", module + ".T." + bad: "failed"}
    return {path + "::" + good: "passed", path + "::" + bad: "failed"}


# -- running
# -------------------------------------------------------------------------------------------------


def run_tests(root, spec, controls):
    """Run the tests.

    Returns:
      ([(test id, outcome)], the end of the output, why the run does not count or "").
    """
    key = secrets.token_bytes(32)
    read, write = os.pipe()
    with tempfile.TemporaryFile() as log:
        order = json.dumps(
            {
                "key": key.hex(),
                "fd": write,
                "framework": spec["framework"],
                "targets": spec["targets"],
                "controls": sorted(controls),
            }
        )
        environment = {
            name: value
            for name, value in os.environ.items()
            if name not in ("PYTHONPATH", "TEST_DIR", "PYTHONSAFEPATH")
        }
        environment["PYTHONHASHSEED"] = "0"
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
            child.stdin.write(order.encode())
        data, late = collect(read, child, time.monotonic() + spec["timeout"])
        end_all(child)
        size = log.seek(0, os.SEEK_END)
        log.seek(max(0, size - OUTPUT_BYTES))
        output = log.read().decode(errors="replace")
    if late:
        return [], output, "the tests did not end within %g s" % spec["timeout"]
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
        for kill, pid in [(os.killpg, child.pid), *((os.kill, pid) for pid in children())]:
            try:
                kill(pid, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                pass
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
        if entry.isdigit():
            try:
                with open("/proc/%s/stat" % entry, "rb") as file:
                    fields = file.read().rpartition(b")")[2].split()
            except OSError:
                continue
            if int(fields[1]) == os.getpid():
                found.append(int(entry))
    return found


def read_reports(data, key):
    """Check the reports: each line is its signature, a space and JSON [number, id, outcome].

    The last one is [number, null, "end"].

    Returns:
      ([(test id, outcome)], fault or "").
    """
    found = []
    for number, row in enumerate(data.split(b"\n")[:-1]):
        signature, _, body = row.partition(b" ")
        if not hmac.compare_digest(
            hmac.new(key, body, hashlib.sha256).hexdigest().encode(), signature
        ):
            return [], "report %d is not the runner's: something wrote into its pipe" % number
        place_, name, outcome = json.loads(body)
        if place_ != number:
            return [], "report %d is out of order" % number
        if name is None:
            return (
                (found, "")
                if number == data.count(b"\n") - 1 and data.endswith(b"\n")
                else ([], "reports follow the last one")
            )
        found.append((name, outcome))
    return [], "the tests ended before they were done (%d reports)" % len(found)


# -- the verdict
# -------------------------------------------------------------------------------------------------


def judge(reports, tests, controls):
    """Return the faults: tests that were not run or did not pass, and wrong controls."""
    outcomes = {}
    for name, outcome in reports:
        outcomes.setdefault(name, set()).add(outcome)
        if name.split() and name.split()[0] != name:
            outcomes.setdefault(name.split()[0], set()).add(
                outcome
            )  # SWE-bench's own parser cuts names at the first space
    for name, wanted in controls.items():
        if outcomes.get(name) != {wanted}:
            return [
                "the outcomes cannot be believed: a test that must have %s was %s"
                % (wanted, " and ".join(sorted(outcomes.get(name, ["not run"]))))
            ]
    return [
        "%s: %s" % (name, " and ".join(sorted(outcomes.get(name, ["not run"]))))
        for name in tests
        if outcomes.get(name) != {"passed"}
    ]


if __name__ == "__main__":
    main()
