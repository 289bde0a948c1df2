"""The driver of the proof; runs inside its sandbox.

It runs the tests of the unchanged package and then of each mutant, each run in a fork of this
process. It reads order.json and writes results.jsonl: {"outcomes": [[test id, outcome]],
"complete": bool} for each run.
"""

import contextlib
import json
import math
import os
import resource
import signal
import sys
import time

import runner  # beside this file; it imports unittest, which every fork then has

PACKAGE = os.path.abspath("package")
MEMORY_BYTES = 768 << 20
SLOWER = 10.0  # how many times the package's processor time a mutant may take
BASELINES = 3  # runs of the unchanged package


def main():
    """Run the order's jobs and write their results."""
    with open("order.json", "rb") as file:
        order = json.load(file)
    pytest = runner.find_pytest() if order["framework"] == "pytest" else None
    with open("results.jsonl", "w") as results:
        base, cpu = baseline(order, pytest)
        results.write(json.dumps(base) + "\n")
        for job in order["jobs"]:
            path = os.path.join(PACKAGE, job["path"])
            original = read_file(path)
            write_file(path, job["text"].encode())
            results.write(json.dumps(mutant(order, pytest, cpu, base)) + "\n")
            write_file(path, original)


def read_file(path):
    """Return the content of a file."""
    with open(path, "rb") as file:
        return file.read()


def write_file(path, content):
    """Replace the content of a file."""
    with open(path, "wb") as file:
        file.write(content)


def baseline(order, pytest):
    """Run the tests of the unchanged package.

    A test with two outcomes in BASELINES runs is "flaky" and proves nothing.

    Returns:
      (the result, seconds of processor time that a mutant gets).
    """
    runs = [run(order, pytest, order["cpu"]) for _ in range(BASELINES)]
    seen = {}
    for result, _ in runs:
        for name, outcome in result["outcomes"]:
            seen.setdefault(name, []).append(outcome)
    outcomes = []
    for name, found in seen.items():
        is_steady = found == found[:1] * BASELINES
        outcomes.append([name, found[0] if is_steady else "flaky"])
    complete = all(result["complete"] for result, _ in runs)
    # Whole seconds; a mutant that is slower than this is in an endless loop.
    slowest = max(seconds for _, seconds in runs)
    cpu = max(1, math.ceil(SLOWER * slowest))
    return {"outcomes": outcomes, "complete": complete}, cpu


def mutant(order, pytest, cpu, base):
    """Run the tests of one mutant, twice if it differs from the package.

    It counts as not complete unless both runs agree, flaky tests aside.
    """

    def steady(result):
        return {name: outcome for name, outcome in result["outcomes"] if name not in flaky}

    flaky = {name for name, outcome in base["outcomes"] if outcome == "flaky"}
    result, _ = run(order, pytest, cpu)
    if result["complete"] and steady(result) != steady(base):
        again, _ = run(order, pytest, cpu)
        result["complete"] = again["complete"] and steady(again) == steady(result)
    return result


def run(order, pytest, cpu):
    """Run the tests once; return the result and the seconds of processor time.

    Processes that the tests started are killed at the end.
    """
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(read)
            play(order, pytest, write, cpu)
        finally:
            os._exit(1)
    os.close(write)
    deadline = time.monotonic() + order["wall"]
    data = bytearray()
    os.set_blocking(read, False)
    status = None
    while status is None:
        ended, code, usage = os.wait4(child, os.WNOHANG)
        if ended:
            status = code
            seconds = usage.ru_utime + usage.ru_stime
        elif time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
        drain(read, data)
        time.sleep(0 if ended else 0.002)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    drain(read, data)
    os.close(read)
    outcomes = [json.loads(line) for line in data.splitlines(True) if line.endswith(b"\n")]
    complete = status == 0 and outcomes[-1:] == [[None, "end"]]
    return {
        "outcomes": [one for one in outcomes if one[0] is not None],
        "complete": complete,
    }, seconds


def drain(read, data):
    """Read everything that the pipe holds now."""
    try:
        while True:
            piece = os.read(read, 1 << 16)
            if not piece:
                return
            data += piece
    except BlockingIOError:
        return


def play(order, pytest, write, cpu):
    """Run the tests in this process, report their outcomes through the pipe, and exit."""
    os.setsid()
    resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu + 1))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    os.chdir(PACKAGE)
    sys.path[0:1] = [PACKAGE]

    def report(name, outcome):
        os.write(write, json.dumps([name, outcome]).encode() + b"\n")

    if pytest:
        runner.run_pytest(pytest, order["targets"], report)
    else:
        runner.run_unittest(order["targets"], report)
    report(None, "end")
    os._exit(0)


if __name__ == "__main__":
    main()
