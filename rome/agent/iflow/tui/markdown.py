"""Markdown that is shown while it is being written: each block once it is whole."""

from __future__ import annotations

import re

_FENCE = re.compile(r"^ {0,3}(`{3,}|~{3,})")


class MarkdownBlocks:
    """Cuts a text that comes in pieces into blocks, at blank lines outside of fenced code.

    Attributes:
      rest: the block that is not whole yet.
    """

    def __init__(self) -> None:
        self.rest = ""

    def feed(self, text: str) -> list[str]:
        """Take a piece; return the blocks that are whole with it."""
        self.rest += text
        blocks = []
        start = place = 0
        fence = ""
        while (end := self.rest.find("\n", place)) >= 0:
            line = self.rest[place:end]
            found = _FENCE.match(line)
            if found and not fence:
                fence = found[1]
            elif fence and line.strip().startswith(fence) and not line.strip(fence[0] + " "):
                fence = ""
            place = end + 1
            if not line.strip() and not fence:
                block = self.rest[start:place]
                if block.strip():
                    blocks.append(block)
                start = place
        self.rest = self.rest[start:]
        return blocks

    def finish(self) -> list[str]:
        """Return what is left, as one block."""
        left, self.rest = self.rest, ""
        return [left] if left.strip() else []
