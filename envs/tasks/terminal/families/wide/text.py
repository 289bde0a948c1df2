"""Wide families about text: fields, words, dates, templates, sections, lines, encodings, links."""

from __future__ import annotations

import base64
import codecs

from envs.tasks.terminal.registry import wide_family
from envs.tasks.terminal.task import Demonstration, Draw, TaskDraft, holds, lines, unchanged


@wide_family("unique_field", "text", 2)
def unique_field(draw: Draw) -> TaskDraft:
    source = draw.input()
    kinds = draw.words(4)
    number = draw.number(2, 3)
    rows = [
        [draw.word(), draw.rng.choice(kinds), draw.rng.choice(kinds), str(draw.number(1, 99))]
        for _ in range(10)
    ]
    answer = sorted({row[number - 1] for row in rows})

    def demonstrator() -> Demonstration:
        yield f"head -n 2 {source}"
        yield f"cut -d: -f{number} {source} | sort -u > out.txt"

    instruction = (
        f"The fields of {source} are separated by colons. Write the different values of field"
        f" {number} to out.txt, in alphabetical order, each once."
    )
    return TaskDraft(
        instruction,
        {source: lines(*map(":".join, rows))},
        [holds("out.txt", lines(*answer))],
        demonstrator,
    )


@wide_family("most_frequent", "text", 3)
def most_frequent(draw: Draw) -> TaskDraft:
    source = draw.input()
    words = draw.words(8)
    most = draw.number(5, 9)
    counts = [most, most - draw.number(1, 2), *(draw.number(1, 3) for _ in range(6))]
    text = draw.shuffled(
        [word for word, count in zip(words, counts, strict=True) for _ in range(count)]
    )
    rows = [" ".join(text[start : start + 6]) for start in range(0, len(text), 6)]

    def demonstrator() -> Demonstration:
        ranked = (yield f"tr ' ' '\\n' < {source} | sort | uniq -c | sort -nr | head -n 2").split()
        yield f"echo {ranked[1]} {ranked[0]} > out.txt"

    instruction = (
        f"Which word occurs most often in {source}? Write the word and how often it occurs,"
        " separated by a space, to out.txt."
    )
    return TaskDraft(
        instruction, {source: lines(*rows)}, [holds("out.txt", f"{words[0]} {most}")], demonstrator
    )


@wide_family("iso_dates", "text", 3)
def iso_dates(draw: Draw) -> TaskDraft:
    source = draw.input()
    dates = [(draw.number(1, 28), draw.number(1, 12), draw.number(1990, 2030)) for _ in range(5)]
    words = draw.words(10)
    old = lines(
        *(
            f"{a} {day:02d}.{month:02d}.{year} {b} 1.5"
            for (day, month, year), a, b in zip(dates, words[:5], words[5:], strict=True)
        )
    )
    new = lines(
        *(
            f"{a} {year}-{month:02d}-{day:02d} {b} 1.5"
            for (day, month, year), a, b in zip(dates, words[:5], words[5:], strict=True)
        )
    )

    def demonstrator() -> Demonstration:
        yield f"cat {source}"
        yield f"sed -E -i 's/([0-9]{{2}})\\.([0-9]{{2}})\\.([0-9]{{4}})/\\3-\\2-\\1/g' {source}"

    return TaskDraft(
        f"The dates in {source} are written as DD.MM.YYYY. Write them as YYYY-MM-DD, and change"
        " nothing else.",
        {source: old},
        [holds(source, new)],
        demonstrator,
    )


@wide_family("template", "text", 3)
def template(draw: Draw) -> TaskDraft:
    keys = draw.words(3)
    values = [f"{draw.word()}/{draw.number(10, 99)}" for _ in range(3)]
    row = [f"{draw.word()} {{{{{key}}}}} {draw.word()}" for key in (*keys, keys[0])]
    filled = lines(*row)
    for key, value in zip(keys, values, strict=True):
        filled = filled.replace(f"{{{{{key}}}}}", value)
    files = {
        "letter.tmpl": lines(*row),
        "values.txt": lines(*(f"{key}={value}" for key, value in zip(keys, values, strict=True))),
    }

    def demonstrator() -> Demonstration:
        found = dict(pair.split("=") for pair in (yield "cat values.txt").split())
        script = ";".join(f"s,{{{{{key}}}}},{value},g" for key, value in found.items())
        yield f"sed '{script}' letter.tmpl > letter.txt"

    instruction = (
        "Fill letter.tmpl: replace each {{name}} by the value that values.txt gives it, and write"
        " the result to letter.txt."
    )
    return TaskDraft(
        instruction, files, [holds("letter.txt", filled), *unchanged(files)], demonstrator
    )


@wide_family("section", "text", 3)
def section(draw: Draw) -> TaskDraft:
    source = draw.word() + ".ini"
    names = draw.words(4)
    bodies = {
        name: [f"{draw.word()}={draw.number(1, 99)}" for _ in range(draw.number(2, 4))]
        for name in names
    }
    name = draw.choose(*names)

    def demonstrator() -> Demonstration:
        yield f"grep -n '^\\[' {source}"
        yield f"awk '/^\\[/ {{ on = ($0 == \"[{name}]\"); next }} on' {source} > out.txt"

    text = lines(*(row for title, rows in bodies.items() for row in (f"[{title}]", *rows)))
    return TaskDraft(
        f"Copy the lines of section [{name}] of {source}, without its title, to out.txt.",
        {source: text},
        [holds("out.txt", lines(*bodies[name]))],
        demonstrator,
    )


@wide_family("missing_lines", "text", 2)
def missing_lines(draw: Draw) -> TaskDraft:
    one, two = draw.names(2)
    rows = [f"{draw.word()} {draw.number(10, 99)}" for _ in range(10)]
    kept = draw.rng.sample(rows, 6)
    answer = [row for row in rows if row not in kept]
    files = {one: lines(*rows), two: lines(*kept, f"{draw.word()} {draw.number(10, 99)}")}

    def demonstrator() -> Demonstration:
        yield f"wc -l {one} {two}"
        yield f"grep -vxFf {two} {one} > out.txt"

    return TaskDraft(
        f"Write the lines of {one} that {two} lacks to out.txt, in the order of {one}.",
        files,
        [holds("out.txt", lines(*answer)), *unchanged(files)],
        demonstrator,
    )


@wide_family("decode", "text", 2)
def decode(draw: Draw) -> TaskDraft:
    plain = f"{draw.word()} {draw.word()} {draw.number(100, 999)}"
    kind, encoded, command = draw.rng.choice(
        [
            ("base64", base64.b64encode(plain.encode()).decode(), "base64 -d"),
            ("rot13 (every letter moved by 13)", codecs.encode(plain, "rot13"), "tr a-z n-za-m <"),
        ]
    )
    source = draw.word() + ".enc"

    def demonstrator() -> Demonstration:
        yield f"cat {source}"
        yield f"{command} {source} > out.txt"
        yield "cat out.txt"

    return TaskDraft(
        f"{source} is encoded as {kind}. Write the plain text to out.txt.",
        {source: lines(encoded)},
        [holds("out.txt", plain)],
        demonstrator,
    )


@wide_family("swap_columns", "text", 2, "awk")
def swap_columns(draw: Draw) -> TaskDraft:
    source = draw.input()
    rows = [[draw.word(), draw.word(), str(draw.number(1, 99)), draw.word()] for _ in range(6)]
    first, second = sorted(draw.rng.sample(range(1, 5), 2))

    def demonstrator() -> Demonstration:
        yield f"head -n 2 {source}"
        yield (
            f"awk '{{ t = ${first}; ${first} = ${second}; ${second} = t; print }}' {source} >"
            " out.txt"
        )

    swapped = [list(row) for row in rows]
    for row in swapped:
        row[first - 1], row[second - 1] = row[second - 1], row[first - 1]
    checks = [holds("out.txt", lines(*map(" ".join, swapped)))]
    return TaskDraft(
        f"Write {source} to out.txt with columns {first} and {second} exchanged. Columns are"
        " separated by spaces.",
        {source: lines(*map(" ".join, rows))},
        checks,
        demonstrator,
    )


@wide_family("links", "text", 3)
def links(draw: Draw) -> TaskDraft:
    source = draw.word() + ".md"
    targets = [f"https://{draw.word()}.example/{draw.word()}" for _ in range(4)]
    rows = [f"{draw.word()} [{draw.word()}]({target}) {draw.word()}" for target in targets]
    rows += [f"{draw.word()} (see {draw.word()})", f"[{draw.word()}]({targets[0]})"]

    def demonstrator() -> Demonstration:
        yield f"cat {source}"
        yield f"grep -oE '\\]\\([^)]*\\)' {source} | tr -d '()]' | sort -u > out.txt"

    instruction = (
        f"Write the target of every link in the Markdown file {source} to out.txt: each once, in"
        " alphabetical order, one a line."
    )
    return TaskDraft(
        instruction,
        {source: lines(*draw.shuffled(rows))},
        [holds("out.txt", lines(*sorted(targets)))],
        demonstrator,
    )


@wide_family("number_headings", "text", 4, "awk")
def number_headings(draw: Draw) -> TaskDraft:
    source = draw.word() + ".md"
    rows = []
    numbered = []
    chapter = 0
    for _ in range(3):
        chapter = chapter + 1
        title = draw.word()
        rows.append(f"# {title}")
        numbered.append(f"# {chapter} {title}")
        for part in range(1, draw.number(1, 3) + 1):
            title = draw.word()
            body = f"{draw.word()} {draw.number(10, 99)}"
            rows += [f"## {title}", body]
            numbered += [f"## {chapter}.{part} {title}", body]

    def demonstrator() -> Demonstration:
        yield f"grep -n '^#' {source}"
        program = '/^# / { a++; b = 0; $1 = "# " a } /^## / { b++; $1 = "## " a "." b } { print }'
        yield f"awk '{program}' {source} > out.txt && mv out.txt {source}"

    instruction = (
        f"Number the headings of {source}: `# a` becomes `# 1 a`, the `## b` after it `## 1.1 b`,"
        " and so on. Leave the other lines."
    )
    return TaskDraft(
        instruction, {source: lines(*rows)}, [holds(source, lines(*numbered))], demonstrator
    )
