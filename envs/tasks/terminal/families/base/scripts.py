"""Families about scripts and settings: a typo, a missing file, a value.

A verifier never runs what the agent wrote. It compares the repaired script, and the file that
running it left behind.
"""

from __future__ import annotations

from envs.tasks.terminal.task import Demonstration, Draw, TaskDraft, family, holds, lines, unchanged

TYPOS = {"cat": "cta", "sort": "srot", "tail": "tial", "head": "haed"}


@family("typo")
def typo(draw: Draw) -> TaskDraft:
    source = draw.names(1)[0]
    rows = draw.words(3)
    program = draw.choose(*TYPOS)
    output = {"cat": rows, "sort": sorted(rows), "tail": rows[-1:], "head": rows[:1]}[program]
    command = f"{program}{' -n 1' if program in ('tail', 'head') else ''} {source} > out.txt"
    broken = command.replace(program, TYPOS[program])

    def demonstrator() -> Demonstration:
        wrong = (yield "cat run.sh").split()[0]
        right = {typo: program for program, typo in TYPOS.items()}[wrong]
        yield f"sed -i s/{wrong}/{right}/ run.sh && bash run.sh"

    files = {source: lines(*rows), "run.sh": lines(broken)}
    instruction = draw.choose(
        "run.sh has a typo. Fix it and run it.",
        "There is a typo in run.sh. Fix the script and run it.",
    )
    return TaskDraft(
        instruction,
        files,
        [holds("run.sh", command), holds("out.txt", lines(*output)), *unchanged(files, "run.sh")],
        demonstrator,
    )


@family("path")
def path(draw: Draw) -> TaskDraft:
    real, wrong = draw.words(2)
    rows = draw.words(2)
    command = "sort {}.txt > out.txt"
    files = {f"{real}.txt": lines(*rows), "run.sh": lines(command.format(wrong))}

    def demonstrator() -> Demonstration:
        named = (yield "cat run.sh").split()[1].removesuffix(".txt")
        listed = (yield "ls").split()
        found = next(name for name in listed if name.endswith(".txt")).removesuffix(".txt")
        yield f"sed -i s/{named}/{found}/ run.sh && bash run.sh"

    checks = [
        holds("run.sh", command.format(real)),
        holds("out.txt", lines(*sorted(rows))),
        *unchanged(files, "run.sh"),
    ]
    return TaskDraft(
        "run.sh reads a missing file. Fix the name in it and run it.", files, checks, demonstrator
    )


@family("config")
def config(draw: Draw) -> TaskDraft:
    keys = draw.words(3)
    values = draw.rng.sample(range(1, 10), 3)
    key = draw.choose(*keys)
    new = draw.number(1, 9)
    old = values[keys.index(key)]
    new = new if new != old else new % 9 + 1
    text = lines(*(f"{name}={value}" for name, value in zip(keys, values, strict=True)))

    def demonstrator() -> Demonstration:
        setting = yield f"grep {key} app.conf"
        yield f"sed -i s/{setting}/{key}={new}/ app.conf"

    instruction = draw.choose(
        f"Set {key} in app.conf to {new}.", f"Change {key} in app.conf to {new}."
    )
    return TaskDraft(
        instruction,
        {"app.conf": text},
        [holds("app.conf", text.replace(f"{key}={old}", f"{key}={new}"))],
        demonstrator,
    )
