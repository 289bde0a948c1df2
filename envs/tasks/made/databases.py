"""Tasks on SQLite databases: a query over two tables, or statements that change them."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

from envs.tasks.made.draft import Case, Draft

# (parents, children, number of a child, states of a child, region of a parent)
THEMES = {
    "shop": ("customers", "orders", "amount", ("open", "paid", "lost"), "city"),
    "library": ("readers", "loans", "days", ("out", "back", "late"), "branch"),
    "clinic": ("doctors", "visits", "minutes", ("planned", "done", "missed"), "ward"),
    "fleet": ("trucks", "trips", "km", ("queued", "moving", "ended"), "depot"),
    "school": ("pupils", "tests", "points", ("set", "marked", "void"), "form"),
    "farm": ("fields", "jobs", "hours", ("due", "doing", "finished"), "estate"),
}
NAMES = ["ash", "birch", "cedar", "elm", "fir", "hazel", "larch", "maple", "oak", "pine"]
REGIONS = ["north", "south", "east", "west"]
FIGURES = {
    "COUNT": "the number of those {children}",
    "SUM": "the sum of their `{number}`",
    "MAX": "the largest `{number}` among them",
    "MIN": "the smallest `{number}` among them",
}
# Runs an SQL file on the database that data.sql makes, and prints the rows.
RUNNER = """\
import sqlite3, sys
db = sqlite3.connect(":memory:")
db.executescript(open("data.sql").read())
text = open(sys.argv[1]).read()
if len(sys.argv) == 2:
    rows = db.execute(text)
else:
    db.executescript(text)
    rows = db.execute(sys.argv[2])
for row in rows:
    print("|".join("" if value is None else str(value) for value in row))
"""
CASES = 8


@dataclasses.dataclass(frozen=True)
class World:
    """The rows of a database: parents (id, name, region), children (id, parent, number, state)."""

    parents: list[tuple[int, str, str]]
    children: list[tuple[int, int, int, str]]


def make(seed: int) -> Draft:
    """Return the task of a seed."""
    rng = random.Random(f"databases/{seed}")
    theme = rng.choice(list(THEMES))
    spec = _query(rng, theme) if seed % 2 else _change(rng, theme)
    worlds = [_world(rng, theme, 8, 60) for _ in range(CASES)]
    sample = _world(rng, theme, 3, 8)
    program = spec["program"]
    argv = ("python3", "-c", RUNNER, f"{{app}}/{program}", *spec["shown"])
    cases = [
        Case(argv, files={"data.sql": _dump(theme, world)}, stdout=spec["answer"](world))
        for world in worlds
    ]
    parents, children, number, states, region = THEMES[theme]
    return Draft(
        name=f"databases/{spec['kind']}-{theme}-{seed}",
        domain="databases",
        family=f"databases-{spec['kind']}",
        language="sql",
        instruction=f"""\
/app/data.sql holds a small example of an SQLite database of a {theme}: `{parents}` (id, name, \
{region}) and `{children}` (id, parent, {number}, state), where `parent` is the id of one of the \
`{parents}`. A state is {", ".join(states[:-1])} or {states[-1]}.

{spec["words"]}

It is run by SQLite (3.34 or newer) on other databases of this schema. For the example the outcome \
is (fields separated by `|`)

```
{spec["answer"](sample) or "(nothing)"}
```""",
        program=program,
        oracle=spec["oracle"],
        cases=cases,
        files={"data.sql": _dump(theme, sample)},
        origin={"seed": seed},
    )


def _world(rng: random.Random, theme: str, parents: int, children: int) -> World:
    states = THEMES[theme][3]
    names = rng.sample(NAMES, parents)
    return World(
        [(number + 1, name, rng.choice(REGIONS)) for number, name in enumerate(names)],
        [
            (number + 1, rng.randint(1, parents + 1), rng.randint(0, 12), rng.choice(states))
            for number in range(children)
        ],
    )


def _dump(theme: str, world: World) -> str:
    parents, children, number, _, region = THEMES[theme]
    lines = [
        f"CREATE TABLE {parents} (id INTEGER PRIMARY KEY, name TEXT, {region} TEXT);",
        f"CREATE TABLE {children} (id INTEGER PRIMARY KEY, parent INTEGER, {number} INTEGER,"
        " state TEXT);",
    ]
    lines += [f"INSERT INTO {parents} VALUES ({i}, '{n}', '{r}');" for i, n, r in world.parents]
    lines += [
        f"INSERT INTO {children} VALUES ({i}, {p}, {n}, '{s}');" for i, p, n, s in world.children
    ]
    return "\n".join(lines) + "\n"


def _query(rng: random.Random, theme: str) -> dict[str, Any]:
    """Return a query: figures of each parent or region over children of some states."""
    parents, children, number, states, region = THEMES[theme]
    chosen = sorted(rng.sample(states, rng.choice((1, 2))))
    least = rng.randint(1, 5)
    figures = rng.sample(list(FIGURES), 2)
    by_region = rng.random() < 0.5
    having = rng.randint(2, 3)
    descending = rng.random() < 0.5
    top = rng.choice((0, 2)) if by_region else rng.choice((0, 2, 3))

    def answer(world: World) -> str:
        keys = {i: (r if by_region else n) for i, n, r in world.parents}
        groups: dict[str, list[int]] = {}
        for _, parent, value, state in world.children:
            if parent in keys and state in chosen and value >= least:
                groups.setdefault(keys[parent], []).append(value)
        compute = {"COUNT": len, "SUM": sum, "MAX": max, "MIN": min}
        rows = [
            (key, *(compute[name](values) for name in figures))
            for key, values in groups.items()
            if len(values) >= having
        ]
        rows.sort(reverse=True)
        rows.sort(key=lambda row: (-1 if descending else 1) * row[1])
        return "\n".join("|".join(map(str, row)) for row in rows[: top or None])

    key = region if by_region else "name"
    listed = ", ".join(f"'{state}'" for state in chosen)
    columns = ", ".join(f"{name}(c.{number})" for name in figures)
    oracle = (
        f"SELECT p.{key}, {columns}\nFROM {parents} p JOIN {children} c ON c.parent = p.id\n"
        f"WHERE c.state IN ({listed}) AND c.{number} >= {least}\nGROUP BY p.{key}\n"
        f"HAVING COUNT(*) >= {having}\nORDER BY 2 {'DESC' if descending else 'ASC'}, 1 DESC"
        + (f"\nLIMIT {top}" if top else "")
        + "\n"
    )
    told = ", then ".join(
        FIGURES[name].format(children=children, number=number) for name in figures
    )
    words = (
        f"Write /app/query.sql, one SELECT. Take the {children} whose state is"
        f" {' or '.join(chosen)} and whose `{number}` is {least} or more. Return a row for each"
        f" {region if by_region else 'name'} of their {parents} that has at least {having} of them:"
        f" the {key}, then {told}. Sort by the second column, "
        f"{'largest' if descending else 'smallest'} first, then by the first column, Z before A."
        + (f" Return the first {top} rows only." if top else "")
        + f" {children.capitalize()} whose parent is missing do not count."
    )
    return {
        "kind": "query",
        "program": "query.sql",
        "shown": (),
        "words": words,
        "oracle": oracle,
        "answer": answer,
    }


def _change(rng: random.Random, theme: str) -> dict[str, Any]:
    """Return statements that drop orphans, move states and add to numbers."""
    parents, children, number, states, region = THEMES[theme]
    old, new = rng.sample(states, 2)
    place = rng.choice(REGIONS[:3])
    bound = rng.randint(4, 8)
    bonus = rng.randint(2, 9)
    last = rng.choice(states)
    is_high = rng.random() < 0.5

    def answer(world: World) -> str:
        regions = {i: r for i, _, r in world.parents}
        rows = []
        for i, parent, value, state in world.children:
            if parent not in regions:
                continue
            if state == old and (value > bound if is_high else value < bound):
                state = new
            if regions[parent] == place and state == last:
                value += bonus
            rows.append(f"{i}|{parent}|{value}|{state}")
        return "\n".join(rows)

    sign = ">" if is_high else "<"
    oracle = (
        f"DELETE FROM {children} WHERE parent NOT IN (SELECT id FROM {parents});\n"
        f"UPDATE {children} SET state = '{new}' WHERE state = '{old}'"
        f" AND {number} {sign} {bound};\n"
        f"UPDATE {children} SET {number} = {number} + {bonus}\nWHERE state = '{last}'"
        f" AND parent IN (SELECT id FROM {parents} WHERE {region} = '{place}');\n"
    )
    words = (
        f"Write /app/change.sql, statements that change the {children}, in this order: (1) delete"
        f" those whose parent is missing; (2) those of state {old} whose `{number}` is"
        f" {'more' if is_high else 'less'} than {bound} get state {new}; (3) add {bonus} to the"
        f" `{number}` of those that have state {last} then and whose parent's {region} is {place}."
        f" Afterwards `SELECT * FROM {children} ORDER BY id` is compared."
    )
    return {
        "kind": "change",
        "program": "change.sql",
        "shown": (f"SELECT * FROM {children} ORDER BY id",),
        "words": words,
        "oracle": oracle,
        "answer": answer,
    }
