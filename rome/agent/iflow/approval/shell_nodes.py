"""Nodes of bash's syntax tree, and the texts that they stand for."""

from __future__ import annotations

import re
from collections.abc import Iterator

import tree_sitter

_ESCAPES = {"a": "\a", "b": "\b", "e": "\x1b", "E": "\x1b", "f": "\f", "n": "\n", "r": "\r"}
_ESCAPES |= {"t": "\t", "v": "\v", "\\": "\\", "'": "'", '"': '"', "?": "?"}
_ANSI = re.compile(
    r"\\(?:x([0-9a-fA-F]{1,2})|([0-7]{1,3})|u([0-9a-fA-F]{1,4})|U([0-9a-fA-F]{1,8})|(.))", re.S
)
EXPANSIONS = {
    "simple_expansion", "expansion", "command_substitution", "process_substitution",
    "arithmetic_expansion",
}  # fmt: skip


def text_of(node: tree_sitter.Node) -> str:
    """Return the text of a node."""
    return (node.text or b"").decode(errors="replace")


def all_below(node: tree_sitter.Node) -> Iterator[tree_sitter.Node]:
    """Yield a node and all below it."""
    waiting = [node]
    while waiting:
        one = waiting.pop()
        yield one
        waiting += reversed(one.children)


def leaves_of(node: tree_sitter.Node) -> Iterator[tree_sitter.Node]:
    """Yield the nodes that stand for text: those without children, and quoted ones whole."""
    waiting = [node]
    while waiting:
        one = waiting.pop()
        if one.child_count and one.type not in ("string", "heredoc_body", "ansi_c_string"):
            waiting += reversed(one.children)
        else:
            yield one


def members_of(node: tree_sitter.Node) -> list[tree_sitter.Node]:
    """Return the commands of a pipeline, those of a pipeline in it included."""
    members = []
    for child in node.named_children:
        members += members_of(child) if child.type == "pipeline" else [child]
    return members


def is_word(node: tree_sitter.Node) -> bool:
    """Return whether a node is a word of a command."""
    return node.type in {
        "word", "string", "raw_string", "ansi_c_string", "concatenation", "number",
        "extglob_pattern", *EXPANSIONS,
    }  # fmt: skip


def pipes_on(node: tree_sitter.Node) -> bool:
    """Return whether a pipeline goes on behind a here-document."""
    return any(child.type == "pipeline" for child in node.named_children)


def unescape(text: str) -> str:
    """Return the text of $'...'."""

    def replace(match: re.Match[str]) -> str:
        if match[5]:
            return _ESCAPES.get(match[5], match[0])
        digits = match[1] or match[3] or match[4]
        number = int(digits, 16) if digits else int(match[2], 8) & 255
        return chr(number) if number < 0x110000 and not 0xD800 <= number < 0xE000 else "\ufffd"

    return _ANSI.sub(replace, text)
