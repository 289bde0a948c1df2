"""Records what a Python package does; runs inside a sandbox, in a folder that holds the package.

    python3 record.py PACKAGE SEED LIMIT > tests.jsonl

A test is a list of statements in the namespace of one module: the examples of a docstring, or a
call whose arguments are drawn from the package's own constants. Each line of the output is
{"module", "statements", "outcome", "lines"}: what the statements show, and the package's lines that
they run. Only tests are kept that end in time and show no addresses; the caller compares two
recordings.
"""

import ast
import contextlib
import doctest
import importlib
import inspect
import io
import json
import pathlib
import random
import resource
import signal
import sys
import threading

TEST_SECONDS = 0.5
MAX_OUTCOME = 2000
MAX_MEMORY_BYTES = 384 << 20
VALUES = (
    "0", "1", "2", "-1", "7", "1000", "12345", "0.5", "1e6", "True", "None", "''", "'a'",
    "'abc'", "'a b'", "'x=1'", "'a/b/c.txt'", "'1.2.3'", "'>=1.0'", "'10 KB'",
    "'https://a.b/c?d=e#f'", "[]", "[3, 1, 2]", "['b', 'a']", "{}", "{'a': 1}", "{'b': [1, 2]}",
    "(1, 2)", "b'ab'",
)  # fmt: skip


def main(package, seed, limit):
    """Print the tests of a package, shortest first."""
    sys.path.insert(0, ".")
    real = sys.stdout
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    modules = import_all(package)
    rng = random.Random(f"record/{package}/{seed}")
    candidates = [*examples(modules), *calls(modules, rng, 6 * limit)]
    seen = set()
    kept = 0
    for name, statements in candidates:
        if kept >= limit or (name, tuple(statements)) in seen:
            continue
        seen.add((name, tuple(statements)))
        outcome, lines = observe(package, modules[name], statements)
        if outcome is None or not lines or not any(one[0] for one in outcome):
            continue
        kept += 1
        test = {"module": name, "statements": statements, "outcome": outcome, "lines": lines}
        real.write(json.dumps(test) + "\n")


def import_all(package):
    """Return the package's modules that can be imported, by name."""
    found = {}
    for path in sorted(pathlib.Path(package).rglob("*.py")):
        parts = path.with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if parts[-1] in ("__main__", "setup", "conftest") or "tests" in parts:
            continue
        with contextlib.suppress(BaseException), quiet():
            found[name] = importlib.import_module(name)
    return found


@contextlib.contextmanager
def quiet():
    """Hide what the code prints."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def examples(modules):
    """Yield (module, statements) of each docstring with examples."""
    finder = doctest.DocTestFinder(exclude_empty=True)
    for name, module in modules.items():
        with contextlib.suppress(BaseException):
            for test in finder.find(module, name):
                statements = [example.source.strip() for example in test.examples]
                if statements:
                    yield name, statements[:12]


def calls(modules, rng, count):
    """Yield (module, statements) of calls of the package's public functions and methods."""
    targets = []
    values = list(VALUES)
    for name, module in modules.items():
        for key, value in sorted(vars(module).items()):
            if key.startswith("_") or getattr(value, "__module__", None) != name:
                continue
            if inspect.isfunction(value):
                targets.append((name, key, value, None))
            elif inspect.isclass(value):
                targets.append((name, key, value, None))
                for method, function in sorted(vars(value).items()):
                    if inspect.isfunction(function) and not method.startswith("_"):
                        targets.append((name, key, value, (method, function)))
        values += constants(module)
    for _ in range(count if targets else 0):
        name, key, value, method = rng.choice(targets)
        text = f"{key}({arguments(value, rng, values)})"
        if method is not None:
            text += f".{method[0]}({arguments(method[1], rng, values, skip=1)})"
        yield name, [text]


def constants(module):
    """Return the short texts and numbers in a module's source, as source."""
    found = []
    with contextlib.suppress(BaseException):
        for node in ast.walk(ast.parse(inspect.getsource(module))):
            if isinstance(node, ast.Constant) and isinstance(node.value, (str, int, float)):
                text = repr(node.value)
                if 2 < len(text) < 24:
                    found.append(text)
    return sorted(set(found))[:60]


def arguments(function, rng, values, skip=0):
    """Return the text of arguments that a function may take."""
    try:
        parameters = list(inspect.signature(function).parameters.values())[skip:]
    except (TypeError, ValueError):
        return ", ".join(rng.choice(values) for _ in range(rng.choice((0, 1, 1, 2))))
    parts = []
    for parameter in parameters:
        if parameter.kind is parameter.VAR_POSITIONAL:
            parts += [rng.choice(values) for _ in range(rng.choice((0, 1)))]
        elif parameter.kind is parameter.VAR_KEYWORD:
            continue
        elif parameter.default is parameter.empty:
            parts.append(rng.choice(values))
        elif rng.random() < 0.3:
            parts.append(f"{parameter.name}={rng.choice(values)}")
            if parameter.kind is parameter.POSITIONAL_ONLY:
                parts.pop()
    named = [part for part in parts if "=" in part.split("(")[0].split("'")[0]]
    plain = [part for part in parts if part not in named]
    return ", ".join([*plain, *named])


def observe(package, module, statements):
    """Return (what the statements show, {file: lines that they run}), or (None, {})."""
    root = str(pathlib.Path(package).resolve())
    lines = {}

    def trace(frame, event, argument):
        file = frame.f_code.co_filename
        if not file.startswith(root):
            return None
        if event == "line":
            lines.setdefault(file[len(root) - len(package) :], set()).add(frame.f_lineno)
        return trace

    sys.settrace(trace)
    threading.settrace(trace)
    try:
        outcome = perform(module, statements)
    finally:
        sys.settrace(None)
        threading.settrace(None)
    text = json.dumps(outcome) if outcome is not None else "0x"
    if len(text) > MAX_OUTCOME or "0x" in text or " at 0" in text or "/case-" in text:
        return None, {}
    return outcome, {file: sorted(numbers) for file, numbers in lines.items()}


def perform(module, statements):
    """Return [kind of end, text] of each statement, or None where they do not end in time."""
    space = dict(vars(module))
    outcome = []

    def stop(number, frame):
        raise TimeoutError

    signal.signal(signal.SIGPROF, stop)  # processor time: a loaded machine must not decide
    signal.signal(signal.SIGALRM, stop)  # code that waits takes none
    signal.setitimer(signal.ITIMER_PROF, TEST_SECONDS)
    signal.setitimer(signal.ITIMER_REAL, 20 * TEST_SECONDS)
    try:
        for statement in statements:
            printed = io.StringIO()
            try:
                with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(io.StringIO()):
                    try:
                        code = compile(statement, "<test>", "eval")
                    except SyntaxError:
                        exec(compile(statement, "<test>", "exec"), space)
                        shown = ""
                    else:
                        shown = repr(eval(code, space))
            except (TimeoutError, MemoryError):
                return None
            except BaseException as error:
                outcome.append([0, type(error).__name__])
            else:
                outcome.append([1, printed.getvalue() + shown])
    except TimeoutError:
        return None
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
    return outcome


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
