"""Runs inside the proof's sandbox: the tests of the package as it is, then of each mutant, each run in a fork of this process.

Reads order.json, writes results.jsonl: {"outcomes": [[test id, outcome]], "complete": bool} for each run.
"""

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
SLOWER = 10.0  # times the package as it is


def main():
    with open("order.json", "rb") as file:
        order = json.load(file)
    pytest = runner.find_pytest() if order["framework"] == "pytest" else None
    cpu = order["cpu"]
    with open("results.jsonl", "w") as results:
        for job in [None] + order["jobs"]:
            original = None
            if job:
                path = os.path.join(PACKAGE, job["path"])
                with open(path, "rb") as file:
                    original = file.read()
                with open(path, "wb") as file:
                    file.write(job["text"].encode())
            result, seconds = run(order, pytest, cpu)
            results.write(json.dumps(result) + "\n")
            if job is None:
                cpu = max(1, math.ceil(SLOWER * seconds))  # whole seconds: a mutant that is so much slower goes round in an endless loop
            if job:
                with open(path, "wb") as file:
                    file.write(original)


def run(order, pytest, cpu):
    """One run, and its seconds of processor time. What the tests start is killed with it."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(read)
            play(order, pytest, write, cpu)
        finally:
            os._exit(1)
    os.close(write)
    deadline, data = time.monotonic() + order["wall"], bytearray()
    os.set_blocking(read, False)
    status = None
    while status is None:
        ended, code, usage = os.wait4(child, os.WNOHANG)
        if ended:
            status, seconds = code, usage.ru_utime + usage.ru_stime
        elif time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
        drain(read, data)
        time.sleep(0 if ended else 0.002)
    try:
        os.killpg(child, signal.SIGKILL)
    except ProcessLookupError:
        pass
    drain(read, data)
    os.close(read)
    outcomes = [json.loads(line) for line in data.splitlines(True) if line.endswith(b"\n")]
    complete = status == 0 and outcomes[-1:] == [[None, "end"]]
    return {"outcomes": [one for one in outcomes if one[0] is not None], "complete": complete}, seconds


def drain(read, data):
    try:
        while True:
            piece = os.read(read, 1 << 16)
            if not piece:
                return
            data += piece
    except BlockingIOError:
        return


def play(order, pytest, write, cpu):
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
