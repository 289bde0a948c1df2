"""Records what a JavaScript package does; runs inside a sandbox that has node, as record.py does.

    python3 record_javascript.py record PACKAGE SEED LIMIT > tests.jsonl
    python3 record_javascript.py run FILE PATH < ASKED > outcomes.jsonl

In a statement, `m` is what the module exports. record.js performs the statements.
"""

import contextlib
import json
import os
import pathlib
import random
import re
import select
import shutil
import subprocess
import sys
import time

from calls import Target, draw_tests

ANSWER_SECONDS = 30.0
MAX_OUTCOME = 2000
VALUES = (
    "0", "1", "2", "-1", "7", "1000", "0.5", "true", "false", "null", "''", "'a'", "'abc'",
    "'a b'", "'x=1'", "'a/b/c.txt'", "'1.2.3'", "'>=1.0.0 <2'", "'10 KB'", "'2 days'",
    "'[a]\\nb=c\\n'", "'{a,b}c{1..3}'", "[]", "[3, 1, 2]", "['b', 'a']",
    "[['a', 'bc'], ['d', 'e']]", "{}", "{a: 1}", "{b: [1, 2]}", "{a: {b: 'c'}}",
)  # fmt: skip
_LITERAL = re.compile(r"'[^'\\\n]{1,20}'|\"[^\"\\\n]{1,20}\"|(?<![\w.])\d{1,6}(?![\w.])")


class Node:
    """A process of record.js; one that does not answer in time is replaced."""

    def __init__(self, package):
        self._package = package
        self._process = None

    def ask(self, question):
        """Return the answer to a question, or {} where there is none in time."""
        if self._process is None or self._process.poll() is not None:
            self._start()
        try:
            self._process.stdin.write(json.dumps(question).encode() + b"\n")
            self._process.stdin.flush()
            return json.loads(self._read_line())
        except (OSError, ValueError):
            self.close()
            return {}

    def _start(self):
        read, write = os.pipe()
        command = f"exec node record.js {json.dumps(self._package)} 3>&{write}"
        self._process = subprocess.Popen(
            ["bash", "-c", command],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=[write],
        )
        os.close(write)
        self._read = read

    def _read_line(self):
        deadline = time.monotonic() + ANSWER_SECONDS
        line = b""
        while not line.endswith(b"\n"):
            ready, _, _ = select.select([self._read], [], [], max(0.0, deadline - time.monotonic()))
            part = os.read(self._read, 1 << 16) if ready else b""
            if not part:
                raise OSError("no answer")
            line += part
        return line

    def close(self):
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            with contextlib.suppress(OSError):
                self._process.stdin.close()
            os.close(self._read)
            self._process = None


def main(package, seed, limit):
    """Print the tests of a package."""
    node = Node(package)
    targets = []
    for one in node.ask({"list": True}).get("targets", ()):
        values = [*VALUES, *constants(one["module"])]
        lists = [parameters(count, values) for count in one["counts"]]
        targets.append(Target(one["module"], one["form"], *lists, makes=one.get("makes", "")))

    def watch(module, statements):
        answer = node.ask({"module": module, "statements": statements, "watch": True})
        outcome = answer.get("outcome")
        text = json.dumps(outcome)
        if outcome is None or len(text) > MAX_OUTCOME or "/case-" in text:
            return None, {}
        return outcome, answer["lines"]

    rng = random.Random(f"record/{package}/{seed}")
    for test in draw_tests((), targets, watch, rng, limit):
        print(json.dumps(test), flush=True)
    node.close()


def parameters(count, values):
    """Return the parameters of a function that names so many; one more may be given."""
    return [("", values, False)] * count + [("", values, True)]


def constants(module):
    """Return the short texts and numbers in a module's source."""
    text = pathlib.Path(module).read_text(errors="replace")
    found = {one for one in _LITERAL.findall(text) if not one[1:].startswith((".", "/"))}
    return sorted(found)[:60]


def run(file, path):
    """Put a file in the place of the package's own, and print the outcome of each asked test."""
    shutil.copyfile(file, path)
    node = Node(path.split("/")[0])
    for line in sys.stdin:
        test = json.loads(line)
        outcome = node.ask(test).get("outcome")
        print(json.dumps(outcome), flush=True)
        if outcome is None:  # an endless loop: the run has failed, and the others would only wait
            break
    node.close()


if __name__ == "__main__":
    if sys.argv[1] == "record":
        main(sys.argv[2], sys.argv[3], int(sys.argv[4]))
    else:
        run(sys.argv[2], sys.argv[3])
