"""An extension of griffe: indented blocks of docstrings keep their lines in the reference.

A docstring may explain terms in aligned columns:

    wait  a step waits for the slowest episode
    keep  the sample is trained on

Markdown would join these lines into a paragraph. The sections of the Google style (Args, Returns,
...) are indented, too, and stay as they are.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

SECTION = re.compile(r"(Args|Arguments|Attributes|Example|Examples|Raises|Returns|Yields|Note):$")


class KeepIndentedBlocks(griffe.Extension):
    """Turns indented blocks of docstrings into blocks of code."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite the docstring of one object."""
        if obj.docstring is not None:
            obj.docstring.value = fence_indented_blocks(obj.docstring.value)


def fence_indented_blocks(text: str) -> str:
    """Return a docstring whose indented blocks outside of sections are fenced as code."""
    blocks = re.split(r"\n{2,}", text)
    heading = ""
    for number, block in enumerate(blocks):
        lines = block.splitlines()
        is_indented = bool(lines) and all(line.startswith("  ") for line in lines)
        if is_indented and not SECTION.match(heading):
            blocks[number] = "\n".join(["```text", *_dedent(lines), "```"])
        for line in lines:
            if line and not line.startswith(" "):
                heading = line
    return "\n\n".join(blocks)


def _dedent(lines: list[str]) -> list[str]:
    margin = min(len(line) - len(line.lstrip()) for line in lines)
    return [line[margin:] for line in lines]
