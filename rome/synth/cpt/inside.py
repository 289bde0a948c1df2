"""Runs the tests of a tree and says what became of each; runs inside a sandbox, as a program.

    python3 inside.py ORDER.json > RESULTS.jsonl

ORDER: {"trees": [{"files": {path: text or null}, "modules": [path], "trace": bool, "tests":
[name]}]}. The folder `tree` holds the base; each tree changes these files of it, and runs these
tests of its modules, all where none is named. A line of the output is the outcomes of one tree:
{"outcomes": {test: outcome}, "functions": {test: [[path, line]]}, "edges": [...]}.
Where pytest is installed it runs the tests, as the repository sets it up. Without it, tests are
those of unittest, and functions test_* that take no arguments.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import json
import os
import pathlib
import signal
import subprocess
import sys
import unittest
from collections.abc import Iterator
from typing import Any

Place = tuple[str, int]  # a file, and the first line of a function in it
MODULE_SECONDS = 20.0  # of processor time, for the tests of one module
PROCESS_SECONDS = 180.0


def main() -> None:
    """Run all trees of an order, each in a copy of the base and in processes of its own."""
    order = json.loads(pathlib.Path(sys.argv[1]).read_text())
    for number, tree in enumerate(order["trees"]):
        folder = pathlib.Path(f"tree{number}")
        subprocess.run(["cp", "-r", "tree", str(folder)], check=True)
        for path, text in tree["files"].items():
            file = folder / path
            if text is None:
                with contextlib.suppress(OSError):
                    file.unlink()
            else:
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(text.encode())
        total: dict[str, Any] = {"outcomes": {}, "functions": {}, "edges": []}
        for module in tree["modules"]:
            found = run_module(folder, module, tree.get("trace", False), tree.get("tests", []))
            add(total, found, module)
        subprocess.run(["rm", "-rf", str(folder)], check=True)
        print(json.dumps(total), flush=True)


def run_module(folder: pathlib.Path, module: str, trace: bool, tests: list[str]) -> Any:
    """Return what a process of its own says about the tests of a module; None where it fails.

    Where tests are named, only those among them are run.
    """
    read, write = os.pipe()
    command = [sys.executable, "-B", os.path.abspath(__file__), "--module", module, str(write)]
    command += [json.dumps({"trace": trace, "tests": tests})]
    process = subprocess.Popen(
        command,
        cwd=folder,
        pass_fds=[write],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    os.close(write)
    chunks = []

    def stop(*_: object) -> None:
        with contextlib.suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)

    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, PROCESS_SECONDS)
    try:
        while chunk := os.read(read, 1 << 16):
            chunks.append(chunk)
        process.wait()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        stop()
        os.close(read)
    try:
        return json.loads(b"".join(chunks))
    except ValueError:
        return None


def add(total: Any, result: Any, module: str) -> None:
    """Add the result of a module to those of its tree."""
    if result is None:
        total["outcomes"][module] = "error"
        return
    for key in ("outcomes", "functions"):
        total[key].update(result[key])
    total["edges"] += result["edges"]


def work(module: str, descriptor: int, trace: bool, tests: list[str]) -> None:
    """Run the tests of a module, all where none is named, and write their outcomes into a pipe."""
    sys.path.insert(0, os.getcwd())
    if os.path.isdir("src"):
        sys.path.insert(1, os.path.join(os.getcwd(), "src"))
    tracer = Tracer(os.getcwd() + os.sep) if trace else None
    functions: dict[str, list[Place]] = {}
    quiet = io.StringIO()
    with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
        try:
            import pytest
        except ImportError:
            outcomes = run_plainly(module, tracer, tests)
        else:
            outcomes = run_by_pytest(pytest, module, tracer, tests)
    edges = []
    if tracer:
        at_import = tracer.used.pop("", set())
        functions = {label: sorted(used) for label, used in tracer.used.items()}
        functions[""] = sorted(at_import)
        edges = sorted(tracer.edges)
    text = json.dumps({"outcomes": outcomes, "functions": functions, "edges": edges})
    with os.fdopen(descriptor, "w") as pipe:
        pipe.write(text)
    os._exit(0)  # no exit handler of the tests has a say


def run_plainly(module: str, tracer: Tracer | None, chosen: list[str]) -> dict[str, str]:
    """Run the tests of a module without pytest; return their outcomes."""
    outcomes: dict[str, str] = {}
    try:
        with tracing(tracer, ""):
            name = module[: -len(".py")].replace("/", ".")
            tests = list(tests_of(module, importlib.import_module(name)))
    except BaseException:
        return {module: "error"}
    for label, test in tests:
        if chosen and label not in chosen:
            continue
        with tracing(tracer, label):
            outcomes[label] = outcome_of(test)
    return outcomes


def run_by_pytest(
    pytest: Any, module: str, tracer: Tracer | None, tests: list[str]
) -> dict[str, str]:
    """Run the tests of a module by pytest; return their outcomes."""
    arguments = [*(tests or [module]), "-p", "no:cacheprovider", "--rootdir", os.getcwd()]
    for more in ([], ["-o", "addopts="]):  # the options may be those of a plugin that is not here
        recorder = make_recorder(pytest, tracer)
        try:
            with tracing(tracer, ""):
                status = pytest.main([*arguments, *more], plugins=[recorder])
        except BaseException:
            return {module: "error"}
        if status != pytest.ExitCode.USAGE_ERROR:
            break
    if not recorder.outcomes and status != pytest.ExitCode.NO_TESTS_COLLECTED:
        return {module: "error"}
    return dict(recorder.outcomes)


def make_recorder(pytest: Any, tracer: Tracer | None) -> Any:
    """Return a plugin of pytest that notes the outcome of each test."""

    class Recorder:
        def __init__(self) -> None:
            self.outcomes: dict[str, str] = {}

        @pytest.hookimpl(hookwrapper=True)
        def pytest_runtest_protocol(self, item: Any) -> Iterator[None]:
            if tracer is None:
                yield
                return
            with tracing(tracer, item.nodeid):
                yield
            resume(tracer)

        def pytest_runtest_logreport(self, report: Any) -> None:
            outcome = "error" if report.failed and report.when != "call" else report.outcome
            if report.when == "call" or outcome != "passed":
                self.outcomes[report.nodeid] = outcome

        def pytest_collectreport(self, report: Any) -> None:
            if report.failed:
                self.outcomes[report.nodeid or "collection"] = "error"

    return Recorder()


def tests_of(path: str, module: Any) -> Iterator[tuple[str, Any]]:
    """Yield (label, function) of each test of a module."""
    for key, value in sorted(vars(module).items()):
        if getattr(value, "__module__", None) != module.__name__:
            continue
        if inspect.isclass(value) and issubclass(value, unittest.TestCase):
            for method in unittest.defaultTestLoader.getTestCaseNames(value):
                yield f"{path}::{key}::{method}", value(method)
        elif key.startswith("test") and inspect.isfunction(value) and is_plain(value):
            yield f"{path}::{key}", value


def is_plain(function: Any) -> bool:
    """Return whether a function can be called as it is."""
    return not inspect.signature(function).parameters and not inspect.iscoroutinefunction(function)


def outcome_of(test: Any) -> str:
    """Return passed, failed, error or skipped."""
    if isinstance(test, unittest.TestCase):
        result = unittest.TestResult()
        test.run(result)
        if result.skipped:
            return "skipped"
        if result.errors:
            return "error"
        return "passed" if result.testsRun == 1 and result.wasSuccessful() else "failed"
    try:
        test()
    except AssertionError:
        return "failed"
    except unittest.SkipTest:
        return "skipped"
    except BaseException:
        return "error"
    return "passed"


class Tracer:
    """Notes which functions below a folder run for each test, and which calls which."""

    def __init__(self, root: str) -> None:
        self.root = root
        self.used: dict[str, set[Place]] = {}
        self.edges: set[tuple[Place, Place]] = set()
        self.label = ""

    def __call__(self, frame: Any, event: str, argument: object) -> None:
        if event != "call":
            return
        place = self.place(frame)
        if place is None:
            return
        self.used.setdefault(self.label, set()).add(place)
        caller = frame.f_back
        while caller is not None and self.place(caller) is None:
            caller = caller.f_back
        called_from = None if caller is None else self.place(caller)
        if called_from is not None:
            self.edges.add((called_from, place))

    def place(self, frame: Any) -> Place | None:
        """Return (path, first line) of a function of the tree; None for others."""
        file = frame.f_code.co_filename
        if not file.startswith(self.root) or frame.f_code.co_name == "<module>":
            return None
        return file[len(self.root) :], frame.f_code.co_firstlineno


def resume(tracer: Tracer) -> None:
    """Trace what runs outside of tests again."""
    tracer.label = ""
    sys.setprofile(tracer)


@contextlib.contextmanager
def tracing(tracer: Tracer | None, label: str) -> Iterator[None]:
    """Trace what runs meanwhile."""
    if tracer is None:
        yield
        return
    tracer.label = label
    tracer.used.setdefault(label, set())
    sys.setprofile(tracer)
    try:
        yield
    finally:
        sys.setprofile(None)


if __name__ == "__main__":
    if sys.argv[1] == "--module":
        signal.setitimer(signal.ITIMER_PROF, MODULE_SECONDS)  # its signal ends the process
        work(sys.argv[2], int(sys.argv[3]), **json.loads(sys.argv[4]))
    else:
        main()
