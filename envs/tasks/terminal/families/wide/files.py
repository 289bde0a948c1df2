"""Wide families about files and folders: trees, archives, copies, parts, odd names, times."""

from __future__ import annotations

from envs.tasks.terminal import checks
from envs.tasks.terminal.registry import wide_family
from envs.tasks.terminal.task import Demonstration, Draw, TaskDraft, gone, holds, lines, unchanged


def _texts(draw: Draw, names: list[str], rows: int = 1) -> dict[str, str]:
    return {
        name: lines(*(f"{draw.word()} {draw.number(10, 99)}" for _ in range(rows)))
        for name in names
    }


@wide_family("flatten", "files", 2)
def flatten(draw: Draw) -> TaskDraft:
    folders = draw.words(3)
    target = draw.word()
    logs = _texts(draw, [f"{draw.rng.choice(folders)}/{name}" for name in draw.names(4, ".log")])
    others = _texts(
        draw, [f"{folder}/{name}" for folder, name in zip(folders, draw.names(3), strict=True)]
    )

    def demonstrator() -> Demonstration:
        yield "find . -name '*.log'"
        yield f"mkdir -p {target} && find . -name '*.log' -exec mv -t {target} {{}} +"

    moved = {path.split("/")[1]: text for path, text in logs.items()}
    found = [
        checks.tree(target, moved),
        *(holds(f"{target}/{name}", text) for name, text in moved.items()),
        *map(gone, logs),
        *unchanged(others),
    ]
    return TaskDraft(
        f"Move every .log file, in whatever folder it lies, into a new folder {target}. Leave the"
        " other files.",
        {**logs, **others},
        found,
        demonstrator,
    )


@wide_family("unpack_one", "files", 2, "tar", "gzip")
def unpack_one(draw: Draw) -> TaskDraft:
    members = _texts(draw, draw.names(5))
    name = draw.choose(*members)
    target = draw.word()
    source = draw.word() + ".tar.gz"
    others = [other for other in members if other != name]
    files = {f"pack/{member}": text for member, text in members.items()} | {"note.txt": lines(name)}

    def demonstrator() -> Demonstration:
        named = yield "cat note.txt"
        yield f"mkdir -p {target} && tar -xzf {source} -C {target} {named}"

    found = [
        checks.tree(target, [name]),
        holds(f"{target}/{name}", members[name]),
        *map(gone, others),
        *checks.archive(source, members),
    ]
    instruction = (
        f"Unpack the file named in note.txt, and no other, from {source} into a new folder"
        f" {target}."
    )
    return TaskDraft(
        instruction,
        files,
        found,
        demonstrator,
        setup=f"tar -czf {source} -C pack {' '.join(members)}; rm -r pack",
    )


@wide_family("pack", "files", 3, "tar", "gzip")
def pack(draw: Draw) -> TaskDraft:
    root, inner = draw.words(2)
    wanted = _texts(
        draw,
        [f"{root}/{name}" for name in draw.names(2)]
        + [f"{root}/{inner}/{name}" for name in draw.names(2)],
    )
    others = _texts(draw, [f"{root}/{name}" for name in draw.names(2, ".log")])

    def demonstrator() -> Demonstration:
        yield f"find {root} -type f"
        yield f"find {root} -name '*.txt' | tar -czf {root}.tar.gz -T -"
        yield f"tar -tzf {root}.tar.gz"

    instruction = (
        f"Pack all .txt files below {root}, and nothing else, into {root}.tar.gz. Their names in it"
        f" begin with {root}/."
    )
    return TaskDraft(
        instruction,
        {**wanted, **others},
        [*unchanged({**wanted, **others}), *checks.archive(f"{root}.tar.gz", wanted)],
        demonstrator,
    )


@wide_family("duplicates", "files", 3)
def duplicates(draw: Draw) -> TaskDraft:
    texts = [lines(f"{draw.word()} {draw.word()}") for _ in range(3)]
    names = draw.names(7)
    files = {
        name: texts[index] if index < 3 else draw.rng.choice(texts)
        for index, name in enumerate(names)
    }
    kept = {text: min(name for name in names if files[name] == text) for text in texts}
    removed = [name for name in names if name not in kept.values()]

    def demonstrator() -> Demonstration:
        rows = sorted((yield "md5sum *.txt").split("\n"))
        first = {row.split()[0]: row.split()[1] for row in reversed(rows)}
        yield (
            f"rm {' '.join(row.split()[1] for row in rows if row.split()[1] not in first.values())}"
        )
        yield "md5sum *.txt"

    instruction = (
        "Some files have the same content. Of each such group keep the file whose name comes first"
        " in the alphabet, and delete the others."
    )
    return TaskDraft(
        instruction, files, [*map(gone, removed), *unchanged(files, *removed)], demonstrator
    )


@wide_family("mirror", "files", 3)
def mirror(draw: Draw) -> TaskDraft:
    source, copy, inner = draw.words(3)
    names = [*draw.names(3), f"{inner}/{draw.names(1)[0]}"]
    original = _texts(draw, names)
    stale = names[0]
    extra = draw.names(1)[0]
    old = {name: text for name, text in original.items() if name not in (names[1], names[3])} | {
        stale: lines(draw.word()),
        extra: lines(draw.word()),
    }
    files = {f"{source}/{name}": text for name, text in original.items()} | {
        f"{copy}/{name}": text for name, text in old.items()
    }

    def demonstrator() -> Demonstration:
        yield f"diff -r {source} {copy} || true"
        yield f"rm -r {copy} && cp -r {source} {copy}"

    found = [
        checks.tree(copy, original, [inner]),
        *(holds(f"{copy}/{name}", text) for name, text in original.items()),
    ]
    found += [holds(f"{source}/{name}", text) for name, text in original.items()]
    return TaskDraft(
        f"Make the folder {copy} an exact copy of the folder {source}: nothing missing, nothing"
        " old, nothing more.",
        files,
        found,
        demonstrator,
    )


@wide_family("odd_names", "files", 3)
def odd_names(draw: Draw) -> TaskDraft:
    odd = [
        f"{draw.word()} {draw.word()}.txt",
        f"-{draw.word()} {draw.word()}.txt",
        f"{draw.word()} {draw.word()} {draw.word()}.txt",
    ]
    files = _texts(draw, odd + draw.names(2))

    def demonstrator() -> Demonstration:
        yield "ls -Q"
        yield 'for f in *" "*; do mv -- "$f" "${f// /_}"; done'
        yield "ls -Q"

    found = [
        checks.tree(".", [name.replace(" ", "_") for name in files]),
        *(holds(f"./{name.replace(' ', '_')}", text) for name, text in files.items()),
    ]
    return TaskDraft(
        "Replace every space in the names of the files here by an underscore.",
        files,
        found,
        demonstrator,
    )


@wide_family("newest", "files", 2)
def newest(draw: Draw) -> TaskDraft:
    files = _texts(draw, draw.names(4, ".log") + draw.names(1))
    logs = [name for name in files if name.endswith(".log")]
    days = draw.rng.sample(range(1, 28), len(files))
    days[-1] = 28  # the newest of all is no log
    which, pick = draw.rng.choice([("newest", max), ("oldest", min)])
    answer = pick(logs, key=lambda name: days[logs.index(name)])

    def demonstrator() -> Demonstration:
        rows = (yield f"ls -t{'' if which == 'newest' else 'r'} *.log").split()
        yield f"echo {rows[0]} > out.txt"

    setup = lines(
        *(
            f"touch -d '2024-03-{day:02d} 10:00' {name}"
            for name, day in zip(files, days, strict=True)
        )
    )
    return TaskDraft(
        f"Which .log file is the {which} by its time of change? Write its name to out.txt.",
        files,
        [holds("out.txt", answer)],
        demonstrator,
        setup=setup,
    )


@wide_family("parts", "files", 2)
def parts(draw: Draw) -> TaskDraft:
    stem = draw.word()
    count = draw.number(11, 14)
    files = {
        f"{stem}.{number}": lines(f"{draw.word()} {draw.number(100, 999)}")
        for number in range(1, count + 1)
    }

    def demonstrator() -> Demonstration:
        yield "ls"
        yield f"cat $(ls {stem}.* | sort -V) > whole.txt"
        yield "wc -l whole.txt"

    instruction = (
        f"Join the parts {stem}.1, {stem}.2, ... in the order of their numbers into whole.txt."
    )
    return TaskDraft(
        instruction,
        files,
        [holds("whole.txt", "".join(files.values())), *unchanged(files)],
        demonstrator,
    )


@wide_family("by_extension", "files", 2)
def by_extension(draw: Draw) -> TaskDraft:
    extensions = draw.rng.sample(["csv", "log", "md", "txt", "conf"], 3)
    files = _texts(
        draw,
        [
            f"{draw.word()}.{extension}"
            for extension in extensions
            for _ in range(draw.number(1, 3))
        ],
    )

    def demonstrator() -> Demonstration:
        listed = (yield "ls").split()
        found = sorted({name.rsplit(".", 1)[1] for name in listed})
        yield f"mkdir -p {' '.join(found)} && " + " && ".join(
            f"mv *.{extension} {extension}" for extension in found
        )

    found = [
        check
        for name, text in files.items()
        for check in (holds(f"{name.rsplit('.', 1)[1]}/{name}", text), gone(name))
    ]
    return TaskDraft(
        "Sort the files into folders named by their extensions: a.csv goes to csv/a.csv.",
        files,
        found,
        demonstrator,
    )
