"""The words of a Dockerfile: quotes, escapes and variables as `docker build` reads them.

The rules are BuildKit's (frontend/dockerfile: shell/lex.go, parser/line_parsers.go), which the
reference describes at https://docs.docker.com/reference/dockerfile/#environment-replacement:
single quotes keep everything, double quotes keep blanks, a backslash keeps the next character, and
$NAME, ${NAME}, ${NAME:-word}, ${NAME:+word}, ${NAME:?word}, ${NAME#pattern}, ${NAME%pattern} and
${NAME/pattern/replacement} are filled in.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

_SPECIAL = frozenset("@*#?-$!0")  # of a shell; never set in a Dockerfile
MAX_DEPTH = 50  # of words in words


class SubstitutionError(ValueError):
    """A word cannot be read; the message says why."""


def expand(text: str, variables: Mapping[str, str]) -> str:
    """Return a word without its quotes and escapes, its variables filled in.

    A variable that is not set is empty.

    Raises:
      SubstitutionError: a quote or a brace is not closed, or a ${...} is none of the known forms.
    """
    return _Reader(text, variables).read()


def split_words(text: str) -> list[str]:
    """Return the words of ENV and ARG, with their quotes and escapes: blanks divide them."""
    words: list[str] = []
    word = ""
    quote = ""
    index = 0
    while index < len(text):
        char = text[index]
        index += 1
        if char.isspace() and not quote:
            words += [word] if word else []
            word = ""
        elif char == "\\" and quote != "'":
            word += text[index - 1 : index + 1] if index < len(text) else ""
            index += 1
        else:
            if char == quote:
                quote = ""
            elif char in "\"'" and not quote:
                quote = char
            word += char
    return words + ([word] if word else [])


class _Reader:
    """Reads one word from left to right."""

    def __init__(self, text: str, variables: Mapping[str, str]) -> None:
        self._text = text
        self._variables = variables
        self._index = 0
        self._depth = 0

    def read(self, end: str = "", keep_escapes: bool = False) -> str:
        """Return what comes before the character `end`, or all; patterns keep their escapes."""
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise SubstitutionError(f"more than {MAX_DEPTH} words in each other")
        parts = []
        while self._index < len(self._text):
            char = self._next()
            if char == end:
                self._depth -= 1
                return "".join(parts)
            if char == "'":
                parts.append(self._single_quoted())
            elif char == '"':
                parts.append(self._double_quoted())
            elif char == "$":
                parts.append(self._variable())
            elif char == "\\":
                parts.append("\\" * keep_escapes + self._next())
            else:
                parts.append(char)
        if end:
            raise SubstitutionError(f"a ${{...}} without its {end!r}")
        return "".join(parts)

    def _next(self) -> str:
        char = self._text[self._index : self._index + 1]
        self._index += 1
        return char

    def _peek(self) -> str:
        return self._text[self._index : self._index + 1]

    def _single_quoted(self) -> str:
        end = self._text.find("'", self._index)
        if end < 0:
            raise SubstitutionError("a single quote is not closed")
        inner = self._text[self._index : end]
        self._index = end + 1
        return inner

    def _double_quoted(self) -> str:
        parts = []
        while self._index < len(self._text):
            char = self._next()
            if char == '"':
                return "".join(parts)
            if char == "$":
                parts.append(self._variable())
            elif char == "\\" and self._peek() and self._peek() in '"$\\':
                parts.append(self._next())
            else:
                parts.append(char)
        raise SubstitutionError("a double quote is not closed")

    def _variable(self) -> str:
        """Return what the text after a dollar sign stands for."""
        if self._peek() != "{":
            name = self._name()
            return self._variables.get(name, "") if name else "$"
        self._next()
        name = self._name()
        if not name:
            raise SubstitutionError("a ${...} without a name")
        value = self._variables.get(name)
        operator = self._next()
        if operator == "}":
            return value or ""
        if operator == ":":
            operator = self._next()
            if operator not in ("-", "+", "?"):
                raise SubstitutionError(f"${{{name}:{operator}...}} is no known form")
            value = value or None
        if operator in ("-", "+", "?"):
            return self._with_default(name, value, operator)
        if operator in ("#", "%"):
            return self._without_affix(value or "", operator)
        if operator == "/":
            return self._replaced(value or "")
        raise SubstitutionError(f"${{{name}{operator}...}} is no known form")

    def _with_default(self, name: str, value: str | None, operator: str) -> str:
        word = self.read("}")
        if operator == "+":
            return "" if value is None else word
        if value is None and operator == "?":
            raise SubstitutionError(f"{name}: {word or 'not set'}")
        return word if value is None else value

    def _without_affix(self, value: str, operator: str) -> str:
        is_greedy = self._peek() == operator
        if is_greedy:
            self._next()
        pattern = _pattern(self.read("}", keep_escapes=True), is_greedy)
        if operator == "#":
            match = re.match(pattern, value, re.DOTALL)
            return value[match.end() :] if match else value
        starts = range(len(value) + 1) if is_greedy else range(len(value), -1, -1)
        for start in starts:
            if re.fullmatch(pattern, value[start:], re.DOTALL):
                return value[:start]
        return value

    def _replaced(self, value: str) -> str:
        is_all = self._peek() == "/"
        if is_all:
            self._next()
        pattern = _pattern(self.read("/", keep_escapes=True), is_greedy=True)
        replacement = self.read("}", keep_escapes=True)
        return re.sub(
            pattern, lambda match: replacement, value, count=0 if is_all else 1, flags=re.DOTALL
        )

    def _name(self) -> str:
        match = re.compile(r"[^\W\d]\w*|\d+").match(self._text, self._index)
        if self._peek() in _SPECIAL and not (match and match[0].isdecimal()):
            return self._next()
        if match is None:
            return ""
        self._index = match.end()
        return match[0]


def _pattern(text: str, is_greedy: bool) -> str:
    """Return a shell's pattern (* and ?, and \\ before what is meant as it is) as a regex."""
    star = ".*" if is_greedy else ".*?"
    found = ""
    characters = iter(text)
    for char in characters:
        if char == "\\":
            char = next(characters, "")
            found += re.escape(char)
        else:
            found += {"*": star, "?": "."}.get(char, re.escape(char))
    return found
