"""A small store of records behind an API, made from a schema; stateful, one process a batch.

    python3 api.py < calls

reads JSON calls, one a line, from its standard input, prints the answer of each as a line of JSON,
and keeps its records in state.json:

    {"call": "schema"}
    {"call": "list", "kind": KIND, "where": {FIELD: VALUE}, "after": ID}
    {"call": "get", "kind": KIND, "id": ID}
    {"call": "create", "kind": KIND, "values": {FIELD: VALUE}}
    {"call": "update", "kind": KIND, "id": ID, "version": VERSION, "values": {FIELD: VALUE}}
    {"call": "delete", "kind": KIND, "id": ID}

`list` returns at most 5 records, those with the smallest ids above "after" (default 0). Each record
has an id and a version; an update must name the current version, and increases it. A record to
which another one refers cannot be deleted. An answer is {"ok": ...} or {"error": text}.
"""

import json
import sys

PAGE = 5


def handle(state, call):
    """Return the answer to one call; `state` is changed where the call succeeds."""
    try:
        if call["call"] == "schema":
            return {"ok": state["schema"]}
        records = state["records"][call["kind"]]
        return globals()["do_" + call["call"]](state, records, call)
    except (KeyError, TypeError, AttributeError) as error:
        return {"error": f"{type(error).__name__}: {error}"}


def do_list(state, records, call):
    """Return one page of the records that match."""
    found = []
    for record in records:
        matches = all(record[name] == value for name, value in call.get("where", {}).items())
        if matches and record["id"] > call.get("after", 0):
            found.append(record)
    return {"ok": sorted(found, key=lambda record: record["id"])[:PAGE]}


def do_get(state, records, call):
    """Return one record."""
    found = [record for record in records if record["id"] == call["id"]]
    return {"ok": found[0]} if found else {"error": f"no {call['kind']} {call['id']}"}


def do_create(state, records, call):
    """Add a record, and return it."""
    fields = state["schema"][call["kind"]]
    if set(call["values"]) != set(fields):
        return {"error": f"a {call['kind']} has {', '.join(fields)}"}
    if fault := wrong_value(state, fields, call["values"]):
        return {"error": fault}
    number = max((record["id"] for record in records), default=0) + 1
    record = {"id": number, "version": 1, **call["values"]}
    records.append(record)
    return {"ok": record}


def do_update(state, records, call):
    """Change a record, and return it."""
    found = do_get(state, records, call)
    if "error" in found:
        return found
    record = found["ok"]
    if call["version"] != record["version"]:
        return {"error": f"the version is {record['version']}"}
    fields = state["schema"][call["kind"]]
    if unknown := set(call["values"]) - set(fields):
        return {"error": f"no field {min(unknown)}"}
    if fault := wrong_value(state, fields, call["values"]):
        return {"error": fault}
    record.update(call["values"])
    record["version"] += 1
    return {"ok": record}


def do_delete(state, records, call):
    """Delete a record to which no other one refers."""
    found = do_get(state, records, call)
    if "error" in found:
        return found
    for kind, fields in state["schema"].items():
        for name, domain in fields.items():
            if domain == call["kind"]:
                for record in state["records"][kind]:
                    if record[name] == call["id"]:
                        return {"error": f"{kind} {record['id']} refers to it"}
    records.remove(found["ok"])
    return {"ok": call["id"]}


def wrong_value(state, fields, values):
    """Return what is wrong with values, or ""."""
    for name, value in values.items():
        domain = fields[name]
        if isinstance(domain, list):
            fits = value in domain
        elif domain == "integer":
            fits = isinstance(value, int)
        elif domain == "text":
            fits = isinstance(value, str)
        else:
            fits = any(record["id"] == value for record in state["records"][domain])
        if not fits:
            return f"{name} cannot be {value!r}"
    return ""


if __name__ == "__main__":
    with open("state.json") as file:
        current = json.load(file)
    for line in sys.stdin:
        print(json.dumps(handle(current, json.loads(line))), flush=True)
    with open("state.json", "w") as file:
        json.dump(current, file, indent=1, sort_keys=True)
