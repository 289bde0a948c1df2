"""Tasks on git: questions about a history, and changes of a repository, as shell scripts."""

from __future__ import annotations

import dataclasses
import hashlib
import random
from collections.abc import Callable
from typing import NamedTuple

from envs.tasks.made.draft import Case, Draft, run_program

AUTHORS = ["Ann", "Ben", "Cai", "Dee", "Eli", "Fay"]
FILES = [
    "README.md",
    "src/core.py",
    "src/cli.py",
    "src/web.py",
    "docs/guide.md",
    "docs/faq.md",
    "setup.cfg",
]
VERBS = ["Add", "Fix", "Move", "Drop", "Speed", "Tidy"]
THINGS = ["parser", "cache", "login", "export", "search", "menu"]
CASES = 5
# Makes the repository `repo` from the file `history`, a stream of git fast-import.
_SETUP = (
    "git init -q -b main repo && git -C repo fast-import --quiet < history"
    " && git -C repo reset -q --hard main && rm history"
)


class Commit(NamedTuple):
    """A commit of a history without branches: author, subject, files that it writes."""

    author: str
    subject: str
    files: dict[str, str]


@dataclasses.dataclass(frozen=True)
class Work:
    """What a script must do, the script, its outcome, and the probe that shows the outcome."""

    words: str
    oracle: str
    answer: Callable[[list[Commit]], str]
    probe: str = ""


def make(seed: int) -> Draft:
    """Return the task of a seed."""
    rng = random.Random(f"git/{seed}")
    kind = list(WORKS)[seed % len(WORKS)]
    work = WORKS[kind](rng)
    histories = [_history(rng, rng.randint(10, 16)) for _ in range(CASES)]
    cases = []
    for history in histories:
        answer = work.answer(history)
        cases.append(
            Case(
                run_program("shell", "task.sh", "repo"),
                files={"history": _stream(history)},
                setup=_SETUP,
                probe=work.probe,
                stdout=None if work.probe else answer,
                state=answer if work.probe else None,
            )
        )
    example = "\n".join(f"{one.author}: {one.subject}" for one in histories[0][:3])
    return Draft(
        name=f"git/{kind}-{seed}",
        domain="version-control",
        family=f"git-{kind}",
        language="shell",
        instruction=f"""\
Write the bash script /app/task.sh. `bash task.sh FOLDER` works on the git repository in FOLDER, \
whose branch `main` is checked out and has no merges. {work.words}

The script is run on several repositories; their commits look like

```
{example}
```
""",
        program="task.sh",
        oracle='cd "$1"\n' + work.oracle,
        cases=cases,
        origin={"seed": seed},
    )


def _history(rng: random.Random, commits: int) -> list[Commit]:
    history = []
    authors = rng.sample(AUTHORS, 4)
    for number in range(commits):
        chosen = FILES if number == 0 else rng.sample(FILES, rng.choice((1, 1, 2, 3)))
        files = {name: f"{name} {number} {rng.randrange(1000)}\n" for name in chosen}
        subject = f"{rng.choice(VERBS)} {rng.choice(THINGS)}"
        if rng.random() < 0.25:
            subject = f"Release {rng.randint(1, 2)}.{rng.randint(0, 2)}"
        history.append(Commit(rng.choice(authors), subject, files))
    return history


def _stream(history: list[Commit]) -> str:
    """Return a history as a stream of git fast-import; commits are a minute apart."""
    parts = []
    for number, commit in enumerate(history):
        when = 1_700_000_000 + 60 * number
        who = f"{commit.author} <{commit.author.lower()}@example.org> {when} +0000"
        parts.append(f"commit refs/heads/main\nauthor {who}\ncommitter {who}\n")
        parts.append(f"data {len(commit.subject)}\n{commit.subject}\n")
        for name, text in commit.files.items():
            parts.append(f"M 100644 inline {name}\ndata {len(text)}\n{text}\n")
    return "".join(parts)


def _by_author(rng: random.Random) -> Work:
    """Count commits below a folder by author."""
    folder = rng.choice(("src", "docs"))
    verb = rng.choice(("", *VERBS))
    least = rng.choice((1, 2))

    def answer(history: list[Commit]) -> str:
        counts: dict[str, int] = {}
        for commit in history:
            is_there = any(name.startswith(f"{folder}/") for name in commit.files)
            if is_there and (not verb or not commit.subject.startswith(verb)):
                counts[commit.author] = counts.get(commit.author, 0) + 1
        rows = sorted((-count, author) for author, count in counts.items() if count >= least)
        return "\n".join(f"{-count} {author}" for count, author in rows)

    chosen = f" | grep -v ' {verb} '" if verb else ""
    oracle = (
        f"git log --format='%an %s' -- {folder}{chosen} | cut -d' ' -f1 | sort | uniq -c |\n"
        f"  awk '$1 >= {least} {{ print $1, $2 }}' | sort -k1nr -k2\n"
    )
    without = f", those whose subject begins with `{verb}` left out" if verb else ""
    words = (
        f"It prints how many commits of each author change files below {folder}/{without}: one"
        f" author a line as `COUNT NAME`, the largest count first, equal ones by name. Authors with"
        f" fewer than {least} such commits are left out."
    )
    return Work(words, oracle, answer)


def _hot_files(rng: random.Random) -> Work:
    """Find the files that most of the last commits change."""
    last = rng.choice((5, 6, 8))
    least = rng.choice((2, 3))

    def answer(history: list[Commit]) -> str:
        counts: dict[str, int] = {}
        for commit in history[-last:]:
            for name in commit.files:
                counts[name] = counts.get(name, 0) + 1
        rows = sorted((-count, name) for name, count in counts.items() if count >= least)
        return "\n".join(f"{name} {-count}" for count, name in rows)

    oracle = (
        f"git log -n{last} --format= --name-only | sort | uniq -c |\n"
        f"  awk '$1 >= {least} {{ print $2, $1 }}' | LC_ALL=C sort -k2nr -k1\n"
    )
    words = (
        f"It prints the files that at least {least} of the last {last} commits change: one a line"
        " as `PATH COUNT`, the largest count first, equal ones by path (LC_ALL=C)."
    )
    return Work(words, oracle, answer)


def _tagged(rng: random.Random) -> Work:
    """Tag the commits that are releases."""
    prefix = rng.choice(("v", "rel-", "version/"))
    skip = rng.choice(AUTHORS)

    def answer(history: list[Commit]) -> str:
        rows = {}
        for commit in history:
            kind, _, version = commit.subject.partition(" ")
            if kind == "Release" and commit.author != skip:
                rows[f"{prefix}{version}"] = commit.subject
        return "\n".join(f"{name} {rows[name]}" for name in sorted(rows))

    oracle = (
        "git log --reverse --format='%H %an %s' | while read id author kind version; do\n"
        f'  if [ "$kind" == Release ] && [ "$author" != {skip} ]; then\n'
        f'    git tag -f "{prefix}$version" "$id" > /dev/null\n  fi\ndone\n'
    )
    words = (
        f"Each commit with the subject `Release X` that {skip} did not write gets the lightweight"
        f" tag `{prefix}X`. Where two have the same X, the newer one gets it."
    )
    probe = (
        "git -C repo for-each-ref --format='%(refname:lstrip=2) %(subject)' refs/tags |"
        " LC_ALL=C sort"
    )
    return Work(words, oracle, answer, probe)


def _squashed(rng: random.Random) -> Work:
    """Make one commit of the last ones."""
    count = rng.choice((2, 3, 4))
    subject = f"{rng.choice(VERBS)} everything about {rng.choice(THINGS)}"
    drop = rng.choice(FILES[1:])

    def answer(history: list[Commit]) -> str:
        subjects = [commit.subject for commit in history[:-count]] + [subject]
        content: dict[str, str] = {}
        for commit in history:
            content |= commit.files
        del content[drop]
        lines = []
        for name in sorted(content):
            blob = content[name].encode()
            digest = hashlib.sha1(b"blob %d\0" % len(blob) + blob).hexdigest()
            lines.append(f"100644 {digest} 0\t{name}")
        return "\n".join([*reversed(subjects), *lines])

    oracle = f"git reset --soft HEAD~{count}\ngit rm -f {drop}\ngit commit -m '{subject}'\n"
    words = (
        f"The last {count} commits of main become one with the subject `{subject}`, which also"
        f" deletes the file {drop}; the commits before stay as they are, and nothing is left"
        " uncommitted."
    )
    probe = "git -C repo log --format=%s; git -C repo ls-files -s; git -C repo status --short"
    return Work(words, oracle, answer, probe)


def _branches(rng: random.Random) -> Work:
    """Make a branch for each author at that author's newest commit."""
    prefix = rng.choice(("by/", "last/", "wip-"))
    least = rng.choice((2, 3))

    def answer(history: list[Commit]) -> str:
        rows = [f"main {history[-1].subject}"]
        for author in sorted({commit.author for commit in history}):
            own = [commit for commit in history if commit.author == author]
            if len(own) >= least:
                rows.append(f"{prefix}{author.lower()} {own[-1].subject}")
        return "\n".join(sorted(rows))

    oracle = (
        "for author in $(git log --format=%an | sort -u); do\n"
        '  if [ "$(git log --author="$author" --format=%h | wc -l)" -ge '
        f'{least} ]; then\n    git branch "{prefix}${{author,,}}" '
        '"$(git log --author="$author" -n1 --format=%H)"\n  fi\ndone\n'
    )
    words = (
        f"Each author with at least {least} commits gets a branch `{prefix}NAME` (NAME in small"
        " letters) at the newest commit of that author. main stays checked out."
    )
    probe = (
        "git -C repo for-each-ref --format='%(refname:lstrip=2) %(subject)' refs/heads |"
        " LC_ALL=C sort"
    )
    return Work(words, oracle, answer, probe)


WORKS: dict[str, Callable[[random.Random], Work]] = {
    "authors": _by_author,
    "hot": _hot_files,
    "tags": _tagged,
    "squash": _squashed,
    "branches": _branches,
}
