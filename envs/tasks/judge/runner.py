"""The test runner of the judge; runs inside the sandbox as /tests/runner.py.

It shares its process with the agent's code, runs the tests and reports each outcome through a pipe.
All modules that it needs are imported before the agent's folder is on the path, so a json.py, a
pytest.py or a unittest.py there has no effect. `python runner.py --list FRAMEWORK TARGET...` prints
each test and its outcome instead, unsigned, for the author of a task.
"""

import hashlib
import hmac
import json
import os
import sys
import unittest

HERE = os.path.dirname(os.path.abspath(__file__))


def reporter(key, fd):
    """Return a function (test id, outcome) -> None that signs and sends an outcome.

    The key exists only in its closure.
    """
    number = 0
    sign = hmac.new
    dumps = json.dumps
    write = os.write
    sha256 = hashlib.sha256

    def report(name, outcome):
        nonlocal number
        body = dumps([number, name, outcome]).encode()
        number += 1
        line = sign(key, body, sha256).hexdigest().encode() + b" " + body + b"\n"
        while line:
            line = line[write(fd, line) :]

    return report


def print_outcome(name, outcome):
    """Print a test's outcome as a line of JSON."""
    print(json.dumps([name, outcome]), flush=True)


class Result(unittest.TestResult):
    """A result that reports each test once, when it has stopped."""

    def __init__(self, report):
        super().__init__()
        self._report = report
        self._outcome = None

    def startTest(self, test):
        super().startTest(test)
        self._outcome = "passed"

    def stopTest(self, test):
        super().stopTest(test)
        self._report(test.id(), self._outcome)

    def addError(self, test, err):
        super().addError(test, err)
        self._bad(test)

    def addFailure(self, test, err):
        super().addFailure(test, err)
        self._bad(test)

    def addSubTest(self, test, subtest, err):
        super().addSubTest(test, subtest, err)
        if err is not None:
            self._outcome = "failed"

    def addSkip(self, test, reason):
        super().addSkip(test, reason)
        self._outcome = "skipped"

    def addUnexpectedSuccess(self, test):
        super().addUnexpectedSuccess(test)
        self._outcome = "failed"

    def _bad(self, test):
        if isinstance(test, unittest.TestCase) and self._outcome is not None:
            self._outcome = "failed"
        else:
            self._report(str(test), "failed")  # of a setUpClass or a module


def run_unittest(targets, report):
    """Discover and run the tests below the target folders."""
    loader = unittest.TestLoader()
    suite = unittest.TestSuite()
    for folder in targets:
        suite.addTest(loader.discover(folder, pattern="test*.py", top_level_dir=os.getcwd()))
    suite.run(Result(report))


class Plugin:
    """A plugin of pytest that reports one outcome for each test, from its three phases."""

    def __init__(self, report):
        self._report = report
        self._outcomes = {}

    def pytest_runtest_logreport(self, report):
        expected_to_fail = hasattr(report, "wasxfail")
        if report.passed or (expected_to_fail and report.skipped):
            outcome = "passed"
        else:
            outcome = report.outcome
        if expected_to_fail and report.when == "call" and report.passed:
            outcome = "failed"  # whether xfail is strict or not
        before = self._outcomes.get(report.nodeid, "passed")
        self._outcomes[report.nodeid] = before if before != "passed" else outcome
        if report.when == "teardown":
            self._report(report.nodeid, self._outcomes.pop(report.nodeid))


def run_pytest(pytest, targets, report):
    """Run the targets with pytest."""
    options = ["-p", "no:cacheprovider", "-q", "--no-header", "-rN", "--tb=short"]
    pytest.main([*options, "--continue-on-collection-errors", *targets], plugins=[Plugin(report)])


def find_pytest():
    """Import the interpreter's own pytest, or else the one that the task includes."""
    try:
        import pytest
    except ImportError:
        archive = os.path.join(HERE, "pytest.tar.gz")
        if not os.path.exists(archive):
            raise
        import tarfile
        import tempfile

        place = tempfile.mkdtemp()
        with tarfile.open(archive) as files:
            files.extractall(place)
        sys.path.append(place)
        import pytest
    return pytest


def main():
    """Run the tests that the order on standard input, or the command line, asks for."""
    if sys.argv[1:2] == ["--list"]:
        framework = sys.argv[2]
        targets = sys.argv[3:]
        report = print_outcome
    else:
        order = json.loads(sys.stdin.buffer.read())
        os.set_inheritable(order["fd"], False)  # processes that the tests start do not get the pipe
        framework = order["framework"]
        targets = order["targets"]
        report = reporter(bytes.fromhex(order.pop("key")), order["fd"])
        if framework == "pytest":
            targets = targets + sorted({name.split("::")[0] for name in order["controls"]})
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    pytest = find_pytest() if framework == "pytest" else None
    sys.path[0:1] = [os.getcwd()]  # in place of this file's own folder
    if pytest:
        run_pytest(pytest, targets, report)
    else:
        run_unittest(targets, report)
    report(None, "end")
    sys.stdout.flush()
    os._exit(0)  # without waiting for anything that the tests registered for the exit


if __name__ == "__main__":
    main()
