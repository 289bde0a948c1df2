"""Families whose instruction is in the sandbox: a note, or a chain of file names."""

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


@family("obey")
def obey(draw: Draw) -> TaskDraft:
    files = {name: lines(draw.word()) for name in draw.names(3)}
    name, _, _ = draw.shuffled(list(files))
    word = draw.word()
    new = draw.word() + ".txt"
    note, command, checks, changed = {
        "write": (f"write {word} to {new}", f"echo {word} > {new}", [holds(new, word)], ()),
        "delete": (f"delete {name}", f"rm {name}", [gone(name)], (name,)),
        "rename": (
            f"rename {name} to {new}",
            f"mv {name} {new}",
            [gone(name), holds(new, files[name])],
            (name,),
        ),
        "copy": (f"copy {name} to {new}", f"cp {name} {new}", [holds(new, files[name])], ()),
    }[draw.choose("write", "delete", "rename", "copy")]

    def demonstrator() -> Demonstration:
        yield "cat note.txt"
        yield command

    instruction = draw.choose("Do what note.txt says.", "Read note.txt and do what it says.")
    return TaskDraft(
        instruction,
        {**files, "note.txt": lines(note)},
        [*checks, *unchanged(files, *changed)],
        demonstrator,
    )


@family("chain")
def chain(draw: Draw) -> TaskDraft:
    names = draw.names(draw.number(2, 3))
    word = draw.word()
    files = {
        name: lines(following) for name, following in zip(names, [*names[1:], word], strict=True)
    }
    decoy = {draw.names(1)[0]: lines(draw.word())}

    def demonstrator() -> Demonstration:
        found = yield f"cat {names[0]}"
        while found.endswith(".txt"):
            found = yield f"cat {found}"
        yield f"echo {found} > out.txt"

    instruction = f"Start at {names[0]} and follow the file names. Write the last word to out.txt."
    return TaskDraft(instruction, {**files, **decoy}, [holds("out.txt", word)], demonstrator)
