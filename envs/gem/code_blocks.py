"""Blocks of code in a model's text: fenced ones, and those between two tags.

A fence is a run of 3 to 16 backticks. A block ends at a line that begins with a fence of at
least its own length and is neither another opening (```python) nor inside an open here-document of
a shell block or an open triple-quoted string of a Python block; without such a line, at the first
line that ends with the fence. A block that does not end is none.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

SHELL = ("bash", "sh")
PYTHON = ("python", "py", "python3")
_OPENING = re.compile(
    r"(?<!`)(?P<fence>`{3,16})(?!`)(?:(?P<word>[\w+#.-]*)[ \t]*\r?\n|(?P<inline>[\w+#.-]+)[ \t]+)"
)
_PYTHON_LINE = re.compile(r"python[ \t]*\r?\n")
_LINE = re.compile(r"[^\n]*\n|[^\n]+")
_HERE_DOCUMENT = re.compile(r"(?<!<)<<(?P<tabs>-?)[ \t]*(?P<quote>['\"\\]?)(?P<end>\w[\w.-]*)")
_QUOTES = re.compile(r"\\.|#|'''|\"\"\"|['\"]", re.DOTALL)


class Block(NamedTuple):
    """A block of code in a text.

    Attributes:
      language: the word after the fence, in lower case, or the tag; "" where there is none.
      content: the code, with its last line break.
      end: where the block with its closing mark ends in the text.
    """

    language: str
    content: str
    end: int


def find_blocks(text: str, tag: str, languages: Sequence[str]) -> list[Block]:
    """Return the tagged blocks, and the fenced ones of these languages, each kind in order."""
    fenced = [block for block in fenced_blocks(text) if block.language in languages]
    return [*tagged_blocks(text, tag), *fenced]


def tagged_blocks(text: str, tag: str) -> list[Block]:
    """Return the blocks between <tag> and </tag>.

    A block ends at the last </tag> before the next <tag>, so that code may spell the tag that
    would end it.
    """
    opening = f"<{tag}>"
    closing = f"</{tag}>"
    blocks = []
    start = text.find(opening)
    while start >= 0:
        content_start = start + len(opening)
        following = text.find(opening, content_start)
        limit = following if following >= 0 else len(text)
        end = text.rfind(closing, content_start, limit)
        if end >= 0:
            blocks.append(Block(tag, text[content_start:end], end + len(closing)))
        start = following
    return blocks


def fenced_blocks(text: str) -> list[Block]:
    """Return all complete fenced blocks of a text, in order."""
    blocks = []
    position = 0
    last_lines = {line.strip(): start for start, line in _lines(text, 0)}
    without_end = (
        len(text) + 1
    )  # a fence of this length has none from here on, nor has a longer one
    while (opening := _OPENING.search(text, position)) is not None:
        position = opening.end("fence")
        fence = opening["fence"]
        if opening["inline"]:
            block = _read_inline(text, opening)
        elif len(fence) >= without_end or _ends_a_sentence(text, opening):
            continue
        else:
            block = _read_block(text, opening, last_lines)
            if block is None:
                without_end = len(fence)
        if block is not None:
            blocks.append(block)
            position = block.end
    return blocks


def _ends_a_sentence(text: str, opening: re.Match[str]) -> bool:
    """Return whether a fence without a language has words before it on its line."""
    line_start = text.rfind("\n", 0, opening.start()) + 1
    return not opening["word"] and bool(text[line_start : opening.start()].strip())


def _read_inline(text: str, opening: re.Match[str]) -> Block | None:
    """Return a block whose closing fence is on the line of the opening one."""
    line_end = text.find("\n", opening.end())
    limit = line_end if line_end >= 0 else len(text)
    end = text.find(opening["fence"], opening.end(), limit)
    if end < 0:
        return None
    content = text[opening.end() : end]
    return Block(opening["inline"].lower(), content, end + len(opening["fence"]))


def _read_block(text: str, opening: re.Match[str], last_lines: dict[str, int]) -> Block | None:
    """Return the block that an opening begins; None if it does not end."""
    fence = opening["fence"]
    language = opening["word"].lower()
    start = opening.end()
    if not language and (named := _PYTHON_LINE.match(text, start)):
        language = "python"  # gem-llm takes the language on a line of its own, too
        start = named.end()
    ends = []
    if language in SHELL:
        ends.append(_find_end(text, start, fence, _HereDocuments(last_lines).is_open_after))
    if language in PYTHON:
        ends.append(_find_end(text, start, fence, _Strings().is_open_after))
    # where a string or a here-document never ends
    ends.append(_find_end(text, start, fence, lambda line, position: False))
    end = next((end for end in ends if end is not None), None)
    if end is None:
        return None
    content = text[start : end[0]]
    if opening[0].endswith("\r\n"):
        content = content.replace("\r\n", "\n")
    return Block(language, content, end[1])


def _find_end(
    text: str, start: int, fence: str, is_open_after: Callable[[str, int], bool]
) -> tuple[int, int] | None:
    """Return where the content ends, and where the closing fence does.

    Args:
      text: the whole text.
      start: of the content.
      fence: the opening fence.
      is_open_after: called with each line of the content and where it begins; returns whether the
        next line still belongs to something that it opens.
    """
    closing = re.compile(rf"[ \t]*{fence}`*(?=\s|\Z)")
    reopening = re.compile(rf"[ \t]*{fence}`*[\w+#.-]")
    ends_inline: tuple[int, int] | None = None
    is_open = False
    for position, line in _lines(text, start):
        if not is_open:
            if match := closing.match(line):
                return position, position + match.end()
            if ends_inline and reopening.match(line):
                return ends_inline
            content = line.rstrip()
            if ends_inline is None and content.endswith(fence) and not reopening.match(line):
                end = position + len(content)
                ends_inline = end - len(fence), end
        is_open = is_open_after(line, position)
    return ends_inline


def _lines(text: str, start: int) -> Iterator[tuple[int, str]]:
    """Yield the lines from `start` on, each with the place where it begins."""
    return ((match.start(), match[0]) for match in _LINE.finditer(text, start))


class _HereDocuments:
    """Tells within a shell script whether a here-document is open.

    `last_lines` maps every line of the text to where it stands last: a here-document whose end
    never comes is none.
    """

    def __init__(self, last_lines: dict[str, int]) -> None:
        self._last_lines = last_lines
        self._waiting: list[tuple[str, bool]] = []

    def is_open_after(self, line: str, position: int) -> bool:
        """Take the next line, and return whether a here-document is open after it."""
        if self._waiting:
            end, strips_tabs = self._waiting[0]
            content = line.rstrip("\r\n")
            if (content.lstrip("\t") if strips_tabs else content) == end:
                self._waiting.pop(0)
            return bool(self._waiting)
        for match in _HERE_DOCUMENT.finditer(line):
            if self._last_lines.get(match["end"], -1) > position:
                self._waiting.append((match["end"], bool(match["tabs"])))
        return bool(self._waiting)


class _Strings:
    """Tells within a Python program whether a triple-quoted string is open."""

    def __init__(self) -> None:
        self._quote = ""

    def is_open_after(self, line: str, position: int) -> bool:
        """Take the next line, and return whether such a string is open after it."""
        for match in _QUOTES.finditer(line):
            mark = match[0]
            if self._quote:
                if mark == self._quote:
                    self._quote = ""
            elif mark == "#":
                break
            elif not mark.startswith("\\"):
                self._quote = mark
        if len(self._quote) == 1:  # a plain string ends with its line
            self._quote = ""
        return bool(self._quote)
