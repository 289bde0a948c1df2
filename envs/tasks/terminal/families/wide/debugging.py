"""Wide families about broken things: crashes, wrong results, makefiles, imports and more."""

from __future__ import annotations

import json

from envs.tasks.terminal import checks
from envs.tasks.terminal.families.wide.programs import NAMES, PROGRAMS, Program, calls
from envs.tasks.terminal.registry import wide_family, write_file
from envs.tasks.terminal.task import Demonstration, Draw, TaskDraft, holds, lines, unchanged


def _program(draw: Draw) -> Program:
    return PROGRAMS[NAMES.index(draw.choose(*NAMES))]


@wide_family("crash", "debugging", 2, "python3", runs_agent_code=True)
def crash(draw: Draw) -> TaskDraft:
    """Draw a module with a syntax error that the interpreter reports."""
    program = _program(draw)
    module = draw.word()
    code, expected = calls(program, draw.rng, module)
    inner = program.source.split(f"def {program.name}")[1]
    breaks = {"    return ": "    retrun ", "def ": "dfe ", "):\n": ")\n", "    for ": "    fro "}
    right = draw.choose(*(text for text in breaks if text in inner or text == "def "))
    broken = program.source.replace(right, breaks[right], 1)

    def demonstrator() -> Demonstration:
        yield f"python3 -c 'import {module}' 2>&1 | tail -n 4"
        yield f"cat {module}.py"
        yield write_file(f"{module}.py", program.source)

    return TaskDraft(
        f"{module}.py cannot be imported. Mend it. Its function {program.signature} shall"
        f" {program.spec}.",
        {f"{module}.py": broken},
        [checks.python_prints(expected, code)],
        demonstrator,
    )


@wide_family("wrong_result", "debugging", 3, "python3", runs_agent_code=True)
def wrong_result(draw: Draw) -> TaskDraft:
    program = _program(draw)
    module = draw.word()
    code, expected = calls(program, draw.rng, module)
    bug = draw.rng.choice(program.bugs)

    def demonstrator() -> Demonstration:
        yield f"cat {module}.py"
        yield write_file(f"{module}.py", program.source)

    return TaskDraft(
        f"{program.signature} in {module}.py has a bug. It shall {program.spec}. Mend it.",
        {f"{module}.py": program.broken(bug)},
        [checks.python_prints(expected, code)],
        demonstrator,
    )


def _named_files(draw: Draw, folder: str) -> tuple[dict[str, str], str]:
    """Draw files with and without spaces in their names, and what count.sh prints of them."""
    names = [f"{draw.word()} {draw.word()}.txt", *draw.names(draw.number(1, 3))]
    files = {f"{folder}/{name}": lines(*draw.words(draw.number(1, 5))) for name in names}
    rows = [f"{name} {files[f'{folder}/{name}'].count(chr(10))}" for name in sorted(names)]
    return files, lines(*rows)


@wide_family("shell_quotes", "debugging", 3, runs_agent_code=True)
def shell_quotes(draw: Draw) -> TaskDraft:
    """Draw a folder on which the script fails, and a hidden one on which it is judged."""
    folder = f"{draw.word()} {draw.word()}"
    hidden = f"{draw.word()} {draw.word()}"
    files, _ = _named_files(draw, folder)
    hidden_files, answer = _named_files(draw, hidden)
    broken, fixed = (
        """\
for file in {}; do
    printf '%s %s\\n' "$(basename {})" $(wc -l < {})
done
""".format(*names)
        for names in (("$(ls $1/*)", "$file", "$file"), ('"$1"/*', '"$file"', '"$file"'))
    )

    def demonstrator() -> Demonstration:
        yield f"cat count.sh; ls '{folder}'"
        yield write_file("count.sh", fixed)
        yield f"bash count.sh '{folder}'"

    instruction = (
        "count.sh prints the name of each file in the folder that it is given, and how many lines"
        " it has. It fails where names have spaces. Mend it."
    )
    found = [
        *unchanged(files),
        *checks.hidden_files(hidden_files),
        checks.prints(answer, "/bin/bash", "count.sh", hidden),
    ]
    return TaskDraft(instruction, {"count.sh": broken, **files}, found, demonstrator)


@wide_family("makefile", "debugging", 3, "make", runs_agent_code=True)
def makefile(draw: Draw) -> TaskDraft:
    one = draw.word()
    two = draw.word()
    target = draw.word()
    fresh = draw.word()
    files = {f"{one}.txt": lines(draw.word()), f"{two}.txt": lines(draw.word())}
    good = f"{target}.txt: {one}.txt {two}.txt\n\tcat {one}.txt {two}.txt > {target}.txt\n"
    broken = draw.choose(
        good.replace("\t", "    "),
        good.replace(f": {one}.txt {two}.txt", f": {one}.txt {two}.text"),
        good.replace(f" {two}.txt\n", "\n", 1),
    )

    def demonstrator() -> Demonstration:
        yield f"make {target}.txt 2>&1 || true; cat Makefile"
        yield (
            f"printf '{target}.txt: {one}.txt {two}.txt\\n\\tcat {one}.txt {two}.txt >"
            f" {target}.txt\\n' > Makefile"
        )
        yield f"make {target}.txt && cat {target}.txt"

    # The rule is tested, not only the file: when an input changes, make must rebuild the target.
    rebuild = [
        f"printf '{fresh}\\n' > {two}.txt",
        f"touch -d '2001-01-01' {target}.txt {one}.txt",
        f"clean /usr/bin/make -s {target}.txt > /dev/null",
    ]
    found = [
        *unchanged(files),
        holds(f"{target}.txt", "".join(files.values())),
        *rebuild,
        holds(f"{target}.txt", files[f"{one}.txt"] + fresh),
    ]
    instruction = (
        f"`make {target}.txt` shall join {one}.txt and {two}.txt, in this order, into {target}.txt,"
        " and again whenever one of them changes. Mend the Makefile and run it."
    )
    return TaskDraft(instruction, {"Makefile": broken, **files}, found, demonstrator)


@wide_family("broken_json", "debugging", 2, "python3")
def broken_json(draw: Draw) -> TaskDraft:
    source = draw.word() + ".json"
    keys = draw.words(4)
    value = {
        keys[0]: draw.number(1, 99),
        keys[1]: [draw.word(), draw.word()],
        keys[2]: {keys[3]: draw.word()},
    }
    text = json.dumps(value, indent=2) + "\n"
    broken = draw.choose(
        text.replace('",', '"', 1),
        text.replace(f'"{keys[2]}"', keys[2]),
        text.replace("],", "],,"),
        text.replace(f'"{keys[3]}":', f'"{keys[3]}" ='),
        text.replace(f'"{keys[0]}"', f"'{keys[0]}'"),
    )

    def demonstrator() -> Demonstration:
        yield f"python3 -m json.tool {source} 2>&1 || true"
        yield f"cat {source}"
        yield write_file(source, text)

    return TaskDraft(
        f"{source} is not valid JSON any more. Mend it without changing what it means.",
        {source: broken},
        [checks.json_holds(source, value)],
        demonstrator,
    )


@wide_family("import_cycle", "debugging", 4, "python3", runs_agent_code=True)
def import_cycle(draw: Draw) -> TaskDraft:
    one, two = draw.words(2)
    price, order = draw.words(2)
    rate = draw.number(2, 9)
    files = {
        f"{one}.py": f"""\
from {two} import {order}

RATE = {rate}


def {price}(amount):
    return amount * RATE


def total(amounts):
    return sum({order}(one) for one in amounts)
""",
        f"{two}.py": f"""\
from {one} import RATE, {price}

LIMIT = 10 * RATE


def {order}(amount):
    return min({price}(amount), LIMIT)
""",
    }
    amounts = [draw.number(1, 30) for _ in range(4)]
    result = sum(min(amount * rate, 10 * rate) for amount in amounts)

    def demonstrator() -> Demonstration:
        yield f"python3 -c 'import {one}' 2>&1 | tail -n 1"
        yield f"cat {one}.py {two}.py"
        yield write_file(
            "base.py",
            f"""\
RATE = {rate}


def {price}(amount):
    return amount * RATE
""",
        )
        yield (
            f"sed -i '/^RATE/d; /^def {price}/,/return/d; 1i from base import RATE, {price}'"
            f" {one}.py && sed -i 's/^from {one} import/from base import/' {two}.py"
        )
        yield f"python3 -c 'import {one}, {two}'"

    found = [
        checks.python_prints(
            f"{result} {rate} {10 * rate} {rate * 3}",
            f"from {first} import *\nimport {one}, {two}\nprint({one}.total({amounts}), {one}.RATE,"
            f" {two}.LIMIT, {one}.{price}(3))",
        )
        for first in (one, two)
    ]
    return TaskDraft(
        f"{one}.py and {two}.py import each other, and neither can be imported. Mend that; every"
        " name stays where it can be imported from now.",
        files,
        found,
        demonstrator,
    )


@wide_family("first_cause", "debugging", 3)
def first_cause(draw: Draw) -> TaskDraft:
    services = draw.words(4)
    times = sorted(draw.rng.sample(range(10, 60), 4))
    order = draw.shuffled(services)
    files = {}
    for service, minute in zip(order, times, strict=True):
        rows = [
            (draw.number(0, 9), f"INFO {draw.word()} started"),
            (minute, f"ERROR {draw.word()} failed"),
            (minute, "INFO retry"),
        ]
        files[f"{service}.log"] = lines(*(f"2024-03-05 10:{at:02d}:00 {text}" for at, text in rows))

    def demonstrator() -> Demonstration:
        rows = (yield "grep ERROR *.log | sort -t: -k2 | head -n 2").split("\n")
        yield f"echo {rows[0].split('.log:')[0]} > out.txt"

    return TaskDraft(
        "Each service has a log here. Which service was the first to report an ERROR? Write its"
        " name, without .log, to out.txt.",
        files,
        [holds("out.txt", order[0]), *unchanged(files)],
        demonstrator,
    )


@wide_family("two_modules", "debugging", 4, "python3", runs_agent_code=True)
def two_modules(draw: Draw) -> TaskDraft:
    """Draw three modules of which two have a bug."""
    programs = draw.rng.sample(PROGRAMS, 3)
    modules = draw.words(3)
    bugs = [draw.rng.choice(program.bugs) for program in programs]
    order = draw.rng.sample(range(3), 3)
    files = {
        f"lib/{module}.py": program.broken(bug) if place else program.source
        for module, program, bug, place in zip(modules, programs, bugs, order, strict=True)
    }
    hidden = [
        calls(program, draw.rng, f"lib.{module}")
        for program, module in zip(programs, modules, strict=True)
    ]

    def demonstrator() -> Demonstration:
        yield "tail -n +1 lib/*.py"
        for module, program, place in zip(modules, programs, order, strict=True):
            if place:
                yield write_file(f"lib/{module}.py", program.source)

    spec = lines(
        *(
            f"lib/{module}.py: {program.signature} shall {program.spec}."
            for module, program in zip(modules, programs, strict=True)
        )
    )
    return TaskDraft(
        "SPEC.txt says what the modules in lib shall do. Two of the three are wrong. Mend them.",
        {"SPEC.txt": spec, "lib/__init__.py": "", **files},
        [
            holds("SPEC.txt", spec),
            *(checks.python_prints(expected, code) for code, expected in hidden),
        ],
        demonstrator,
    )
