"""Tasks on tables: filter, group and sort the rows of a CSV file, in Python or JavaScript."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Sequence

from envs.tasks.made.draft import Case, Draft, run_program

THEMES = {
    "orders": ("customer", "city", "amount", "items"),
    "parcels": ("carrier", "depot", "grams", "days"),
    "trips": ("driver", "zone", "metres", "minutes"),
    "readings": ("sensor", "room", "value", "battery"),
    "loans": ("branch", "reader", "days", "renewals"),
    "harvests": ("field", "crop", "crates", "workers"),
}
NAMES = [
    "ash",
    "birch",
    "cedar",
    "elm",
    "fir",
    "hazel",
    "larch",
    "maple",
    "oak",
    "pine",
    "rowan",
    "willow",
]
PLACES = ["north", "south", "east", "west", "centre", "harbour"]
COMPARED = {">=": "at least", "<=": "at most", ">": "more than", "<": "less than"}
AGGREGATES = {
    "count": "the number of rows",
    "sum": "the sum of `{0}`",
    "max": "the largest `{0}`",
    "min": "the smallest `{0}`",
    "mean": "the mean of `{0}`, rounded down to a whole number",
    "distinct": "the number of different values of `{1}`",
}
ROWS = 40  # of a hidden table


@dataclasses.dataclass(frozen=True)
class Report:
    """What a program must print: the rows' groups and their figures.

    Attributes:
      theme: a key of THEMES; columns are (key, other key, number, other number).
      compare: of the filter, a key of COMPARED.
      bound: that the filter compares the other number with.
      aggregates: of each group, keys of AGGREGATES.
      order: 1 sorts by the last figure, smallest first; -1 largest first; 0 by the group alone.
      top: number of groups printed; 0 for all.
      style: "csv", "tsv" or "json".
    """

    theme: str
    compare: str
    bound: int
    aggregates: tuple[str, ...]
    order: int
    top: int
    style: str


def make(seed: int) -> Draft:
    """Return the task of a seed."""
    rng = random.Random(f"tables/{seed}")
    order = rng.choice((-1, 1, 0))
    report = Report(
        theme=rng.choice(list(THEMES)),
        compare=rng.choice(list(COMPARED)),
        bound=rng.randint(3, 6),
        aggregates=tuple(rng.sample(list(AGGREGATES), rng.choice((2, 2, 3)))),
        order=order,
        top=rng.choice((0, 2, 3, 4)),
        style=rng.choice(("csv", "tsv", "json")),
    )
    language = rng.choice(("python", "javascript"))
    program = "report.py" if language == "python" else "report.js"
    texts = [_table(report, rng, ROWS) for _ in range(9)] + [_table(report, rng, 0)]
    cases = [
        Case(
            run_program(language, program, f"{report.theme}.csv"),
            files={f"{report.theme}.csv": text},
            stdout=evaluate(report, text),
        )
        for text in texts
    ]
    sample = _table(report, rng, 8)
    return Draft(
        name=f"tables/{report.theme}-{seed}",
        domain="data",
        family="tables",
        language=language,
        instruction=_instruction(report, program, sample),
        program=program,
        oracle=_python(report) if language == "python" else _javascript(report),
        cases=cases,
        files={f"{report.theme}.csv": sample},
        origin={"seed": seed},
    )


def _table(report: Report, rng: random.Random, rows: int) -> str:
    lines = [",".join(THEMES[report.theme])]
    keys = rng.sample(NAMES, 6)
    for _ in range(rows):
        number = "" if rng.random() < 0.1 else str(rng.randint(0, 30))
        lines.append(f"{rng.choice(keys)},{rng.choice(PLACES)},{number},{rng.randint(1, 9)}")
    return "\n".join(lines) + "\n"


def evaluate(report: Report, text: str) -> str:
    """Return what a correct program prints for a table."""
    groups: dict[str, list[tuple[int, str]]] = {}
    for line in text.splitlines()[1:]:
        key, place, number, other = line.split(",")
        kept = {
            ">=": int(other) >= report.bound,
            "<=": int(other) <= report.bound,
            ">": int(other) > report.bound,
            "<": int(other) < report.bound,
        }[report.compare]
        if number and kept:
            groups.setdefault(key, []).append((int(number), place))
    table = [
        (key, *(_figure(name, rows) for name in report.aggregates)) for key, rows in groups.items()
    ]
    table.sort(key=lambda row: (report.order * row[-1], row[0]))
    table = table[: report.top or None]
    if report.style == "json":
        return json.dumps([list(row) for row in table], separators=(",", ":"))
    separator = "," if report.style == "csv" else "\t"
    return "\n".join(separator.join(map(str, row)) for row in table)


def _figure(name: str, rows: Sequence[tuple[int, str]]) -> int:
    numbers = [number for number, _ in rows]
    return {
        "count": len(numbers),
        "sum": sum(numbers),
        "max": max(numbers),
        "min": min(numbers),
        "mean": sum(numbers) // len(numbers),
        "distinct": len({place for _, place in rows}),
    }[name]


def _instruction(report: Report, program: str, sample: str) -> str:
    key, place, number, other = THEMES[report.theme]
    figures = ", ".join(AGGREGATES[name].format(number, place) for name in report.aggregates)
    order = {
        1: f"by the last of these figures, smallest first, and by `{key}` where it is equal",
        -1: f"by the last of these figures, largest first, and by `{key}` where it is equal",
        0: f"by `{key}`",
    }[report.order]
    top = f" Print only the first {report.top} groups." if report.top else ""
    style = {
        "csv": "one group a line, its fields separated by commas, without a header",
        "tsv": "one group a line, its fields separated by tabs, without a header",
        "json": "one line of JSON without spaces: a list with a list of each group's fields",
    }[report.style]
    run = "python3" if program.endswith(".py") else "node"
    return f"""\
Write {APP_PROGRAM.format(program)}. `{run} {program} {report.theme}.csv` reads a CSV file such as \
/app/{report.theme}.csv (a header line; fields hold no commas and no quotes) and prints a report \
to its standard output.

Rows whose `{number}` is empty do not count, nor do rows whose `{other}` is not \
{COMPARED[report.compare]} {report.bound}. Group the others by `{key}`. Of each group print \
`{key}`, {figures}; sorted {order}.{top} Print {style}. \
Fields are printed in the order of this text.

For the file in /app this is

```
{evaluate(report, sample)}
```

The program is run on other files of the same columns, among them one without rows."""


APP_PROGRAM = "the program /app/{}"


def _python(report: Report) -> str:
    key, place, number, other = THEMES[report.theme]
    figures = {
        "count": "len(rows)",
        "sum": "sum(rows)",
        "max": "max(rows)",
        "min": "min(rows)",
        "mean": "sum(rows) // len(rows)",
        "distinct": "len(places[key])",
    }
    chosen = ", ".join(figures[name] for name in report.aggregates)
    sign = {1: "row[-1], ", -1: "-row[-1], ", 0: ""}[report.order]
    top = f"table = table[:{report.top}]\n" if report.top else ""
    if report.style == "json":
        shown = "import json\nprint(json.dumps(table, separators=(',', ':')))\n"
    else:
        separator = '","' if report.style == "csv" else '"\\t"'
        shown = f"for row in table:\n    print(*row, sep={separator})\n"
    has_places = "distinct" in report.aggregates
    start = "places = {}\n" if has_places else ""
    adds = f'        places.setdefault(row["{key}"], set()).add(row["{place}"])\n'
    places = adds if has_places else ""
    return f"""\
import csv
import sys

groups = {{}}
{start}for row in csv.DictReader(open(sys.argv[1])):
    if row["{number}"] and int(row["{other}"]) {report.compare} {report.bound}:
        groups.setdefault(row["{key}"], []).append(int(row["{number}"]))
{places}table = [(key, {chosen}) for key, rows in groups.items()]
table.sort(key=lambda row: ({sign}row[0]))
{top}{shown}"""


def _javascript(report: Report) -> str:
    figures = {
        "count": "rows.length",
        "sum": "rows.reduce((a, b) => a + b, 0)",
        "max": "Math.max(...rows)",
        "min": "Math.min(...rows)",
        "mean": "Math.floor(rows.reduce((a, b) => a + b, 0) / rows.length)",
        "distinct": "places.get(key).size",
    }
    chosen = ", ".join(figures[name] for name in report.aggregates)
    first = {1: "a.at(-1) - b.at(-1) || ", -1: "b.at(-1) - a.at(-1) || ", 0: ""}[report.order]
    top = f".slice(0, {report.top})" if report.top else ""
    if report.style == "json":
        shown = "console.log(JSON.stringify(table));"
    else:
        separator = "," if report.style == "csv" else "\\t"
        shown = f"for (const row of table) console.log(row.join('{separator}'));"
    has_places = "distinct" in report.aggregates
    start = "const places = new Map();\n" if has_places else ""
    adds = "  places.set(key, (places.get(key) ?? new Set()).add(place));\n"
    places = adds if has_places else ""
    return f"""\
const text = require('fs').readFileSync(process.argv[2], 'utf8');
const lines = text.trim().split('\\n').slice(1);
const groups = new Map();
{start}for (const line of lines) {{
  const [key, place, number, other] = line.split(',');
  if (number === '' || !(Number(other) {report.compare} {report.bound})) continue;
  groups.set(key, [...(groups.get(key) ?? []), Number(number)]);
{places}}}
const table = [...groups].map(([key, rows]) => [key, {chosen}])
  .sort((a, b) => {first}a[0].localeCompare(b[0])){top};
{shown}
"""
