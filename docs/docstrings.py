"""An extension of griffe: indented blocks of docstrings keep their lines in the reference.

A docstring may explain terms in aligned columns:

    wait  a step waits for the slowest episode
    keep  the sample is trained on

Markdown would join these lines into a paragraph. The sections of the Google style (Args, Returns,
...) are indented, too, and stay as they are.
"""

from __future__ import annotations

import re
import textwrap
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
    blocks: list[str] = []
    indented: list[str] = []  # blocks that follow each other, for one fence
    heading = ""
    for block in re.split(r"\n{2,}", text):
        lines = block.splitlines()
        is_indented = bool(lines) and all(line.startswith("  ") for line in lines)
        if is_indented and not SECTION.match(heading):
            indented.append(block)
            continue
        blocks += _fence(indented)
        indented = []
        blocks.append(block)
        heading = next((line for line in reversed(lines) if line[:1].strip()), heading)
    blocks += _fence(indented)
    return "\n\n".join(blocks)


def _fence(blocks: list[str]) -> list[str]:
    """Return the blocks as one block of code; nothing for none."""
    if not blocks:
        return []
    body = textwrap.dedent("\n\n".join(blocks))
    return [f"```text\n{body}\n```"]
