"""Documents of files and repositories, with the control tokens of Qwen's coder models.

    <|fim_prefix|>BEFORE<|fim_suffix|>AFTER<|fim_middle|>MIDDLE
    <|repo_name|>NAME\\n<|file_sep|>PATH\\nTEXT<|file_sep|>PATH\\nTEXT ...

A repository's files come after those that they import, as far as that has an order.
"""

from __future__ import annotations

import ast
import random
from collections.abc import Iterator, Mapping, Sequence

from rome.synth.cpt.document import (
    FILE_SEPARATOR,
    FIM_MIDDLE,
    FIM_PREFIX,
    FIM_SUFFIX,
    REPOSITORY_NAME,
    Control,
    Document,
    make_document,
)
from rome.synth.cpt.repository import Repository

MAX_REPOSITORY_CHARACTERS = 120_000  # of one document: about 32,000 tokens
MIN_FIM_LINES = 6
MAX_MIDDLE_SHARE = 0.5  # of a file's lines or characters

Parts = list[str | Control]


def file_documents(
    repository: Repository, texts: Mapping[str, str], fim_share: float, seed: int
) -> Iterator[Document]:
    """Yield a document of each file; a share of them asks for a part in the middle.

    Args:
      repository: of the files.
      texts: path -> text.
      fim_share: 0 to 1; which files these are depends on seed and path only.
      seed: of the choice.
    """
    for path, text in texts.items():
        rng = random.Random(f"file/{seed}/{repository.name}/{path}")
        parts: Parts = [text]
        if rng.random() < fim_share and text.count("\n") >= MIN_FIM_LINES:
            parts = fim_parts(text, rng)
        yield make_document("file", parts, _origin(repository, path=path))


def fim_parts(text: str, rng: random.Random) -> Parts:
    """Return a text as prefix, suffix and middle: half the time whole lines, else characters."""
    lines = text.split("\n")
    if rng.random() < 0.5:
        length = rng.randint(1, max(1, int(len(lines) * MAX_MIDDLE_SHARE)))
        first = rng.randint(0, len(lines) - length)
        start = sum(len(line) + 1 for line in lines[:first])
        end = min(len(text), start + sum(len(line) + 1 for line in lines[first : first + length]))
    else:
        length = rng.randint(1, max(1, int(len(text) * MAX_MIDDLE_SHARE)))
        start = rng.randint(0, len(text) - length)
        end = start + length
    before, middle, after = text[:start], text[start:end], text[end:]
    return [
        *(Control(FIM_PREFIX), before),
        *(Control(FIM_SUFFIX), after),
        *(Control(FIM_MIDDLE), middle),
    ]


def repository_documents(
    repository: Repository, texts: Mapping[str, str], fim_share: float, seed: int
) -> Iterator[Document]:
    """Yield documents of several files each; a share of them asks for the middle of the last one.

    Args:
      repository: of the files.
      texts: path -> text.
      fim_share: 0 to 1.
      seed: of the choice.
    """
    for number, paths in enumerate(_portions(import_order(texts), texts)):
        rng = random.Random(f"repository/{seed}/{repository.name}/{number}")
        parts: Parts = [Control(REPOSITORY_NAME), f"{repository.name}\n"]
        for path in paths:
            parts += [Control(FILE_SEPARATOR), f"{path}\n"]
            last = texts[path]
            is_asked = path == paths[-1] and len(paths) > 1 and last.count("\n") >= MIN_FIM_LINES
            if is_asked and rng.random() < fim_share:
                parts += fim_parts(last, rng)
            else:
                parts.append(last if last.endswith("\n") else f"{last}\n")
        yield make_document("repository", parts, _origin(repository, files=len(paths)))


def _origin(repository: Repository, **more: object) -> dict[str, object]:
    return {
        "repository": repository.name,
        "commit": repository.head,
        "licence": repository.licence,
        **more,
    }


def _portions(paths: Sequence[str], texts: Mapping[str, str]) -> Iterator[list[str]]:
    portion: list[str] = []
    size = 0
    for path in paths:
        length = len(texts[path]) + len(path)
        if portion and size + length > MAX_REPOSITORY_CHARACTERS:
            yield portion
            portion, size = [], 0
        portion.append(path)
        size += length
    if portion:
        yield portion


def import_order(texts: Mapping[str, str]) -> list[str]:
    """Return the paths, Python files after what they import; where imports go round, by name."""
    imports = {path: _imports(path, texts) for path in sorted(texts)}
    order: dict[str, None] = {}
    waiting: set[str] = set()
    for root in imports:
        stack = [root]
        while stack:
            path = stack[-1]
            missing = [
                other for other in imports[path] if other not in order and other not in waiting
            ]
            if path in order or not missing:
                order[path] = None
                waiting.discard(path)
                stack.pop()
            else:
                waiting.add(path)
                stack.append(missing[0])
    return list(order)


def _imports(path: str, texts: Mapping[str, str]) -> list[str]:
    """Return the files among these that a Python file imports, sorted."""
    if not path.endswith(".py"):
        return []
    try:
        tree = ast.parse(texts[path])
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []
    package = path.split("/")[:-1]
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            names.add(stem)
            names.update(f"{stem}.{alias.name}" for alias in node.names)
    found = set()
    for name in names:
        stem = name.replace(".", "/")
        for candidate in (f"{stem}.py", f"{stem}/__init__.py", f"src/{stem}.py"):
            if candidate in texts and candidate != path:
                found.add(candidate)
    return sorted(found)
