"""Wide families about git: commit, ignore, recover, revert, cherry-pick, merge, bisect.

The setup makes commits with fixed names and dates. Verifiers read with plumbing commands and ignore
the repository's hooks and settings.
"""

from __future__ import annotations

from collections.abc import Mapping

from envs.tasks.terminal import checks
from envs.tasks.terminal.registry import wide_family, write_file
from envs.tasks.terminal.task import Demonstration, Draw, TaskDraft, gone, holds, lines

_START = """\
export GIT_AUTHOR_DATE='2024-03-05T10:00:00Z' GIT_COMMITTER_DATE='2024-03-05T10:00:00Z'
git init -q -b main
git config user.name agent
git config user.email agent@example.org
"""


def _commit(subject: str, files: Mapping[str, str | None]) -> str:
    """Return shell lines that write files (None deletes one) and commit them."""
    steps = [
        f"git rm -q {path}" if text is None else write_file(path, text)
        for path, text in files.items()
    ]
    return lines(*steps, "git add -A", f"git commit -q -m '{subject}'")


def _text(draw: Draw, rows: int = 2) -> str:
    return lines(*(f"{draw.word()} {draw.number(10, 99)}" for _ in range(rows)))


@wide_family("git_commit", "software", 2, "git")
def git_commit(draw: Draw) -> TaskDraft:
    one, two = draw.names(2)
    subject = f"{draw.word()} {draw.word()}"
    first = f"start {draw.word()}"
    old = _text(draw)
    kept = _text(draw)
    new = draw.word()

    def demonstrator() -> Demonstration:
        yield "git status --short; git log --oneline"
        yield f"echo {new} >> {one} && git add {one} && git commit -q -m '{subject}'"
        yield "git status --short; git log --oneline"

    setup = _START + _commit(first, {one: old, two: kept}) + f"echo {draw.word()} >> {two}\n"
    found = [
        checks.head_is("main"),
        checks.subjects("main", subject, first),
        checks.committed("main", one, old + new),
        checks.committed("main", two, kept),
    ]
    return TaskDraft(
        f"Append the line {new} to {one} and commit this change, and no other, with the message"
        f" `{subject}`.",
        {"todo.txt": lines(subject)},
        found,
        demonstrator,
        setup=setup.replace("git add -A", f"git add {one} {two}"),
    )


@wide_family("git_ignore", "software", 3, "git")
def git_ignore(draw: Draw) -> TaskDraft:
    source = draw.names(1)[0]
    log = draw.word() + ".log"
    text = _text(draw)
    noise = _text(draw)
    first = f"start {draw.word()}"

    def demonstrator() -> Demonstration:
        yield "git ls-files"
        yield (
            f"echo '*.log' > .gitignore && git rm -q --cached {log} && git add .gitignore && git"
            " commit -q -m 'ignore logs'"
        )
        yield "git ls-files; ls"

    found = [
        checks.uncommitted("main", log),
        checks.committed("main", source, text),
        holds(log, noise),
        checks.committed("main", ".gitignore", "*.log"),
        checks.subjects("main", "ignore logs", first),
    ]
    instruction = (
        f"{log} was committed by mistake. Take it out of the repository but keep the file; make a"
        " .gitignore with the line *.log; commit both with the message `ignore logs`."
    )
    return TaskDraft(
        instruction,
        {},
        found,
        demonstrator,
        setup=_START + _commit(first, {source: text, log: noise}),
    )


@wide_family("git_recover", "software", 3, "git")
def git_recover(draw: Draw) -> TaskDraft:
    names = draw.names(3)
    words = draw.words(4)
    texts = [_text(draw) for _ in range(3)]
    lost = texts[0] + lines(draw.word())
    later = _text(draw)

    def demonstrator() -> Demonstration:
        found = (yield f"git log --format=%h --diff-filter=D -- {names[0]}").split()
        yield f"git checkout -q {found[0]}~1 -- {names[0]} && cat {names[0]}"

    setup = (
        _START
        + _commit(f"add {words[0]}", dict(zip(names, texts, strict=True)))
        + _commit(f"change {words[1]}", {names[0]: lost})
        + _commit(f"drop {words[2]}", {names[0]: None})
        + _commit(f"more {words[3]}", {names[1]: later})
    )
    found = [
        holds(names[0], lost),
        holds(names[1], later),
        holds(names[2], texts[2]),
        checks.subjects(
            "main",
            *(
                f"{a} {b}"
                for a, b in zip(("more", "drop", "change", "add"), reversed(words), strict=True)
            ),
        ),
    ]
    return TaskDraft(
        f"{names[0]} was deleted in an earlier commit. Bring it back as it was just before. No"
        " commit is needed.",
        {},
        found,
        demonstrator,
        setup=setup,
    )


@wide_family("git_revert", "software", 3, "git")
def git_revert(draw: Draw) -> TaskDraft:
    names = draw.names(3)
    subjects = [f"{verb} {draw.word()}" for verb in ("start", "tune", "change", "extend")]
    texts = [_text(draw) for _ in range(3)]
    bad = texts[0] + lines(draw.word())
    good = texts[1] + lines(draw.word())

    def demonstrator() -> Demonstration:
        rows = (yield "git log --format='%h %s'").split("\n")
        yield (
            "git revert --no-edit"
            f" {next(row.split()[0] for row in rows if row.endswith(subjects[1]))}"
        )
        yield "git log --format=%s; git status --short"

    setup = (
        _START
        + _commit(subjects[0], dict(zip(names, texts, strict=True)))
        + _commit(subjects[1], {names[0]: bad})
        + _commit(subjects[2], {names[1]: good})
        + _commit(subjects[3], {names[2]: bad})
    )
    found = [
        checks.committed("main", names[0], texts[0]),
        checks.committed("main", names[1], good),
        checks.committed("main", names[2], bad),
        holds(names[0], texts[0]),
        checks.subjects("main", f'Revert "{subjects[1]}"', *reversed(subjects)),
    ]
    return TaskDraft(
        f"Undo the commit `{subjects[1]}` by a new commit, with git's own message for this.",
        {},
        found,
        demonstrator,
        setup=setup,
    )


@wide_family("git_pick", "software", 4, "git")
def git_pick(draw: Draw) -> TaskDraft:
    branch = draw.word()
    names = draw.names(3)
    subjects = [f"{verb} {draw.word()}" for verb in ("start", "try", "mend", "break")]
    texts = [_text(draw) for _ in range(5)]

    def demonstrator() -> Demonstration:
        rows = (yield f"git log --format='%h %s' {branch}").split("\n")
        yield f"git cherry-pick {next(row.split()[0] for row in rows if row.endswith(subjects[2]))}"

    setup = (
        _START
        + _commit(subjects[0], dict(zip(names, texts[:3], strict=True)))
        + f"git checkout -q -b {branch}\n"
        + _commit(subjects[1], {names[1]: texts[3]})
        + _commit(subjects[2], {names[0]: texts[4]})
        + _commit(subjects[3], {names[2]: None})
        + "git checkout -q main\n"
    )
    found = [
        checks.head_is("main"),
        checks.subjects("main", subjects[2], subjects[0]),
        checks.committed("main", names[0], texts[4]),
        checks.committed("main", names[1], texts[1]),
        checks.committed("main", names[2], texts[2]),
        checks.parents("main", 1),
        checks.subjects(branch, *reversed(subjects)),
        holds(names[0], texts[4]),
    ]
    return TaskDraft(
        f"Of the commits on branch {branch}, main needs `{subjects[2]}` and no other. Bring it to"
        " main, with its message.",
        {},
        found,
        demonstrator,
        setup=setup,
    )


@wide_family("git_merge", "software", 5, "git")
def git_merge(draw: Draw) -> TaskDraft:
    branch = draw.word()
    name, other, third = draw.names(3)
    key, second = draw.words(2)
    numbers = draw.rng.sample(range(10, 99), 3)
    base, ours, theirs = (lines(f"{key}={number}", f"{second}=1") for number in numbers)
    mine = _text(draw)
    added = _text(draw)
    kept = draw.choose("main", branch)
    merged = ours if kept == "main" else theirs

    def demonstrator() -> Demonstration:
        yield f"git merge {branch} || true"
        yield f"cat {name}"
        side = "--ours" if kept == "main" else "--theirs"
        yield (
            f"git checkout -q {side} {name} && git add {name} && git commit -q -m 'merge {branch}'"
        )

    setup = (
        _START
        + _commit("start", {name: base, other: mine})
        + f"git checkout -q -b {branch}\n"
        + _commit("theirs", {name: theirs, third: added})
        + "git checkout -q main\n"
        + _commit("ours", {name: ours})
    )
    found = [
        checks.head_is("main"),
        checks.parents("main", 2),
        checks.committed("main", name, merged),
        checks.committed("main", third, added),
        checks.committed("main", other, mine),
        holds(name, merged),
        holds(third, added),
        gone(".git/MERGE_HEAD"),
        checks.subjects("main^1", "ours", "start"),
        checks.subjects("main^2", "theirs", "start"),
    ]
    return TaskDraft(
        f"Merge branch {branch} into main. Where they disagree, what {kept} has counts. Commit the"
        " merge.",
        {},
        found,
        demonstrator,
        setup=setup,
    )


@wide_family("git_bisect", "debugging", 5, "git", "python3")
def git_bisect(draw: Draw) -> TaskDraft:
    module = draw.word()
    verbs = ("add", "move", "tidy", "speed", "trim", "name", "sort", "fold")
    count = 14
    subjects = [f"{draw.choose(*verbs)} {draw.word()}" for _ in range(count)]
    bad = draw.number(1, count - 2)
    factor = draw.number(2, 9)
    steps = []
    for index in range(count):
        wrong = f"{factor} * x" if index < bad else f"{factor} * x + (x > {draw.number(3, 6)})"
        steps.append(
            _commit(
                subjects[index],
                {
                    f"{module}.py": f"""\
# {subjects[index]}
def scale(x):
    return {wrong}
"""
                },
            )
        )

    def demonstrator() -> Demonstration:
        yield f"git log --format=%s; cat {module}.py check.py"
        loop = (
            "T=${TMPDIR:-/tmp}; for c in $(git rev-list --reverse main); do git show"
            f" $c:{module}.py > $T/{module}.py; (cd $T && python3 /workspace/check.py) || break;"
            " done; git log -1 --format=%s $c"
        )
        yield write_file("find.sh", loop.replace("/workspace/", '"$OLDPWD"/'))
        subject = (yield "bash find.sh; rm find.sh").split("\n")[-1]
        yield f"echo {subject} > out.txt"

    check = f"""\
import os, sys
sys.path.insert(0, os.getcwd())
from {module} import scale
sys.exit(any(scale(x) != {factor} * x for x in range(9)))
"""
    instruction = (
        f"check.py ends with 0 where {module}.py is right. It was right at first. Write the subject"
        " of the first commit at which it fails to out.txt."
    )
    return TaskDraft(
        instruction,
        {"check.py": check},
        [
            holds("out.txt", subjects[bad]),
            checks.subjects("main", *reversed(subjects)),
            checks.head_is("main"),
            holds("check.py", check),
        ],
        demonstrator,
        setup=_START + "echo check.py > .git/info/exclude\n" + "".join(steps),
    )
