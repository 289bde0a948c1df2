"""Families about whole files: find, rename, delete, move, permissions."""

from __future__ import annotations

from envs.tasks.terminal.task import (
    Demonstration,
    Draw,
    TaskDraft,
    family,
    folder,
    gone,
    holds,
    lines,
    mode,
    unchanged,
)


def _folder_of_words(draw: Draw, files: int = 4, rows: int = 2) -> dict[str, str]:
    return {name: lines(*draw.words(rows)) for name in draw.names(files)}


@family("find")
def find(draw: Draw) -> TaskDraft:
    files = _folder_of_words(draw)
    name = draw.choose(*files)
    word = draw.choose(*files[name].split())

    def demonstrator() -> Demonstration:
        found = yield f"grep -l {word} *.txt"
        yield f"echo {found} > out.txt"

    instruction = draw.choose(
        f"Which file has the word {word}? Write its name to out.txt.",
        f"Write the name of the file with {word} to out.txt.",
    )
    return TaskDraft(instruction, files, [holds("out.txt", name)], demonstrator)


@family("rename")
def rename(draw: Draw) -> TaskDraft:
    files = _folder_of_words(draw)
    name = draw.choose(*files)
    new = draw.word() + ".txt"
    word = draw.choose(*files[name].split())

    def demonstrator() -> Demonstration:
        found = yield f"grep -l {word} *.txt"
        yield f"mv {found} {new}"

    checks = [holds(new, files[name]), gone(name), *unchanged(files, name)]
    return TaskDraft(f"Rename the file with the word {word} to {new}.", files, checks, demonstrator)


@family("delete_named")
def delete_named(draw: Draw) -> TaskDraft:
    files = _folder_of_words(draw, files=3)
    name = draw.choose(*files)

    def demonstrator() -> Demonstration:
        named = yield "cat note.txt"
        yield f"rm {named}"

    instruction = draw.choose(
        "Delete the file named in note.txt.", "Remove the file named in note.txt."
    )
    return TaskDraft(
        instruction,
        {**files, "note.txt": lines(name)},
        [gone(name), *unchanged(files, name)],
        demonstrator,
    )


@family("delete_empty")
def delete_empty(draw: Draw) -> TaskDraft:
    files = _folder_of_words(draw, files=3, rows=1)
    name = draw.choose(*files)

    def demonstrator() -> Demonstration:
        found = yield "find . -empty"
        yield f"rm {found}"

    instruction = draw.choose("Delete the empty file.", "Remove the empty file.")
    return TaskDraft(
        instruction, {**files, name: ""}, [gone(name), *unchanged(files, name)], demonstrator
    )


@family("move")
def move(draw: Draw) -> TaskDraft:
    logs = {name: lines(draw.word()) for name in draw.names(2, ".log")}
    others = {name: lines(draw.word()) for name in draw.names(2)}
    target = draw.word()

    def demonstrator() -> Demonstration:
        named = yield "cat note.txt"
        yield f"mkdir {named} && mv *.log {named}"

    checks = [
        folder(target),
        *(holds(f"{target}/{name}", text) for name, text in logs.items()),
        *map(gone, logs),
        *unchanged(others),
    ]
    instruction = draw.choose(
        "Make the folder named in note.txt and move the log files into it.",
        "Move the log files into a new folder. Its name is in note.txt.",
    )
    return TaskDraft(
        instruction, {**logs, **others, "note.txt": lines(target)}, checks, demonstrator
    )


@family("chmod")
def chmod(draw: Draw) -> TaskDraft:
    files = {name: lines(f"echo {draw.word()}") for name in draw.names(3, ".sh")}
    name = draw.choose(*files)
    change, pattern, meaning = draw.rng.choice(
        [("+x", "-rwx*", "executable"), ("-w", "-r--*", "read only")]
    )

    def demonstrator() -> Demonstration:
        named = yield "cat note.txt"
        yield f"chmod {change} {named}"

    checks = [mode(path, pattern if path == name else "-rw-*") for path in files]
    return TaskDraft(
        f"Make the script named in note.txt {meaning}.",
        {**files, "note.txt": lines(name)},
        [*checks, *unchanged(files)],
        demonstrator,
    )
