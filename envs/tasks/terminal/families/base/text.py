"""Families about the lines of a file: copy, count, filter, replace, join, drop, look up."""

from __future__ import annotations

from envs.tasks.terminal.task import Demonstration, Draw, TaskDraft, family, holds, lines, unchanged


def _rows_with(draw: Draw, word: str, hits: int, others: int) -> list[str]:
    """Draw lines of two words, `hits` of which begin with the given word."""
    return draw.shuffled(
        [f"{word} {draw.word()}" for _ in range(hits)]
        + [f"{draw.word()} {draw.word()}" for _ in range(others)]
    )


@family("line")
def line(draw: Draw) -> TaskDraft:
    source = draw.input()
    rows = [f"{draw.word()} {draw.word()}" for _ in range(5)]
    number = draw.number(2, 5)

    def demonstrator() -> Demonstration:
        row = yield f"sed -n {number}p {source}"
        yield f"echo {row} > out.txt"

    instruction = draw.choose(
        f"Write line {number} of {source} to out.txt.",
        f"Copy line {number} of {source} to out.txt.",
    )
    return TaskDraft(
        instruction, {source: lines(*rows)}, [holds("out.txt", rows[number - 1])], demonstrator
    )


@family("count")
def count(draw: Draw) -> TaskDraft:
    source = draw.input()
    word = draw.word()
    hits = draw.number(2, 7)
    rows = _rows_with(draw, word, hits, others=2)

    def demonstrator() -> Demonstration:
        found = yield f"grep -c {word} {source}"
        yield f"echo {found} > out.txt"

    instruction = draw.choose(
        f"How many lines of {source} have {word}? Write the number to out.txt.",
        f"Count the lines of {source} with {word}. Write the number to out.txt.",
    )
    return TaskDraft(
        instruction, {source: lines(*rows)}, [holds("out.txt", str(hits))], demonstrator
    )


@family("filter")
def filter_lines(draw: Draw) -> TaskDraft:
    source = draw.input()
    word = draw.word()
    rows = _rows_with(draw, word, hits=2, others=3)

    def demonstrator() -> Demonstration:
        yield f"grep {word} {source}"
        yield f"grep {word} {source} > out.txt"

    instruction = draw.choose(
        f"Put the lines of {source} with {word} into out.txt.",
        f"Copy the lines of {source} that have {word} to out.txt.",
    )
    return TaskDraft(
        instruction,
        {source: lines(*rows)},
        [holds("out.txt", lines(*(row for row in rows if word in row)))],
        demonstrator,
    )


@family("replace")
def replace(draw: Draw) -> TaskDraft:
    source = draw.input()
    old = draw.word()
    new = draw.word()
    text = lines(*_rows_with(draw, old, hits=2, others=2))

    def demonstrator() -> Demonstration:
        word = yield "cat note.txt"
        yield f"sed -i s/{old}/{word}/ {source}"

    instruction = draw.choose(
        f"Replace {old} in {source} by the word in note.txt.",
        f"Change {old} in {source} to the word in note.txt.",
    )
    return TaskDraft(
        instruction,
        {source: text, "note.txt": lines(new)},
        [holds(source, text.replace(old, new))],
        demonstrator,
    )


@family("append")
def append(draw: Draw) -> TaskDraft:
    source = draw.word() + ".txt"
    target = draw.input()
    word = draw.word()
    text = lines(*draw.words(2))

    def demonstrator() -> Demonstration:
        found = yield f"cat {source}"
        yield f"echo {found} >> {target}"

    files = {source: lines(word), target: text}
    return TaskDraft(
        f"Append the word in {source} to {target}.",
        files,
        [holds(target, text + word), *unchanged(files, target)],
        demonstrator,
    )


@family("combine")
def combine(draw: Draw) -> TaskDraft:
    files = {name: lines(draw.word()) for name in draw.names(4)}
    chosen = draw.shuffled(list(files))[:3]

    def demonstrator() -> Demonstration:
        names = (yield "cat list.txt").split()
        yield f"cat {' '.join(names)} > out.txt"

    instruction = draw.choose(
        "Join the files named in list.txt, in that order, into out.txt.",
        "Write the files named in list.txt one after another to out.txt.",
    )
    return TaskDraft(
        instruction,
        {**files, "list.txt": lines(*chosen)},
        [holds("out.txt", "".join(files[name] for name in chosen))],
        demonstrator,
    )


@family("drop")
def drop(draw: Draw) -> TaskDraft:
    source = draw.input()
    word = draw.word()
    rows = _rows_with(draw, word, hits=2, others=3)

    def demonstrator() -> Demonstration:
        named = yield "cat note.txt"
        yield f"sed -i /{named}/d {source}"

    instruction = draw.choose(
        f"Delete the lines of {source} that have the word in note.txt.",
        f"Remove from {source} the lines with the word in note.txt.",
    )
    return TaskDraft(
        instruction,
        {source: lines(*rows), "note.txt": lines(word)},
        [holds(source, lines(*(row for row in rows if word not in row)))],
        demonstrator,
    )


@family("lookup")
def lookup(draw: Draw) -> TaskDraft:
    source = draw.input()
    rows = [f"{draw.word()} {draw.word()}" for _ in range(5)]
    key, value = draw.choose(*rows).split()

    def demonstrator() -> Demonstration:
        row = yield f"grep {key} {source}"
        yield f"echo {row.split()[-1]} > out.txt"

    instruction = draw.choose(
        f"Which word comes after {key} in {source}? Write it to out.txt.",
        f"Write the word after {key} in {source} to out.txt.",
    )
    return TaskDraft(instruction, {source: lines(*rows)}, [holds("out.txt", value)], demonstrator)
