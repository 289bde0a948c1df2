"""Small, plausible bugs in programs by their tokens: shell, JavaScript, SQL and settings.

The counterpart of `envs.tasks.repair.mutate`, which knows Python's syntax tree. An edit may give a
program that does the same or does not run at all; the verifier's cases decide.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Collection, Iterator

from envs.tasks.repair.mutate import Edit, candidates_of, is_another_program

_SWAPS = {
    "shell": {
        "-lt": "-le", "-le": "-lt", "-gt": "-ge", "-ge": "-gt", "-eq": "-ne", "-ne": "-eq",
        "-z": "-n", "&&": "||", "==": "!=", "!=": "==", "<=": "<", ">=": ">",
        "head": "tail", "tail": "head", "NR": "NF", "$1": "$2", "$2": "$1", "$NF": "$1",
    },
    "javascript": {
        "===": "!==", "!==": "===", "<=": "<", ">=": ">", "&&": "||", "||": "&&",
        "true": "false", "false": "true", "break": "continue",
    },
    "sql": {
        "ASC": "DESC", "DESC": "ASC", "AND": "OR", "OR": "AND", "SUM": "MAX", "MAX": "MIN",
        "MIN": "MAX", "COUNT": "SUM", "AVG": "MAX", "LEFT JOIN": "JOIN", "DISTINCT": "",
        ">=": ">", "<=": "<", "NOT NULL": "NULL", "IN": "NOT IN", "EXISTS": "NOT EXISTS",
    },
    "config": {"yes": "no", "no": "yes", "true": "false", "false": "true"},
}  # fmt: skip
_NUMBER = re.compile(r"(?<![\w.$@-])\d{1,4}(?![\w.])")
_TEXT = re.compile(r"'([^'\n$\\]{2,24})'|\"([^\"\n$\\]{2,24})\"")
_ARITHMETIC = re.compile(r"(?<=[\w)\]] )[-+*/%](?= [\w($])")
_COMPARED = re.compile(r"(?<=[\w)\]] )[<>](?= [\w($\"'-])")
_OPTION = re.compile(r"(?<= )-[a-zA-Z](?= |$)", re.MULTILINE)
_STAGE = re.compile(r" \| [^|\n;()]+(?= \||$)", re.MULTILINE)
_SETTING = re.compile(r"^[\w.-]+\s*=\s*(\S.*)$", re.MULTILINE)


def mutants_of(text: str, language: str) -> list[Edit]:
    """Return the edits of a program, ordered by their place; each gives another text.

    Args:
      text: the program.
      language: "python", "shell", "javascript", "sql" or "config".

    Raises:
      ValueError: the language is unknown, or the program is not valid Python.
    """
    if language == "python":
        return [edit for edit in _python_edits(text) if is_another_program(text, edit)]
    if language not in _SWAPS:
        raise ValueError(f"language {language!r} is none of python, {', '.join(_SWAPS)}")
    found: set[Edit] = set()
    for name, operator in OPERATORS.items():
        for start, end, replacement in operator(text, language):
            if not _in_comment(text, start) and text[start:end] != replacement:
                found.add(Edit(start, end, replacement, name))
    return sorted(found)


def choose_edits(
    text: str, language: str, count: int, rng: random.Random, lines: Collection[int] = ()
) -> list[Edit]:
    """Return up to `count` mutants of a program, all kinds of bugs in turn.

    Only those that are chosen are compared with the program, for that parses the whole text: all
    edits of a large module would take minutes.

    Args:
      text: the program.
      language: as for `mutants_of`.
      count: of mutants.
      rng: of the choice.
      lines: that may be changed; empty for all.

    Raises:
      ValueError: as for `mutants_of`.
    """
    is_python = language == "python"
    by_kind: dict[str, list[Edit]] = {}
    for edit in _python_edits(text) if is_python else mutants_of(text, language):
        if not lines or text.count("\n", 0, edit.start) + 1 in lines:
            by_kind.setdefault(edit.operator, []).append(edit)
    for edits in by_kind.values():
        rng.shuffle(edits)
    chosen: list[Edit] = []
    while len(chosen) < count and any(by_kind.values()):
        for kind in sorted(by_kind):
            if not by_kind[kind] or len(chosen) >= count:
                continue
            edit = by_kind[kind].pop()
            if not is_python or is_another_program(text, edit):
                chosen.append(edit)
    return chosen


def _python_edits(text: str) -> list[Edit]:
    """Return the edits of a Python program; some may give the same program, or none."""
    try:
        return [edit for edit in candidates_of(text) if not _is_symmetric(text, edit)]
    except (SyntaxError, RecursionError) as error:
        raise ValueError(f"not valid Python: {error}") from error


def _is_symmetric(text: str, edit: Edit) -> bool:
    """Return whether an edit swaps arguments whose order does not matter."""
    return edit.operator == "swapped_arguments" and text[: edit.start].endswith(("max(", "min("))


def _in_comment(text: str, place: int) -> bool:
    line = text[text.rfind("\n", 0, place) + 1 : place].lstrip()
    return line.startswith(("#", "//", "--"))


Change = tuple[int, int, str]


def swapped_word(text: str, language: str) -> Iterator[Change]:
    """Use the opposite or a neighbour of an operator or a keyword."""
    for old, new in _SWAPS[language].items():
        left = r"(?<![\w$-])" if old[0].isalnum() or old[0] in "-$" else r"(?<![=<>!&|])"
        right = r"(?![\w])" if old[-1].isalnum() else r"(?![=<>&|])"
        for match in re.finditer(left + re.escape(old) + right, text):
            yield match.start(), match.end(), new


def changed_number(text: str, language: str) -> Iterator[Change]:
    """Change a number by one."""
    for match in _NUMBER.finditer(text):
        yield match.start(), match.end(), str(int(match[0]) + 1)
        if int(match[0]) > 0:
            yield match.start(), match.end(), str(int(match[0]) - 1)


def shortened_text(text: str, language: str) -> Iterator[Change]:
    """Drop the last character of a quoted text."""
    for match in _TEXT.finditer(text):
        yield match.end() - 2, match.end() - 1, ""


def other_operator(text: str, language: str) -> Iterator[Change]:
    """Change an arithmetic operator or a strict comparison."""
    opposite = {"+": "-", "-": "+", "*": "+", "/": "*", "%": "/", "<": "<=", ">": ">="}
    for pattern in (_ARITHMETIC, _COMPARED):
        for match in pattern.finditer(text):
            yield match.start(), match.end(), opposite[match[0]]


def dropped_part(text: str, language: str) -> Iterator[Change]:
    """Drop an option of a command, a stage of a pipeline, or a setting."""
    if language == "shell":
        for pattern in (_OPTION, _STAGE):
            for match in pattern.finditer(text):
                yield match.start(), match.end(), ""
    if language == "config":
        for match in _SETTING.finditer(text):
            yield match.start(), match.end() + 1, ""
            yield match.start(1), match.end(1), match[1][:-1] or "x"


OPERATORS: dict[str, Callable[[str, str], Iterator[Change]]] = {
    function.__name__: function
    for function in (swapped_word, changed_number, shortened_text, other_operator, dropped_part)
}
