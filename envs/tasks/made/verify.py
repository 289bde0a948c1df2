"""The verifier of made tasks; runs inside its own sandbox as /tests/verify.py.

It runs the agent's program on cases that the agent has not seen, each in a fresh folder, and
compares what the program printed, its exit status and the files that it left. Nothing that the
program can reach tells it what is expected: cases are read into memory and deleted from the disk
before the program first runs, and no other process may read this one's memory. The reward is
written when no process of the program lives any more.

Only the standard library. `passes` is also used by the proof of mutants (prove.py), where many
programs are judged in one sandbox.
"""

import contextlib
import ctypes
import functools
import gzip
import json
import os
import pathlib
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time

HERE = pathlib.Path(__file__).resolve().parent
PR_SET_DUMPABLE = 4
PR_SET_CHILD_SUBREAPER = 36
MAX_OUTPUT_BYTES = 1 << 20  # of one run
MAX_FILE_BYTES = 16 << 20
END_SECONDS = 5.0
TOO_SLOW = "the program did not end in time"
WAIT_FACTOR = 4  # seconds by the clock for each of processor time: a busy machine must not decide


def main(app):
    """Judge the program in the folder `app`, and write the reward."""
    prctl = ctypes.CDLL(None).prctl
    prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
    rewards = HERE.parent / "logs" / "verifier"
    order = json.loads(gzip.decompress((HERE / "cases.json.gz").read_bytes()))
    for entry in HERE.iterdir():
        remove(entry)
    faults = judge(order, app)
    if not end_all():
        os.kill(-1, signal.SIGKILL)  # a process lives on: end everything, this grading too
    for entry in rewards.iterdir():
        remove(entry)
    (rewards / "reward.txt").write_text("0\n" if faults else "1\n")
    print(f"{len(order['cases'])} cases, {len(faults)} faults")
    print("\n".join(faults[:5]))


def remove(path):
    """Remove a file or a folder."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def judge(order, app, first_only=False):
    """Return the faults of the program in the folder `app`, as texts without expected values."""
    program = pathlib.Path(app, order["program"])
    if program.is_symlink() or not program.is_file():
        return [f"{order['program']} is no regular file"]
    faults = []
    for number, case in enumerate(order["cases"], 1):
        fault = run_case(order, case, app)
        if fault:
            faults.append(f"case {number}: {fault}")
            if first_only or fault == TOO_SLOW:  # the other cases would only wait
                break
    return faults


def run_case(order, case, app):
    """Run the program on one case in a fresh folder; return what is wrong, or ""."""
    work = pathlib.Path(tempfile.mkdtemp(prefix="case-"))
    try:
        for name, text in {**order.get("files", {}), **case.get("files", {})}.items():
            path = work / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(text.encode())
        if case.get("setup"):
            run(["/bin/bash", "-c", case["setup"]], work, "", 30.0)
        argv = [part.replace("{app}", str(app)) for part in case["argv"]]
        code, output = run(argv, work, case.get("stdin", ""), order["seconds"])
        end_all()
        return difference(case, code, output, work)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def difference(case, code, output, work):
    """Return how the outcome of a run differs from what is expected, or ""."""
    expect = case["expect"]
    if code is None:
        return TOO_SLOW
    if "code" in expect and (code == 0) != (expect["code"] == 0):
        return f"exit status {code}"
    if "stdout" in expect and output.rstrip("\n") != expect["stdout"].rstrip("\n"):
        return "the output differs"
    for name, text in expect.get("files", {}).items():
        path = work / name
        if text is None:
            if path.exists() or path.is_symlink():
                return f"{name} is still there"
            continue
        if path.is_symlink() or not path.is_file() or path.stat().st_size > MAX_FILE_BYTES:
            return f"{name} is no regular file"
        if path.read_text(errors="replace").rstrip("\n") != text.rstrip("\n"):
            return f"{name} differs"
    if "probe" in expect:
        _, seen = run(["/bin/bash", "-c", case["probe"]], work, "", 30.0)
        if seen.rstrip("\n") != expect["probe"].rstrip("\n"):
            return "the state that the program left differs"
    return ""


def run(argv, work, stdin, seconds):
    """Run a command in a folder; return (exit status or None where it was too slow, output).

    A process of it may have so many seconds of processor time. Settings of this process's own
    Python are kept from it: with PYTHONSAFEPATH a program would not find the modules beside it.
    """
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("PYTHON")},
        "HOME": str(work),
        "LC_ALL": "C.UTF-8",
        "TZ": "UTC",
        "PYTHONDONTWRITEBYTECODE": "1",
        "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_AUTHOR_NAME": "A",
        "GIT_AUTHOR_EMAIL": "a@example.org",
        "GIT_COMMITTER_NAME": "A",
        "GIT_COMMITTER_EMAIL": "a@example.org",
        "GIT_AUTHOR_DATE": "2024-01-01T00:00:00Z",
        "GIT_COMMITTER_DATE": "2024-01-01T00:00:00Z",
    }
    with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as out:
        given.write(stdin.encode())
        given.seek(0)
        try:
            child = subprocess.Popen(
                argv,
                cwd=work,
                stdin=given,
                stdout=out,
                stderr=subprocess.DEVNULL,
                env=environment,
                start_new_session=True,
                preexec_fn=functools.partial(limit, int(seconds) + 1),
            )
        except OSError:
            return 127, ""
        try:
            code = child.wait(WAIT_FACTOR * seconds)
        except subprocess.TimeoutExpired:
            code = None
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        if code == -signal.SIGXCPU:
            code = None
        out.seek(0)
        return code, out.read(MAX_OUTPUT_BYTES).decode(errors="replace")


def limit(seconds):
    """Limit the processor time of a program's processes, and the size of the files they write."""
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    resource.setrlimit(resource.RLIMIT_FSIZE, (MAX_FILE_BYTES, MAX_FILE_BYTES))


def end_all():
    """Kill every process that the program left; return whether all of them are gone."""
    deadline = time.monotonic() + END_SECONDS
    while time.monotonic() < deadline:
        for pid in children():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return True
        time.sleep(0.002)
    return False


def children():
    """Return the ids of this process's children, or [] where /proc cannot be read."""
    found = []
    try:
        entries = os.listdir("/proc")
    except OSError:
        return found
    for entry in entries:
        if entry.isdigit():
            try:
                with open(f"/proc/{entry}/stat", "rb") as file:
                    fields = file.read().rpartition(b")")[2].split()
            except OSError:
                continue
            if int(fields[1]) == os.getpid():
                found.append(int(entry))
    return found


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
