"""Wide families about small code bases in Python and JavaScript.

The tasks: write, repair, rename, extend, test and release.
"""

from __future__ import annotations

import json

from envs.tasks.terminal import checks
from envs.tasks.terminal.families.wide.programs import NAMES, PROGRAMS, Program, calls
from envs.tasks.terminal.registry import wide_family, write_file
from envs.tasks.terminal.task import Demonstration, Draw, TaskDraft, holds, lines, unchanged


def _program(draw: Draw) -> Program:
    return PROGRAMS[NAMES.index(draw.choose(*NAMES))]


@wide_family("write_function", "software", 3, "python3", runs_agent_code=True)
def write_function(draw: Draw) -> TaskDraft:
    program = _program(draw)
    module = draw.word()
    code, expected = calls(program, draw.rng, module)

    def demonstrator() -> Demonstration:
        yield "cat SPEC.txt"
        yield write_file(f"{module}.py", program.source)

    spec = lines(f"{module}.py: {program.signature} shall {program.spec}.")
    return TaskDraft(
        f"Write {module}.py as SPEC.txt says.",
        {"SPEC.txt": spec},
        [holds("SPEC.txt", spec), checks.python_prints(expected, code)],
        demonstrator,
    )


@wide_family("failing_tests", "software", 4, "python3", runs_agent_code=True)
def failing_tests(draw: Draw) -> TaskDraft:
    """Draw a package in which one module's tests fail; hidden inputs of all functions decide."""
    programs = draw.rng.sample(PROGRAMS, 3)
    modules = draw.words(3)
    package = draw.word()
    wrong = draw.number(0, 2)
    files = {f"{package}/__init__.py": ""}
    for index, (program, module) in enumerate(zip(programs, modules, strict=True)):
        files[f"{package}/{module}.py"] = (
            program.broken(draw.rng.choice(program.bugs)) if index == wrong else program.source
        )
        rows = [
            f"        self.assertEqual({program.name}(*{arguments!r}),"
            f" {program.expected(arguments)})"
            for arguments in program.inputs(draw.rng)
        ]
        files[f"tests/test_{module}.py"] = lines(
            "import unittest",
            "",
            f"from {package}.{module} import {program.name}",
            "",
            "",
            "class Test(unittest.TestCase):",
            "    def test_it(self):",
            *rows,
        )
    files["tests/__init__.py"] = ""
    hidden = [
        calls(program, draw.rng, f"{package}.{module}")
        for program, module in zip(programs, modules, strict=True)
    ]

    def demonstrator() -> Demonstration:
        yield "python3 -m unittest 2>&1 | tail -n 25"
        yield f"cat {package}/{modules[wrong]}.py"
        yield write_file(f"{package}/{modules[wrong]}.py", programs[wrong].source)
        yield "python3 -m unittest 2>&1 | tail -n 3"

    tests = {path: text for path, text in files.items() if path.startswith("tests/")}
    return TaskDraft(
        "`python3 -m unittest` fails. Mend the package so that its tests pass; leave the tests as"
        " they are.",
        files,
        [*unchanged(tests), *(checks.python_prints(expected, code) for code, expected in hidden)],
        demonstrator,
    )


@wide_family("rename_function", "software", 3)
def rename_function(draw: Draw) -> TaskDraft:
    old = draw.word()
    lib, app, test = draw.words(3)
    value = draw.number(2, 9)
    new = f"{old}_{draw.word()}"
    files = {
        f"{lib}.py": f"""\
def {old}(x):
    return x * {value}


def {old}s(xs):
    return [{old}(x) for x in xs]
""",
        f"{app}.py": f"""\
from {lib} import {old}, {old}s

print({old}(3), {old}s([1, 2]))
""",
        f"test_{test}.py": f"""\
import {lib}

assert {lib}.{old}(2) == {2 * value}  # {old}
""",
        "notes.txt": lines(f"the {old} is a fine thing"),
    }

    def demonstrator() -> Demonstration:
        yield f"grep -n {old} *"
        yield f"sed -i 's/\\b{old}\\b/{new}/g' *.py"
        yield f"grep -n {old} *"

    renamed = {
        path: (
            text.replace(f"{old}(", f"{new}(")
            .replace(f"import {old},", f"import {new},")
            .replace(f"# {old}", f"# {new}")
        )
        for path, text in files.items()
        if path.endswith(".py")
    }
    instruction = (
        f"Rename the function {old} to {new} in all .py files, comments included. {old}s is another"
        " function and keeps its name."
    )
    return TaskDraft(
        instruction,
        files,
        [*unchanged(renamed), holds("notes.txt", files["notes.txt"])],
        demonstrator,
    )


@wide_family("add_option", "software", 4, "python3", runs_agent_code=True)
def add_option(draw: Draw) -> TaskDraft:
    name = draw.word()
    words = draw.words(3)
    option = draw.word()
    effect, apply, expression = draw.rng.choice(
        [
            ("prints the words in reverse order", lambda rows: list(reversed(rows)), "words[::-1]"),
            (
                "prints the words in capitals",
                lambda rows: [row.upper() for row in rows],
                "[word.upper() for word in words]",
            ),
            ("prints the words in alphabetical order", sorted, "sorted(words)"),
            (
                "leaves out words that came before",
                lambda rows: list(dict.fromkeys(rows)),
                "list(dict.fromkeys(words))",
            ),
        ]
    )
    source = """\
import argparse


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument('words', nargs='+')
    arguments = parser.parse_args()
    words = arguments.words
    print(*words, sep='\\n')


if __name__ == '__main__':
    main()
"""

    def demonstrator() -> Demonstration:
        yield f"cat {name}.py"
        with_option = source.replace(
            "nargs='+')\n",
            f"nargs='+')\n    parser.add_argument('--{option}', action='store_true')\n",
        )
        yield write_file(
            f"{name}.py",
            with_option.replace(
                "    print", f"    if arguments.{option}:\n        words = {expression}\n    print"
            ),
        )
        yield f"python3 {name}.py --{option} b a"

    arguments = [*words, words[0], words[2]]
    run = (*checks.PYTHON, f"{name}.py")
    found = [
        checks.prints(lines(*apply(arguments)), *run, f"--{option}", *arguments),
        checks.prints(lines(*arguments), *run, *arguments),
        checks.prints(lines(*apply(arguments[1:])), *run, *arguments[1:], f"--{option}"),
        f"refuses {' '.join(run)} --no-such-option {words[0]}",
    ]
    return TaskDraft(
        f"Give the program {name}.py an option --{option}: with it, it {effect}. Without it nothing"
        " changes.",
        {f"{name}.py": source},
        found,
        demonstrator,
    )


@wide_family("write_test", "software", 5, "python3", runs_agent_code=True)
def write_test(draw: Draw) -> TaskDraft:
    """Draw a task to write a test that accepts the right module and refuses each wrong one.

    The test must also accept the right module in another layout.
    """
    program = _program(draw)
    module = draw.word()
    test = f"test_{draw.word()}.py"
    source = program.source
    anew = f"""\
# {draw.word()}
{source}

_unused = {draw.number(1, 99)}
"""

    def demonstrator() -> Demonstration:
        yield f"cat {module}.py"
        cases = [row for _ in range(2) for row in program.inputs(draw.rng)]
        yield write_file(
            test,
            lines(
                f"from {module} import {program.name}",
                *(
                    f"assert {program.name}(*{case!r}) == {program.expected(case)}"
                    for case in cases
                ),
            ),
        )
        yield f"python3 {test}"

    command = (
        f'{" ".join(checks.PYTHON)} -c \'import sys, runpy; sys.path.insert(0, ".");'
        f' runpy.run_path("{test}", run_name="__main__")\''
    )
    found = [holds(f"{module}.py", source), f"file {test}", f"accepts {command}"]
    for text, verdict in [
        (anew, "accepts"),
        *((program.broken(bug), "refuses") for bug in program.bugs),
    ]:
        found += [write_file(f"{module}.py", text), f"{verdict} {command}"]
    instruction = (
        f"Write {test}, a Python program that ends with an error unless {program.signature} in"
        f" {module}.py is right: it shall {program.spec}. It is right now; the test will also be"
        f" run on wrong versions of {module}.py."
    )
    return TaskDraft(instruction, {f"{module}.py": source}, found, demonstrator)


@wide_family("version_bump", "software", 3, "python3")
def version_bump(draw: Draw) -> TaskDraft:
    package = draw.word()
    major, minor, patch = (draw.number(0, 3), draw.number(0, 20), draw.number(1, 20))
    part = draw.choose("major", "minor", "patch")
    new = {
        "major": f"{major + 1}.0.0",
        "minor": f"{major}.{minor + 1}.0",
        "patch": f"{major}.{minor}.{patch + 1}",
    }[part]
    old = f"{major}.{minor}.{patch}"
    day = f"2024-0{draw.number(1, 9)}-1{draw.number(0, 9)}"
    change = f"- {draw.word()} {draw.word()}"
    files = {
        "pyproject.toml": f"""\
[project]
name = "{package}"
version = "{old}"
""",
        f"{package}/__init__.py": f'__version__ = "{old}"\n',
        "CHANGELOG.md": f"""\
# Changes

## Unreleased

{change}

## {old} (2023-12-01)

- first
""",
    }
    released = {
        path: text.replace(f'"{old}"', f'"{new}"').replace("## Unreleased", f"## {new} ({day})")
        for path, text in files.items()
    }

    def demonstrator() -> Demonstration:
        yield f"cat pyproject.toml {package}/__init__.py CHANGELOG.md"
        yield (
            f'sed -i \'s/"{old}"/"{new}"/\' pyproject.toml {package}/__init__.py && sed -i \'s/^##'
            f" Unreleased$/## {new} ({day})/' CHANGELOG.md"
        )

    instruction = (
        f"Make a {part} release: raise the {part} version by semantic versioning in pyproject.toml"
        f" and {package}/__init__.py, and in CHANGELOG.md turn the heading Unreleased into the new"
        f" version with the date {day} in brackets."
    )
    return TaskDraft(instruction, files, unchanged(released), demonstrator)


_SCRIPTS = {
    "sumEven": (
        "the sum of the even numbers of an array",
        """\
  let total = 0;
  for (const value of input) {
    if (value % 2 === 0) total += value;
  }
  return total;
""",
        (("=== 0", "=== 1"), ("+= value", "= value")),
        lambda xs: sum(x for x in xs if x % 2 == 0),
    ),
    "countAbove": (
        "how many numbers of an array are larger than 10",
        "  return input.filter((value) => value > 10).length;\n",
        (("> 10", ">= 10"), ("> 10", "< 10")),
        lambda xs: sum(x > 10 for x in xs),
    ),
    "sortedUnique": (
        "the different numbers of an array in ascending order",
        "  return [...new Set(input)].sort((a, b) => a - b);\n",
        ((".sort((a, b) => a - b)", ".sort()"), ("[...new Set(input)]", "[...input]")),
        lambda xs: sorted(set(xs)),
    ),
    "runningSum": (
        "the array whose i-th entry is the sum of the first i+1 numbers",
        "  let total = 0;\n  return input.map((value) => (total += value));\n",
        (("total += value", "total + value"), ("total = 0", "total = 1")),
        lambda xs: [sum(xs[: i + 1]) for i in range(len(xs))],
    ),
}


def _javascript(draw: Draw) -> tuple[str, str, str, str, list[str]]:
    """Draw a module: (name, specification, right source, wrong source, checks).

    The inputs have duplicates, a 10, and numbers that sort differently as text.
    """
    name = draw.choose(*_SCRIPTS)
    spec, body, bugs, reference = _SCRIPTS[name]
    source = f"""\
function {name}(input) {{
{body}}}

module.exports = {{ {name} }};
"""
    module = draw.word()
    right, wrong = draw.rng.choice(bugs)
    found = []
    drawn = [[draw.number(1, 30) for _ in range(draw.number(6, 12))] for _ in range(3)]
    for values in ([], [10, 9, 9, 2, 100, 11, 3, 4], *drawn):
        code = f"console.log(JSON.stringify(require('./{module}.js').{name}({json.dumps(values)})))"
        found.append(
            checks.prints(
                json.dumps(reference(values), separators=(",", ":")), "/usr/bin/node", "-e", code
            )
        )
    return module, f"{name}(input) returns {spec}", source, source.replace(right, wrong), found


@wide_family("js_mend", "software", 3, "node", runs_agent_code=True)
def js_mend(draw: Draw) -> TaskDraft:
    module, spec, source, broken, found = _javascript(draw)

    def demonstrator() -> Demonstration:
        yield f"cat {module}.js"
        yield write_file(f"{module}.js", source)

    return TaskDraft(
        f"{module}.js has a bug. It is right when {spec}. Mend it.",
        {f"{module}.js": broken},
        found,
        demonstrator,
    )


@wide_family("js_write", "software", 4, "node", runs_agent_code=True)
def js_write(draw: Draw) -> TaskDraft:
    module, spec, source, _, found = _javascript(draw)
    text = (
        json.dumps(
            {"name": draw.word(), "version": f"1.0.{draw.number(0, 99)}", "main": f"{module}.js"},
            indent=2,
        )
        + "\n"
    )

    def demonstrator() -> Demonstration:
        yield "cat package.json"
        yield write_file(f"{module}.js", source)
        yield f"node -e \"console.log(Object.keys(require('./{module}.js')))\""

    instruction = (
        f"Write the CommonJS module that package.json names as its main file. Its export {spec}."
    )
    return TaskDraft(
        instruction, {"package.json": text}, [holds("package.json", text), *found], demonstrator
    )
