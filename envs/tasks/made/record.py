"""Records what a Python package does; runs inside a sandbox, in a folder that holds the package.

    python3 record.py record PACKAGE SEED LIMIT > tests.jsonl
    python3 record.py run FILE PATH < ASKED > outcomes.jsonl

A test is a list of statements in the namespace of one module: the examples of a docstring, or a
call whose arguments are drawn (calls.py). Each line of the output is {"module", "statements",
"outcome", "lines"}: what the statements show, and the package's lines that they run. Of objects of
the package's own classes they show the public attributes, too. Only tests are kept that end in time
and show no addresses; the caller compares two recordings. `run` puts FILE in the place of PATH and
prints the outcomes of the tests that it is asked for.
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
import re
import resource
import shutil
import signal
import sys
import threading

from calls import Target, draw_tests

TEST_SECONDS = 0.5
MAX_OUTCOME = 2000
MAX_STATE = 600  # characters of an outcome that say what objects hold
MAX_OBJECTS = 12
ADDRESS = re.compile(r" object at 0x[0-9a-f]+")
MAX_MEMORY_BYTES = 384 << 20
VALUES = (
    "0", "1", "2", "-1", "7", "1000", "12345", "0.5", "1e6", "True", "None", "''", "'a'",
    "'abc'", "'a b'", "'x=1'", "'a/b/c.txt'", "'1.2.3'", "'>=1.0'", "'10 KB'",
    "'https://a.b/c?d=e#f'", "[]", "[3, 1, 2]", "['b', 'a']", "{}", "{'a': 1}", "{'b': [1, 2]}",
    "(1, 2)", "b'ab'",
)  # fmt: skip
# Texts of common forms: settings, JSON, markup, a table, a URL, a date.
FORMS = (
    "'[a]\\nx = 1  # y\\n[b]\\nz: 2\\n'", "'{\"a\": [1, 2.5, null]}'", "'<a b=\"c\">d &amp; e</a>'",
    "'a,b\\n1,\"2 3\"\\n'", "'https://u:p@a.b:80/c%20d?e=f&g#h'", "'2024-02-29T10:20:30Z'",
)  # fmt: skip
# What an argument may be, by a word of its annotation.
KINDS = (
    ("bool", ("True", "False")),
    ("str", ("''", "'a'", "'abc'", "'a b'", "'A-b_c.d'", "'1.2.3'", "'a\\nb\\n'", "'x=1'", *FORMS)),
    ("bytes", ("b''", "b'ab'", "b'\\x00\\xff'")),
    ("int", ("0", "1", "2", "3", "-1", "7", "10", "1000")),
    ("float", ("0.0", "0.5", "-1.5", "1e6", "3")),
    ("dict", ("{}", "{'a': 1}", "{'b': [1, 2]}", "{'a': {'b': 'c'}}")),
    ("Mapping", ("{}", "{'a': 1}", "{'b': [1, 2]}")),
    ("tuple", ("()", "(1, 2)", "('a', 'b')")),
    ("list", ("[]", "[3, 1, 2]", "['b', 'a']")),
    ("Sequence", ("[]", "[3, 1, 2]", "['b', 'a']")),
    ("Iterable", ("[]", "[3, 1, 2]", "['b', 'a']")),
    ("None", ("None",)),
)
# How objects are asked about, by the method that answers.
QUESTIONS = {
    "__str__": "str({})", "__repr__": "repr({})", "__eq__": "{} == {}", "__lt__": "{} < {}",
    "__len__": "len({})", "__iter__": "list({})", "__contains__": "'a' in {}",
    "__bool__": "bool({})", "__hash__": "hash({}) == hash({})",
}  # fmt: skip


def main(package, seed, limit):
    """Print the tests of a package: its docstrings' examples first, then drawn calls."""
    real = sys.stdout
    modules = import_all(package)
    targets = targets_of(modules)

    def watch(module, statements):
        return observe(package, modules[module], statements)

    rng = random.Random(f"record/{package}/{seed}")
    for test in draw_tests(examples(modules), targets, watch, rng, limit):
        real.write(json.dumps(test) + "\n")
        real.flush()


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


def targets_of(modules):
    """Return what can be called: public functions, classes, and methods of their objects."""
    found = []
    for name, module in modules.items():
        values = [*VALUES, *constants(module)]
        for key, value in sorted(vars(module).items()):
            if key.startswith("_") or getattr(value, "__module__", None) != name:
                continue
            if inspect.isfunction(value):
                found.append(Target(name, f"{key}({{}})", parameters(value, values)))
            elif inspect.isclass(value):
                found += class_targets(name, key, value, values)
    return found


def class_targets(module, key, value, values):
    """Return the ways to use a class: make an object, call its methods, ask about it."""
    own = parameters(value, values)
    make = f"{key}({{}})"
    found = [Target(module, make, own, makes=key)]
    for name, member in sorted(vars(value).items()):
        if isinstance(member, (classmethod, staticmethod)) and not name.startswith("_"):
            function = member.__func__
            skip = isinstance(member, classmethod)
            found.append(Target(module, f"{key}.{name}({{}})", parameters(function, values, skip)))
        elif inspect.isfunction(member) and not name.startswith("_"):
            more = parameters(member, values, 1)
            form = f"[o := {make}, o.{name}({{}}), o][1:]"  # the object as the call leaves it, too
            found.append(Target(module, form, own, more))
        elif isinstance(member, property) and not name.startswith("_"):
            found.append(Target(module, f"{make}.{name}", own))
        elif name in QUESTIONS and inspect.isfunction(member):
            question = QUESTIONS[name].replace("{}", make)
            more = own if question.count("{}") > 1 else ()
            found.append(Target(module, question, own, more))
    return found


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


def parameters(function, values, skip=0):
    """Return (name, values, whether it may be left out) of each parameter of a function."""
    try:
        listed = list(inspect.signature(function).parameters.values())[int(skip) :]
    except (TypeError, ValueError):
        return [("", values, True), ("", values, True)]
    found = []
    for parameter in listed:
        is_private = parameter.name.startswith("_") and parameter.default is not parameter.empty
        if parameter.kind is parameter.VAR_KEYWORD or is_private:
            continue
        fitting = fitting_values(parameter, values)
        if parameter.kind is parameter.VAR_POSITIONAL:
            found.append(("", fitting, True))
        elif parameter.default is parameter.empty:
            name = parameter.name if parameter.kind is parameter.KEYWORD_ONLY else ""
            found.append((name, fitting, False))
        elif parameter.kind is not parameter.POSITIONAL_ONLY:
            found.append((parameter.name, fitting, True))
    return found


def fitting_values(parameter, values):
    """Return the values that a parameter's annotation or default speaks for, a few others too."""
    told = str(parameter.annotation)
    if parameter.annotation is parameter.empty:
        told = type(parameter.default).__name__ if parameter.default is not None else ""
    texts = [value for word, group in KINDS if word in told for value in group]
    if not texts:
        return values
    kinds = tuple({type(ast.literal_eval(text)) for text in texts})
    same = [value for value in values if isinstance(ast.literal_eval(value), kinds)]
    return [*texts, *same, *VALUES[:: len(VALUES) // 3]]


def observe(package, module, statements):
    """Return (what the statements show, {file: lines that they run}).

    (None, {}) stands for what cannot be compared, (None, None) for what does not end in time.
    """
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
    if outcome is None:
        return None, None
    text = json.dumps(outcome)
    if len(text) > MAX_OUTCOME or "0x" in text or " at 0" in text or "/case-" in text:
        return None, {}
    return outcome, {file: sorted(numbers) for file, numbers in lines.items()}


def perform(module, statements):
    """Return [kind of end, text] of each statement, or None where they do not end in time."""
    space = dict(vars(module))
    package = module.__name__.partition(".")[0]
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
                        shown = show(eval(code, space), package)
            except (TimeoutError, MemoryError):
                return None
            except BaseException as error:
                outcome.append([0, type(error).__name__ + state_of(error, package)])
            else:
                outcome.append([1, printed.getvalue() + shown])
    except (TimeoutError, MemoryError):
        return None
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
    return outcome


def show(value, package):
    """Return the text of a value, with the public attributes of the package's own objects."""
    return ADDRESS.sub(" object", repr(value)) + state_of(value, package)


def state_of(value, package):
    """Return the text of what the package's own objects hold that a value is or contains."""
    found = []
    seen = []
    waiting = [("", value, 0)]
    while waiting and len(seen) < MAX_OBJECTS:
        place, one, depth = waiting.pop(0)
        if any(one is other for other in seen):
            continue
        parts = ()
        if type(one) in (list, tuple):
            parts = [(f"{place}[{number}]", part) for number, part in enumerate(one)]
        elif type(one) is dict:
            parts = [(f"{place}[{text_of(key)}]", part) for key, part in one.items()]
        elif type(one).__module__.partition(".")[0] == package:
            seen.append(one)
            parts = [(f"{place}.{name}", part) for name, part in attributes(one)]
            texts = [(name, text_of(part)) for name, part in parts]
            found += [f"{name}={text}" for name, text in texts if "0x" not in text]
        if depth < 3:
            waiting += [(name, part, depth + 1) for name, part in parts[:MAX_OBJECTS]]
    return (" with " + ", ".join(found))[:MAX_STATE] if found else ""


def text_of(value):
    """Return the text of a value without addresses, or its type's name where it has none."""
    try:
        return ADDRESS.sub(" object", repr(value))
    except (TimeoutError, MemoryError):
        raise
    except Exception:
        return type(value).__name__


def attributes(value):
    """Return (name, value) of the public attributes that an object holds, sorted by name."""
    held = dict(getattr(value, "__dict__", {}))
    for kind in type(value).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else tuple(slots):
            with contextlib.suppress(AttributeError):
                held[name] = getattr(value, name)
    return sorted(
        ((name, part) for name, part in held.items() if not name.startswith("_")),
        key=lambda pair: pair[0],
    )


def run(file, path):
    """Put a file in the place of the package's own, and print the outcome of each asked test."""
    shutil.copyfile(file, path)
    for line in sys.stdin:
        test = json.loads(line)
        try:
            module = importlib.import_module(test["module"])
        except BaseException as error:
            print(type(error).__name__)
            continue
        outcome = perform(module, test["statements"])
        print(json.dumps(outcome), flush=True)
        if outcome is None:  # an endless loop: the run has failed, and the others would only wait
            break


if __name__ == "__main__":
    sys.path.insert(0, ".")
    if sys.argv[1] == "record":
        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
        main(sys.argv[2], sys.argv[3], int(sys.argv[4]))
    else:
        run(sys.argv[2], sys.argv[3])
