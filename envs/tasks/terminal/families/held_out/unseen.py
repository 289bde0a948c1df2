"""Held-out families: each combines two skills of the training families in a new way."""

from __future__ import annotations

from envs.tasks.terminal.task import (
    Demonstration,
    Draw,
    TaskDraft,
    family,
    gone,
    holds,
    lines,
    unchanged,
)


@family("find_delete", held_out=True)
def find_delete(draw: Draw) -> TaskDraft:
    files = {name: lines(*draw.words(2)) for name in draw.names(4)}
    name = draw.choose(*files)
    word = draw.choose(*files[name].split())

    def demonstrator() -> Demonstration:
        found = yield f"grep -l {word} *.txt"
        yield f"rm {found}"

    return TaskDraft(
        f"Delete the file with the word {word}.",
        files,
        [gone(name), *unchanged(files, name)],
        demonstrator,
    )


@family("find_append", held_out=True)
def find_append(draw: Draw) -> TaskDraft:
    files = {name: lines(*draw.words(2)) for name in draw.names(4)}
    name = draw.choose(*files)
    new = draw.word()
    word = draw.choose(*files[name].split())

    def demonstrator() -> Demonstration:
        found = yield f"grep -l {word} *.txt"
        yield f"echo {new} >> {found}"

    return TaskDraft(
        f"Append {new} to the file with the word {word}.",
        files,
        [holds(name, files[name] + new), *unchanged(files, name)],
        demonstrator,
    )


@family("note_count", held_out=True)
def note_count(draw: Draw) -> TaskDraft:
    source = draw.input()
    word = draw.word()
    hits = draw.number(2, 7)
    rows = draw.shuffled(
        [f"{word} {draw.word()}" for _ in range(hits)]
        + [f"{draw.word()} {draw.word()}" for _ in range(2)]
    )

    def demonstrator() -> Demonstration:
        named = yield "cat note.txt"
        found = yield f"grep -c {named} {source}"
        yield f"echo {found} > out.txt"

    instruction = (
        f"How many lines of {source} have the word in note.txt? Write the number to out.txt."
    )
    return TaskDraft(
        instruction,
        {source: lines(*rows), "note.txt": lines(word)},
        [holds("out.txt", str(hits))],
        demonstrator,
    )


@family("note_filter", held_out=True)
def note_filter(draw: Draw) -> TaskDraft:
    source = draw.input()
    word = draw.word()
    rows = draw.shuffled(
        [f"{word} {draw.word()}" for _ in range(2)]
        + [f"{draw.word()} {draw.word()}" for _ in range(3)]
    )

    def demonstrator() -> Demonstration:
        named = yield "cat note.txt"
        yield f"grep {named} {source} > out.txt"

    instruction = f"Put the lines of {source} that have the word in note.txt into out.txt."
    return TaskDraft(
        instruction,
        {source: lines(*rows), "note.txt": lines(word)},
        [holds("out.txt", lines(*(row for row in rows if word in row)))],
        demonstrator,
    )
