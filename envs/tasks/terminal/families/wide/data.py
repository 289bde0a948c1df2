"""Wide families about records: CSV, JSON, SQLite and access logs; sums, joins, filters, tables."""

from __future__ import annotations

import json
import statistics

from envs.tasks.terminal import checks
from envs.tasks.terminal.registry import wide_family, write_file
from envs.tasks.terminal.task import Demonstration, Draw, TaskDraft, holds, lines, unchanged


def _python(*rows: str) -> str:
    return "python3 - <<'END'\n" + "\n".join(rows) + "\nEND"


def _records(draw: Draw, count: int) -> list[tuple[str, str, int]]:
    """Draw records (item, group, amount) in which groups repeat."""
    groups = draw.words(3)
    return [
        (draw.word(), group, draw.number(2, 60))
        for group in (*groups, *(draw.rng.choice(groups) for _ in range(count - 3)))
    ]


@wide_family("group_sum", "data", 2, "awk")
def group_sum(draw: Draw) -> TaskDraft:
    source = draw.word() + ".csv"
    rows = _records(draw, 9)
    totals: dict[str, int] = {}
    for _, group, amount in rows:
        totals[group] = totals.get(group, 0) + amount

    def demonstrator() -> Demonstration:
        yield f"head -n 3 {source}"
        yield (
            f"awk -F, 'NR > 1 {{ s[$2] += $3 }} END {{ for (g in s) print g \",\" s[g] }}' {source}"
            " | sort > out.txt"
        )

    text = lines("item,group,amount", *(f"{item},{group},{amount}" for item, group, amount in rows))
    instruction = (
        f"For each group in {source} add up the amounts. Write lines group,total to out.txt, in"
        " alphabetical order, without a header."
    )
    return TaskDraft(
        instruction,
        {source: text},
        [holds("out.txt", lines(*(f"{group},{total}" for group, total in sorted(totals.items()))))],
        demonstrator,
    )


@wide_family("join_tables", "data", 4, "python3")
def join_tables(draw: Draw) -> TaskDraft:
    names = draw.words(4)
    ids = draw.rng.sample(range(100, 999), 4)
    amounts = {name: draw.rng.sample(range(1, 50), draw.number(1, 3)) for name in names}
    orders = draw.shuffled(
        [
            f"{identity},{amount}"
            for identity, name in zip(ids, names, strict=True)
            for amount in amounts[name]
        ]
    )
    ranked = sorted(names, key=lambda name: (-sum(amounts[name]), name))
    files = {
        "users.csv": lines("id,name", *(f"{i},{n}" for i, n in zip(ids, names, strict=True))),
        "orders.csv": lines("user,amount", *orders),
    }

    def demonstrator() -> Demonstration:
        yield "head -n 3 users.csv orders.csv"
        yield _python(
            "import csv",
            "names = {row['id']: row['name'] for row in csv.DictReader(open('users.csv'))}",
            "totals = {}",
            "for row in csv.DictReader(open('orders.csv')):",
            "    name = names[row['user']]",
            "    totals[name] = totals.get(name, 0) + int(row['amount'])",
            "with open('out.csv', 'w') as out:",
            "    print('name,total', file=out)",
            "    for name, total in sorted(totals.items(), key=lambda pair: (-pair[1], pair[0])):",
            "        print(f'{name},{total}', file=out)",
        )

    answer = lines("name,total", *(f"{name},{sum(amounts[name])}" for name in ranked))
    instruction = (
        "orders.csv names users by their id in users.csv. Write out.csv with the header name,total:"
        " each user's sum of amounts, largest first, equal ones by name."
    )
    return TaskDraft(
        instruction, files, [holds("out.csv", answer), *unchanged(files)], demonstrator
    )


@wide_family("json_filter", "data", 3, "python3")
def json_filter(draw: Draw) -> TaskDraft:
    source = draw.word() + ".json"
    colours = draw.words(2)
    limit = draw.number(30, 60)
    people = [
        {"name": draw.word(), "team": {"name": draw.choose(*colours)}, "age": draw.number(20, 70)}
        for _ in range(7)
    ]
    people += [
        {"name": draw.word(), "team": {"name": colours[0]}, "age": limit + 1},
        {"name": draw.word(), "team": {"name": colours[0]}, "age": limit},
    ]
    answer = sorted(
        one["name"] for one in people if one["age"] > limit and one["team"]["name"] == colours[0]
    )

    def demonstrator() -> Demonstration:
        yield f"head -n 8 {source}"
        test = f"one['age'] > {limit} and one['team']['name'] == '{colours[0]}'"
        yield _python(
            "import json",
            f"rows = json.load(open('{source}'))",
            f"print(*sorted(one['name'] for one in rows if {test}), sep='\\n', file=open('out.txt',"
            " 'w'))",
        )

    instruction = (
        f"Write the names of all people in {source} who are older than {limit} and in team"
        f" {colours[0]} to out.txt, in alphabetical order, one a line."
    )
    return TaskDraft(
        instruction,
        {source: json.dumps(people, indent=1) + "\n"},
        [holds("out.txt", lines(*answer))],
        demonstrator,
    )


@wide_family("json_set", "data", 3, "python3")
def json_set(draw: Draw) -> TaskDraft:
    outer, inner, other = draw.words(3)
    settings = {
        outer: {inner: draw.number(1, 50), other: [draw.word(), draw.word()]},
        other: {inner: draw.number(1, 50)},
    }
    new = draw.number(51, 99)
    item = draw.word()
    changed = {outer: {inner: new, other: [*settings[outer][other], item]}, other: settings[other]}

    def demonstrator() -> Demonstration:
        yield "cat settings.json"
        yield _python(
            "import json",
            "s = json.load(open('settings.json'))",
            f"s['{outer}']['{inner}'] = {new}",
            f"s['{outer}']['{other}'].append('{item}')",
            "json.dump(s, open('settings.json', 'w'), indent=2)",
        )

    instruction = (
        f'In settings.json, under {outer}, set {inner} to {new} and add "{item}" at the end of the'
        f" list {other}. Change nothing else."
    )
    return TaskDraft(
        instruction,
        {"settings.json": json.dumps(settings, indent=2) + "\n"},
        [checks.json_holds("settings.json", changed)],
        demonstrator,
    )


@wide_family("sqlite_report", "data", 4, "python3")
def sqlite_report(draw: Draw) -> TaskDraft:
    rows = _records(draw, 10)
    totals: dict[str, list[int]] = {}
    for _, group, amount in rows:
        totals.setdefault(group, []).append(amount)
    setup = _python(
        "import sqlite3",
        "base = sqlite3.connect('shop.db')",
        "base.execute('create table sales (item text, shop text, amount integer)')",
        f"base.executemany('insert into sales values (?, ?, ?)', {rows!r})",
        "base.commit()",
    )

    def demonstrator() -> Demonstration:
        yield (
            "python3 -c \"import sqlite3; print(sqlite3.connect('shop.db').execute('select sql from"
            " sqlite_master').fetchall())\""
        )
        query = "select shop, count(*), max(amount) from sales group by shop order by shop"
        yield _python(
            "import sqlite3",
            "out = open('out.txt', 'w')",
            f"for row in sqlite3.connect('shop.db').execute('{query}'):",
            "    print(*row, file=out)",
        )

    answer = lines(
        *(f"{shop} {len(amounts)} {max(amounts)}" for shop, amounts in sorted(totals.items()))
    )
    instruction = (
        "shop.db is an SQLite database. For each shop in its table sales write a line to out.txt:"
        " shop, number of sales, largest amount; by name of the shop."
    )
    return TaskDraft(
        instruction,
        {"readme.txt": lines("shop.db: sales by item, shop and amount")},
        [holds("out.txt", answer)],
        demonstrator,
        setup=setup,
    )


@wide_family("access_log", "data", 3, "awk")
def access_log(draw: Draw) -> TaskDraft:
    source = draw.word() + ".log"
    paths = draw.words(4)
    code = draw.number(500, 504)
    most = draw.number(4, 9)
    counts = [most, most - draw.number(1, 3), 2, 1]
    rows = [
        f'10.0.0.{draw.number(1, 9)} - - [05/Mar/2024] "GET /{path} HTTP/1.1" {code}'
        f" {draw.number(100, 999)}"
        for path, count in zip(paths, counts, strict=True)
        for _ in range(count)
    ]
    rows += [
        f'10.0.0.{draw.number(1, 9)} - - [05/Mar/2024] "GET /{draw.choose(*paths[1:])} HTTP/1.1"'
        f" 200 {code}"
        for _ in range(12)
    ]

    def demonstrator() -> Demonstration:
        yield f"head -n 2 {source}"
        ranked = (
            yield (
                f"awk '$8 == {code} {{ print $6 }}' {source} | sort | uniq -c | sort -nr | head"
                " -n 1"
            )
        ).split()
        yield f"echo {ranked[1]} {ranked[0]} > out.txt"

    instruction = (
        f"Which path in {source} was answered with status {code} most often? Write the path and the"
        " number of times to out.txt, separated by a space."
    )
    return TaskDraft(
        instruction,
        {source: lines(*draw.shuffled(rows))},
        [holds("out.txt", f"/{paths[0]} {most}")],
        demonstrator,
    )


@wide_family("jsonl_to_csv", "data", 3, "python3")
def jsonl_to_csv(draw: Draw) -> TaskDraft:
    keys = draw.words(3)
    records = [
        {key: draw.choose(draw.word(), str(draw.number(1, 99))) for key in keys} for _ in range(5)
    ]
    for record in records[1:3]:
        del record[draw.choose(*keys)]

    def demonstrator() -> Demonstration:
        yield "head -n 3 rows.jsonl"
        yield _python(
            "import csv, json",
            "rows = [json.loads(line) for line in open('rows.jsonl')]",
            f"out = csv.DictWriter(open('rows.csv', 'w', newline=''), {keys!r}, restval='',"
            " lineterminator='\\n')",
            "out.writeheader()",
            "out.writerows(rows)",
        )

    answer = lines(
        ",".join(keys), *(",".join(record.get(key, "") for key in keys) for record in records)
    )
    instruction = (
        f"Convert rows.jsonl to rows.csv with the columns {', '.join(keys)} and a header. A value"
        " that is missing becomes an empty field."
    )
    return TaskDraft(
        instruction,
        {"rows.jsonl": lines(*map(json.dumps, records))},
        [holds("rows.csv", answer)],
        demonstrator,
    )


@wide_family("rejects", "data", 3, "awk")
def rejects(draw: Draw) -> TaskDraft:
    source = draw.word() + ".csv"
    good = [f"{draw.word()},{draw.number(1, 999)},{draw.word()}" for _ in range(6)]
    bad = [
        f"{draw.word()},{draw.word()},{draw.word()}",
        f"{draw.word()},{draw.number(1, 9)}",
        f"{draw.word()},{draw.number(1, 9)},{draw.word()},{draw.word()}",
        f"{draw.word()},,{draw.word()}",
    ]
    rows = draw.shuffled(good + bad)

    def demonstrator() -> Demonstration:
        yield f"cat {source}"
        test = "NF == 3 && $2 ~ /^[0-9]+$/"
        yield f"awk -F, '{test}' {source} > good.csv && awk -F, '!({test})' {source} > bad.csv"

    found = [
        holds("good.csv", lines(*(row for row in rows if row in good))),
        holds("bad.csv", lines(*(row for row in rows if row in bad))),
        holds(source, lines(*rows)),
    ]
    instruction = (
        f"A good line of {source} has three fields, and the second is a whole number. Copy the good"
        " lines to good.csv and the others to bad.csv, in order."
    )
    return TaskDraft(instruction, {source: lines(*rows)}, found, demonstrator)


@wide_family("pivot", "data", 5, "python3")
def pivot(draw: Draw) -> TaskDraft:
    products = sorted(draw.words(3))
    year = draw.number(2019, 2026)
    first = draw.number(1, 10)
    months = [f"{year}-{month:02d}" for month in range(first, first + 3)]
    cells = {(product, month): draw.number(0, 3) for product in products for month in months}
    rows = [
        f"{month}-{draw.number(1, 28):02d},{product}"
        for (product, month), count in cells.items()
        for _ in range(count)
    ]
    for product in products:  # every product occurs
        rows.append(f"{months[0]}-05,{product}")
        cells[product, months[0]] += 1

    def demonstrator() -> Demonstration:
        yield "head -n 3 sales.csv"
        yield write_file(
            "pivot.py",
            lines(
                "import collections, csv",
                "rows = list(csv.DictReader(open('sales.csv')))",
                "count = collections.Counter((row['product'], row['date'][:7]) for row in rows)",
                f"months = {months!r}",
                "with open('table.csv', 'w') as out:",
                "    print('product', *months, sep=',', file=out)",
                "    for product in sorted({row['product'] for row in rows}):",
                "        print(product, *(count[product, month] for month in months), sep=',',"
                " file=out)",
            ),
        )
        yield "python3 pivot.py && cat table.csv"

    table = lines(
        ",".join(["product", *months]),
        *(
            ",".join([product, *(str(cells[product, month]) for month in months)])
            for product in products
        ),
    )
    instruction = (
        f"Each line of sales.csv is one sale. Write table.csv: header product,{','.join(months)};"
        " for each product, in alphabetical order, how many sales it had in each of these months,"
        " 0 included."
    )
    return TaskDraft(
        instruction,
        {"sales.csv": lines("date,product", *draw.shuffled(rows))},
        [holds("table.csv", table)],
        demonstrator,
    )


@wide_family("medians", "data", 3, "python3")
def medians(draw: Draw) -> TaskDraft:
    sensors = draw.words(3)
    values = {
        sensor: [draw.number(1, 500) for _ in range(draw.rng.choice([3, 5]))] for sensor in sensors
    }
    rows = draw.shuffled(
        [f"{sensor} {value}" for sensor, series in values.items() for value in series]
    )
    limit = sorted(int(statistics.median(series)) for series in values.values())[1]
    answer = lines(
        *(
            f"{sensor} {int(statistics.median(series))}"
            for sensor, series in sorted(values.items())
            if statistics.median(series) >= limit
        )
    )

    def demonstrator() -> Demonstration:
        yield "head -n 3 readings.txt"
        yield _python(
            "import statistics",
            "series = {}",
            "for line in open('readings.txt'):",
            "    name, value = line.split()",
            "    series.setdefault(name, []).append(int(value))",
            "out = open('out.txt', 'w')",
            "for name in sorted(series):",
            "    middle = statistics.median(series[name])",
            f"    if middle >= {limit}:",
            "        print(name, middle, file=out)",
        )

    instruction = (
        "Lines of readings.txt are: sensor value. Write sensor and median, by name of the sensor,"
        f" to out.txt for each sensor whose median is {limit} or more."
    )
    return TaskDraft(
        instruction, {"readings.txt": lines(*rows)}, [holds("out.txt", answer)], demonstrator
    )
