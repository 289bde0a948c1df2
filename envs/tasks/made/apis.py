"""Tasks in stateful API worlds: a store made from a schema, and a script that sets it in order.

The worlds differ in their schema, records and rules; `api_store` is the server of all of them.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import pathlib
import random
from typing import Any

from envs.tasks.made import api_store
from envs.tasks.made.draft import Case, Draft, run_program

SERVER = pathlib.Path(api_store.__file__).read_text()
# (owner, item, state field, states, number field, note)
SCHEMAS = {
    "library": ("reader", "loan", "status", ("out", "late", "back"), "days", "notice"),
    "shop": ("customer", "order", "status", ("open", "paid", "void"), "total", "message"),
    "clinic": ("patient", "visit", "phase", ("booked", "seen", "missed"), "minutes", "letter"),
    "garage": ("driver", "repair", "stage", ("waiting", "running", "done"), "cost", "call"),
    "museum": ("donor", "item", "place", ("store", "hall", "loan"), "value", "entry"),
    "airline": ("traveller", "ticket", "kind", ("held", "sold", "flown"), "miles", "mail"),
    "farm": ("grower", "crate", "grade", ("fresh", "ripe", "old"), "weight", "remark"),
    "hotel": ("guest", "stay", "state", ("booked", "current", "past"), "nights", "memo"),
}
LEVELS = ("basic", "gold", "staff")
NAMES = ["ash", "birch", "cedar", "elm", "fir", "hazel", "larch", "maple"]
CASES = 5
State = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Rules:
    """What a script must do to each store of its world."""

    world: str
    level: str  # of owners whose items are changed
    old: str
    new: str
    above: bool
    bound: int
    drop: str  # items in this state are deleted where their number is below `least`
    least: int
    notes: int  # an owner with so many changed items or more gets a note


def make(seed: int) -> Draft:
    """Return the task of a seed."""
    rng = random.Random(f"apis/{seed}")
    world = list(SCHEMAS)[seed % len(SCHEMAS)]
    old, new, drop = rng.sample(SCHEMAS[world][3], 3)
    rules = Rules(
        world=world,
        level=rng.choice(LEVELS),
        old=old,
        new=new,
        above=rng.random() < 0.5,
        bound=rng.randint(8, 14),
        drop=drop,
        least=rng.randint(6, 10),
        notes=rng.choice((2, 3)),
    )
    states = [_state(rng, rules, 18) for _ in range(CASES)]
    cases = [
        Case(
            run_program("python", "tidy.py"),
            files={"api.py": SERVER, "state.json": json.dumps(state)},
            left={"state.json": json.dumps(apply(rules, state), indent=1, sort_keys=True)},
        )
        for state in states
    ]
    return Draft(
        name=f"apis/{world}-{seed}",
        domain="apis",
        family="apis-store",
        language="python",
        instruction=_instruction(rules),
        program="tidy.py",
        oracle=_oracle(rules),
        cases=cases,
        files={"api.py": SERVER, "state.json": json.dumps(_state(rng, rules, 8), indent=1)},
        origin={"seed": seed},
    )


def _state(rng: random.Random, rules: Rules, items: int) -> State:
    owner, item, field, states, number, note = SCHEMAS[rules.world]
    owners = [
        {"id": index, "version": rng.randint(1, 3), "name": name, "level": rng.choice(LEVELS)}
        for index, name in enumerate(rng.sample(NAMES, 7), 1)
    ]
    owners[0]["level"] = rules.level
    owners[3]["level"] = rules.level
    records = [
        {
            "id": index,
            "version": rng.randint(1, 3),
            owner: rng.choice((1, 4, rng.randint(1, 7))),
            field: rng.choice((rules.old, *states)),
            number: rng.randint(5, 15),
        }
        for index in range(1, items + 1)
    ]
    schema = {
        owner: {"name": "text", "level": list(LEVELS)},
        item: {owner: owner, field: list(states), number: "integer"},
        note: {owner: owner, number: "integer"},
    }
    return {"schema": schema, "records": {owner: owners, item: records, note: []}}


def apply(rules: Rules, state: State) -> State:
    """Return the state that a correct script leaves."""
    owner, item, field, _, number, note = SCHEMAS[rules.world]
    state = copy.deepcopy(state)
    records = state["records"]
    levels = {one["id"]: one["level"] for one in records[owner]}
    changed: dict[int, list[int]] = {}
    kept = []
    for one in records[item]:
        if one[field] == rules.drop and one[number] < rules.least:
            continue
        kept.append(one)
        fits = one[number] > rules.bound if rules.above else one[number] < rules.bound
        if one[field] == rules.old and fits and levels[one[owner]] == rules.level:
            one[field] = rules.new
            one["version"] += 1
            changed.setdefault(one[owner], []).append(one[number])
    records[item] = kept
    for key in sorted(changed):
        if len(changed[key]) >= rules.notes:
            values = {owner: key, number: sum(changed[key])}
            records[note].append({"id": len(records[note]) + 1, "version": 1, **values})
    return state


def _instruction(rules: Rules) -> str:
    owner, item, field, _, number, note = SCHEMAS[rules.world]
    side = "more" if rules.above else "less"
    return f"""\
/app/api.py is the API of a {rules.world}: it keeps its records in state.json of the working \
directory, and its own text explains its calls. Write the Python program /app/tidy.py. `python3 \
tidy.py` is run in a folder with api.py and a state.json, and sets the records in order by calls \
of `python3 api.py`:

1. Each `{item}` whose `{field}` is `{rules.old}`, whose `{number}` is {side} than {rules.bound} \
and whose {owner} has the level `{rules.level}` gets the `{field}` `{rules.new}`.
2. Each {owner} with {rules.notes} or more changed `{item}` records gets one new `{note}` whose \
`{number}` is the sum of theirs; in the order of the {owner}s' ids.
3. Each `{item}` whose `{field}` is `{rules.drop}` and whose `{number}` is less than \
{rules.least} is deleted. One that step 1 changed stays.

Nothing else changes, and no record is written twice. The program is run on other records of the \
same schema; state.json is compared afterwards."""


def _oracle(rules: Rules) -> str:
    owner, item, field, _, number, note = SCHEMAS[rules.world]
    sign = ">" if rules.above else "<"
    return f"""\
import json
import subprocess


def ask(calls):
    text = "".join(json.dumps(call) + "\\n" for call in calls)
    run = subprocess.run(["python3", "api.py"], input=text, capture_output=True, text=True)
    return [json.loads(line)["ok"] for line in run.stdout.splitlines()]


def list_all(kind):
    pages = range(0, 60, 5)  # ids are dense when the store is made
    calls = [{{"call": "list", "kind": kind, "after": start}} for start in pages]
    return {{one["id"]: one for page in ask(calls) for one in page}}


owners = list_all("{owner}")
items = list_all("{item}")
calls = []
changed = {{}}
for one in items.values():
    owner = one["{owner}"]
    if one["{field}"] == "{rules.old}" and one["{number}"] {sign} {rules.bound}:
        if owners[owner]["level"] == "{rules.level}":
            values = {{"{field}": "{rules.new}"}}
            change = {{"id": one["id"], "version": one["version"], "values": values}}
            calls.append({{"call": "update", "kind": "{item}", **change}})
            changed.setdefault(owner, []).append(one["{number}"])
    if one["{field}"] == "{rules.drop}" and one["{number}"] < {rules.least}:
        calls.append({{"call": "delete", "kind": "{item}", "id": one["id"]}})
for owner, numbers in sorted(changed.items()):
    if len(numbers) >= {rules.notes}:
        values = {{"{owner}": owner, "{number}": sum(numbers)}}
        calls.append({{"call": "create", "kind": "{note}", "values": values}})
ask(calls)
"""
