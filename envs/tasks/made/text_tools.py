"""Tasks with text tools: what a pipeline of standard commands does, told in words."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

from envs.tasks.made.draft import Case, Draft, run_program

WORDS = [
    "amber",
    "blue",
    "coral",
    "Dune",
    "ember",
    "fern",
    "Grey",
    "hazel",
    "iris",
    "jade",
    "khaki",
    "lime",
    "Mint",
    "navy",
    "olive",
]
CASES = 8
ROWS = 30


class Stage(NamedTuple):
    """A step of a pipeline: the command, its words, and what it does to lines."""

    command: str
    words: str
    apply: Callable[[list[str]], list[str]]


def make(seed: int) -> Draft:
    """Return the task of a seed."""
    rng = random.Random(f"text/{seed}")
    while True:  # until no outcome is empty and each stage makes a difference
        stages = _pipeline(rng)
        inputs = [_lines(rng, ROWS) for _ in range(CASES)]
        outcomes = [_run(stages, lines) for lines in inputs]
        if all(outcomes) and all(
            any(
                _run(others, lines) != outcome
                for lines, outcome in zip(inputs, outcomes, strict=True)
            )
            for others in ([*stages[:n], *stages[n + 1 :]] for n in range(len(stages)))
        ):
            break
    sample = _lines(rng, 8)
    steps = "\n".join(f"{number}. {stage.words}" for number, stage in enumerate(stages, 1))
    return Draft(
        name=f"text/pipeline-{seed}",
        domain="text",
        family="text-pipeline",
        language="shell",
        instruction=f"""\
Write the bash script /app/filter.sh. `bash filter.sh` reads lines from its standard input and \
prints others to its standard output. Lines have four fields separated by `:`, such as those of \
/app/sample.txt: two words, a number, a code. What it does, in this order:

{steps}

Upper case sorts before lower case (LC_ALL=C). For /app/sample.txt it prints

```
{chr(10).join(_run(stages, sample)) or "(nothing)"}
```

It is run on other lines of this form.""",
        program="filter.sh",
        oracle="export LC_ALL=C\n" + " | ".join(stage.command for stage in stages) + "\n",
        cases=[
            Case(
                run_program("shell", "filter.sh"),
                stdin="".join(f"{line}\n" for line in lines),
                stdout="\n".join(outcome),
            )
            for lines, outcome in zip(inputs, outcomes, strict=True)
        ],
        files={"sample.txt": "".join(f"{line}\n" for line in sample)},
        origin={"seed": seed},
    )


def _lines(rng: random.Random, count: int) -> list[str]:
    words = rng.sample(WORDS, 6)
    return [
        f"{rng.choice(words)}:{rng.choice(words)}:{rng.randint(1, 40)}:{rng.choice('abc')}"
        f"{rng.randint(0, 4)}"
        for _ in range(count)
    ]


def _run(stages: Sequence[Stage], lines: list[str]) -> list[str]:
    for stage in stages:
        lines = stage.apply(lines)
    return lines


def _pipeline(rng: random.Random) -> list[Stage]:
    """Return three to five stages: those on whole lines, a cut, those on what it left."""
    first = [rng.choice(WHOLE)(rng) for _ in range(rng.choice((1, 2)))]
    fields = sorted(rng.sample((1, 2, 3, 4), rng.choice((1, 2))))
    cut = Stage(
        f"cut -d: -f{','.join(map(str, fields))}",
        f"Keep only {'field' if len(fields) == 1 else 'fields'} {' and '.join(map(str, fields))}"
        " of each line (with the `:` between them).",
        lambda lines: [":".join(line.split(":")[n - 1] for n in fields) for line in lines],
    )
    last = [rng.choice(LEFT)(rng) for _ in range(rng.choice((1, 2)))]
    return [*first, cut, *last]


def _matching(rng: random.Random) -> Stage:
    letter = rng.choice("abc")
    keep = rng.random() < 0.5
    return Stage(
        f"grep {'' if keep else '-v '}':{letter}[0-9]$'",
        f"{'Keep' if keep else 'Drop'} the lines whose code begins with `{letter}`.",
        lambda lines: [line for line in lines if (line.split(":")[3][0] == letter) == keep],
    )


def _number(rng: random.Random) -> Stage:
    bound = rng.randint(8, 30)
    return Stage(
        f"awk -F: '$3 > {bound}'",
        f"Keep the lines whose number is more than {bound}.",
        lambda lines: [line for line in lines if int(line.split(":")[2]) > bound],
    )


def _sorted_lines(rng: random.Random) -> Stage:
    down = rng.random() < 0.5
    sign = -1 if down else 1
    return Stage(
        f"sort -t: -k3,3n{'r' if down else ''} -k1",
        f"Sort by the number, {'largest' if down else 'smallest'} first; lines with equal numbers"
        " by the whole line.",
        lambda lines: sorted(lines, key=lambda line: (sign * int(line.split(":")[2]), line)),
    )


def _skipped(rng: random.Random) -> Stage:
    count = rng.randint(2, 5)
    return Stage(
        f"tail -n+{count + 1}", f"Drop the first {count} lines.", lambda lines: lines[count:]
    )


def _counted(rng: random.Random) -> Stage:
    def count(lines: list[str]) -> list[str]:
        return [f"{lines.count(line)} {line}" for line in sorted(set(lines))]

    return Stage(
        "sort | uniq -c | sed 's/^ *//'",
        "Sort the lines, drop repeated ones, and write before each how often it was there and a"
        " space.",
        count,
    )


def _distinct(rng: random.Random) -> Stage:
    return Stage(
        "awk '!seen[$0]++'",
        "Drop each line that was there before; the first one stays where it is.",
        lambda lines: list(dict.fromkeys(lines)),
    )


def _upper(rng: random.Random) -> Stage:
    return Stage(
        "tr a-z A-Z", "Turn small letters into capitals.", lambda lines: [x.upper() for x in lines]
    )


def _numbered(rng: random.Random) -> Stage:
    start = rng.randint(1, 30)
    return Stage(
        f"awk '{{ print NR + {start - 1}, $0 }}'",
        f"Number the lines from {start}: the number and a space before each.",
        lambda lines: [f"{start + index} {line}" for index, line in enumerate(lines)],
    )


def _head(rng: random.Random) -> Stage:
    count = rng.randint(3, 6)
    return Stage(f"head -n{count}", f"Keep the first {count} lines.", lambda lines: lines[:count])


def _joined(rng: random.Random) -> Stage:
    sign = rng.choice(",;+")
    return Stage(
        f"paste -sd '{sign}'",
        f"Join all lines into one, with `{sign}` between them.",
        lambda lines: [sign.join(lines)] if lines else [],
    )


def _backwards(rng: random.Random) -> Stage:
    return Stage("tac", "Print the lines in reverse order.", lambda lines: lines[::-1])


WHOLE = (_matching, _number, _sorted_lines, _skipped)
LEFT = (_counted, _distinct, _upper, _numbered, _head, _joined, _backwards)
