"""What the tests of the documentation share: its pages, their code blocks and their commands."""

from __future__ import annotations

import pathlib
import re
import shlex

ROOT = pathlib.Path(__file__).parents[2]
PAGES = sorted(
    path
    for path in (
        ROOT / "README.md",
        *ROOT.glob("*.md"),
        ROOT / "examples" / "README.md",
        *(ROOT / "docs").glob("**/*.md"),
    )
)
PAGES = list(dict.fromkeys(PAGES))
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
INLINE = re.compile(r"`([^`\n]+)`")


def name_of(path: pathlib.Path) -> str:
    """Return a page's path from the root, for the names of tests."""
    return path.relative_to(ROOT).as_posix()


def blocks(path: pathlib.Path, language: str) -> list[str]:
    """Return the code blocks of a page in one language."""
    return [body for found, body in BLOCK.findall(path.read_text()) if found == language]


def commands(path: pathlib.Path) -> list[list[str]]:
    """Return every `python -m X ...` of a page, in blocks and in the text, split into words."""
    text = path.read_text()
    sources = [body for language, body in BLOCK.findall(text) if language in ("bash", "")]
    sources += INLINE.findall(BLOCK.sub("", text))
    found = []
    for source in sources:
        for line in source.replace("\\\n", " ").splitlines():
            start = re.search(r"\bpython -m ", line)
            if start:
                found.append(shlex.split(line[start.start() :], comments=True))
    return found
