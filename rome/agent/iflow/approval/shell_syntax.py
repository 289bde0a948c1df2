"""A command line of bash as the simple commands that it runs, by its syntax tree.

What the tree does not say for certain is said so: a word that only the running shell knows is not
static, and a construct that is not understood is a problem of the whole line. A rule that allows
never applies to either (`rome.agent.iflow.approval.policy`).
"""

from __future__ import annotations

import dataclasses
import functools
import re
import unicodedata
from collections.abc import Sequence

import tree_sitter
import tree_sitter_bash

from rome.agent.iflow.approval.shell_commands import Line, Redirect, SimpleCommand, Word
from rome.agent.iflow.approval.shell_nodes import (
    EXPANSIONS,
    all_below,
    is_word,
    leaves_of,
    members_of,
    pipes_on,
    text_of,
    unescape,
)

MAX_LENGTH = 32_000  # characters of a line that is parsed
MAX_PIPES = 1500  # in it: the parser's time grows with their square
UNREADABLE = "too long to be judged, or no text"
MAX_DEPTH = 200  # of the tree
_EVALUATES = re.compile("-(eq|ne|lt|le|gt|ge|v|R)")  # its words, as arithmetic
_GAP = re.compile(r"(?:[ \t\n]|\\\n)*")
_RESERVED = frozenset({"{", "}", "if", "then", "fi", "do", "done", "esac", "else", "elif", "!"})
_BEFORE_COMMENT = (b" ", b"\t", b"\n", b";", b"&", b"|", b"(", b")")
# Statements that only hold others.
_HOLDERS = {
    "program", "list", "pipeline", "subshell", "compound_statement", "if_statement", "else_clause",
    "elif_clause", "while_statement", "do_group", "case_statement", "case_item", "negated_command",
    "command_substitution", "process_substitution",
}  # fmt: skip


@functools.lru_cache(maxsize=512)
def parse(text: str) -> Line:
    """Return the commands of a line; what is not understood is a problem, never an error."""
    root = parse_tree(text)
    if root is None:
        return Line((), (UNREADABLE,))
    walker = _Walker(text.encode())
    odd = next((char for char in text if _is_odd(char)), "")
    if odd:
        walker.problems.append(f"the character {odd!r}, which shells and people read differently")
    walker.check_gaps(root)
    walker.statement(root, -1, 0)
    return Line(tuple(walker.commands), tuple(dict.fromkeys(walker.problems)))


def parse_tree(text: str) -> tree_sitter.Node | None:
    """Return the root of a text's syntax tree; None where it is too long or no text."""
    if len(text) > MAX_LENGTH or text.count("|") > MAX_PIPES:
        return None
    try:
        return _parser().parse(text.encode()).root_node
    except UnicodeEncodeError:  # half of a surrogate pair
        return None


def _is_odd(char: str) -> bool:
    """Return whether a character is a control, a blank or a mark that is not seen."""
    if char in "\n\t ":
        return False
    return char < " " or unicodedata.category(char) in ("Cc", "Cf", "Zs", "Zl", "Zp", "Cn")


@functools.cache
def _parser() -> tree_sitter.Parser:
    return tree_sitter.Parser(tree_sitter.Language(tree_sitter_bash.language()))


class _Walker:
    """Walks a tree and collects commands and problems."""

    def __init__(self, source: bytes) -> None:
        self.commands: list[SimpleCommand] = []
        self.problems: list[str] = []
        self._source = source
        self._pipes = 0

    def check_gaps(self, root: tree_sitter.Node) -> None:
        """Note a problem where a part of the text is in no leaf of the tree, or the tree is torn.

        A tree whose leaves pass over characters does not say what bash will read.
        """
        if root.has_error:
            self.problems.append("its syntax is not understood")
        end = 0
        for leaf in leaves_of(root):
            if leaf.is_missing:
                self.problems.append("its syntax is not complete")
            if not _GAP.fullmatch(self._source[end : leaf.start_byte].decode(errors="replace")):
                self.problems.append("a part of it is not understood")
            before = self._source[leaf.start_byte - 1 : leaf.start_byte]
            if leaf.type == "comment" and before not in (b"", *_BEFORE_COMMENT):
                self.problems.append("a word that looks like a comment")
            end = max(end, leaf.end_byte)
        if not _GAP.fullmatch(self._source[end:].decode(errors="replace")):
            self.problems.append("a part of it is not understood")

    # -- statements

    def statement(self, node: tree_sitter.Node, pipe: int, place: int, depth: int = 0) -> None:
        """Collect the commands of a statement."""
        kind = node.type
        if depth > MAX_DEPTH:
            self.problems.append("nested too deeply")
        elif kind == "command":
            self._command(node, (), pipe, place)
        elif kind == "redirected_statement":
            self._redirected(node, pipe, place, depth)
        elif kind.endswith("_redirect"):  # alone, as in $(<file)
            self.commands.append(SimpleCommand(redirects=self._redirects([node], pipe, place)))
        elif kind == "pipeline":
            self._pipeline(node, depth)
        elif kind in ("declaration_command", "unset_command"):
            self._declaration(node)
        elif kind in ("variable_assignment", "variable_assignments"):
            parts = [node] if kind == "variable_assignment" else node.named_children
            self.commands.append(SimpleCommand(assignments=self._assignments(parts)))
        elif kind == "test_command":
            self._test(node)
        elif kind in ("for_statement", "select_statement"):
            self._for(node, depth)
        elif kind == "function_definition":
            self.problems.append("it defines a function, which changes what a name means")
            self._inside(node, -1, depth)
        elif kind in _HOLDERS:
            if node.children and node.children[0].type == "((":
                self.problems.append("arithmetic, which can run commands")
            self._inside(node, pipe, depth, place)
        elif node.is_named and kind not in ("comment", "heredoc_body", "heredoc_end"):
            self.problems.append(f"{kind.replace('_', ' ')}: not understood")
            for child in node.named_children:
                if is_word(child):
                    self._nested(child)
                elif child.named_child_count:
                    self.statement(child, -1, 0, depth + 1)

    def _inside(self, node: tree_sitter.Node, pipe: int, depth: int, place: int = 0) -> None:
        for child in node.named_children:
            if child.type in ("variable_name", "comment"):
                continue
            if node.type in ("case_statement", "case_item") and is_word(child):
                self._word(child)
            elif node.type == "function_definition" and child.type == "word":
                continue
            else:
                self.statement(child, pipe, place, depth + 1)

    def _pipeline(self, node: tree_sitter.Node, depth: int) -> None:
        self._pipes += 1
        pipe = self._pipes
        for place, child in enumerate(members_of(node)):
            self.statement(child, pipe, place, depth + 1)

    def _for(self, node: tree_sitter.Node, depth: int) -> None:
        """Take `for name in words`: the name becomes a variable of unknown value."""
        for number, child in enumerate(node.children):
            field = node.field_name_for_child(number)
            if field == "variable":
                value = Word("", is_static=False)
                self.commands.append(SimpleCommand(assignments=((text_of(child), value),)))
            elif field == "value":
                self._word(child)
            elif child.is_named and child.type != "comment":
                self.statement(child, -1, 0, depth + 1)

    def _redirected(self, node: tree_sitter.Node, pipe: int, place: int, depth: int) -> None:
        redirects = [child for child in node.named_children if child.type.endswith("_redirect")]
        body = node.child_by_field_name("body")
        if any(pipes_on(redirect) for redirect in redirects) and pipe < 0:
            self._pipes += 1
            pipe = self._pipes
        if body is not None and body.type == "command":
            self._command(body, redirects, pipe, place)
            return
        if body is not None:
            self.statement(body, pipe, place, depth + 1)
        taken = self._redirects(redirects, pipe, place)
        self.commands.append(SimpleCommand(redirects=taken, pipe=pipe, place=place))

    def _command(
        self, node: tree_sitter.Node, outer: Sequence[tree_sitter.Node], pipe: int, place: int
    ) -> None:
        words, assignments, redirects = [], [], list(outer)
        for child in node.children:  # == is an argument, and not a named node
            if child.type == "variable_assignment":
                assignments.append(child)
            elif child.type.endswith("_redirect"):
                redirects.append(child)
            elif child.type == "command_name":
                words.append(self._word(child.named_children[0]))
            elif child.type == "subshell":
                self.problems.append("a subshell inside a command")
                self.statement(child, -1, 0)
            else:
                words.append(self._word(child))
        self._check_words(node)
        if words and re.match(r"[A-Za-z_]\w*(\[.*\])?\+?=", words[0].text):
            self.problems.append("an assignment in place of a program")
        if words and words[0].text in _RESERVED:
            self.problems.append("a word of the shell in place of a program")
        if words and words[0].has_pattern:
            words[0] = dataclasses.replace(words[0], is_static=False)
        taken = self._assignments(assignments)
        made = SimpleCommand(tuple(words), taken, pipe=pipe, place=place)
        number = len(self.commands)
        self.commands.append(made)  # before what its redirections hold, as pipelines follow them
        files = self._redirects(redirects, pipe, place)
        self.commands[number] = dataclasses.replace(made, redirects=files)

    def _check_words(self, node: tree_sitter.Node) -> None:
        """Note words that touch each other: the shell reads them as one."""
        before = None
        for child in node.children:
            if before is not None and not child.type.endswith("_redirect"):
                gap = self._source[before.end_byte : child.start_byte].replace(b"\\\n", b"")
                if not gap:
                    self.problems.append("words that touch")
                if b"\n" in gap:
                    self.problems.append("one command on several lines")
            before = child

    def _declaration(self, node: tree_sitter.Node) -> None:
        """Take export, declare, local, readonly, typeset and unset."""
        words = [Word(text_of(node.children[0]))]
        parts = []
        for child in node.named_children:
            if child.type == "variable_assignment":
                parts.append(child)
            elif child.type == "variable_name":
                words.append(Word(text_of(child)))
            else:
                words.append(self._word(child))
        self.commands.append(SimpleCommand(tuple(words), self._assignments(parts)))

    def _test(self, node: tree_sitter.Node) -> None:
        """Take `[ ... ]` and `[[ ... ]]`; comparing numbers evaluates them, which can run code."""
        for part in all_below(node):
            if part.type == "test_operator" and _EVALUATES.fullmatch(text_of(part)):
                self.problems.append("a test that evaluates arithmetic, which can run commands")
        self._nested(node)
        self.commands.append(SimpleCommand((Word("test"),)))

    # -- parts of a command

    def _assignments(self, nodes: list[tree_sitter.Node]) -> tuple[tuple[str, Word], ...]:
        taken = []
        for node in nodes:
            name = node.child_by_field_name("name")
            value = node.child_by_field_name("value")
            if name is None or name.type != "variable_name":  # a[i]=x evaluates i
                self.problems.append("an assignment to a part of an array")
                self._nested(node)
            elif not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", text_of(name)):
                self.problems.append("an assignment to what is no name of a variable")
            word = Word("") if value is None else self._word(value)
            taken.append((text_of(name) if name is not None else "", word))
        return tuple(taken)

    def _redirects(
        self, nodes: list[tree_sitter.Node], pipe: int, place: int
    ) -> tuple[Redirect, ...]:
        taken = []
        for node in nodes:
            if node.type == "heredoc_redirect":
                taken += self._heredoc(node, pipe, place)
                continue
            operator = next((child.type for child in node.children if child.type[:1] in "<>&"), "?")
            targets = [child for child in node.named_children if child.type != "file_descriptor"]
            if len(targets) > 1:
                self.problems.append("a redirection with several words")
            target = self._word(targets[0]) if targets else Word("-")
            taken.append(Redirect(operator, target))
        return tuple(taken)

    def _heredoc(self, node: tree_sitter.Node, pipe: int, place: int) -> list[Redirect]:
        """Take `<<END`: its body is data, and the rest of its line stands behind it in the tree."""
        body = Word("")
        more = []
        for child in node.named_children:
            if child.type in ("heredoc_start", "heredoc_end", "file_descriptor"):
                continue
            if child.type == "heredoc_body":
                is_static = not any(part.type in EXPANSIONS for part in all_below(child))
                body = Word(text_of(child), is_static)
                self._nested(child)
            elif child.type == "pipeline":
                for offset, part in enumerate(members_of(child), 1):
                    self.statement(part, pipe, place + offset)
            elif child.type.endswith("_redirect"):
                more.append(child)
            elif is_word(child):
                self.problems.append("arguments after a here-document")
                self._nested(child)
            else:
                self.statement(child, -1, 0)
        return [Redirect("<<", body), *self._redirects(more, pipe, place)]

    def _word(self, node: tree_sitter.Node) -> Word:
        """Return a word, and collect the commands that it runs."""
        text, is_static, has_pattern = self._value(node)
        if not is_static:
            self._nested(node)
            return Word(text_of(node), False, has_pattern)
        return Word(text, True, has_pattern, has_pattern and text_of(node)[:1] in "*?[{@!+")

    def _value(self, node: tree_sitter.Node) -> tuple[str, bool, bool]:
        """Return (text, whether it is static, whether it has a pattern) of a part of a word."""
        raw = text_of(node)
        kind = node.type
        if kind == "concatenation":
            parts = [self._value(child) for child in node.children]
            braces = [child for child in node.children if child.type in ("word", "{", "}")]
            has_brace = any(text_of(child) in "{}" for child in braces)
            text = "".join(part for part, _, _ in parts)
            is_static = all(static for _, static, _ in parts)
            return text, is_static, has_brace or any(pattern for _, _, pattern in parts)
        if kind in ("word", "number", "variable_name", "{", "}", "file_descriptor") or (
            not node.is_named
        ):
            text = re.sub(r"\\(.)", lambda match: match[1].strip("\n"), raw, flags=re.S)
            bare = re.sub(r"\\.", "", raw, flags=re.S)
            if re.search(r"\s", bare):
                self.problems.append("a word with blanks")
            if raw == "$":  # $"...", which a locale changes
                return raw, False, False
            return text, not node.named_child_count, bool(re.search(r"[*?\[{]", bare))
        if kind == "raw_string":
            return raw[1:-1], True, False
        if kind == "ansi_c_string":
            return unescape(raw[2:-1]), True, False
        if kind == "string":
            is_static = not any(part.type in EXPANSIONS for part in all_below(node))
            text = re.sub(r"\\([$`\"\\])", r"\1", raw[1:-1].replace("\\\n", ""))
            return text, is_static, False
        return raw, False, kind in ("brace_expression", "extglob_pattern", "regex")

    def _nested(self, node: tree_sitter.Node) -> None:
        """Collect the commands of substitutions in a node, however deep."""
        if node.type in ("command_substitution", "process_substitution"):
            self.statement(node, -1, 0)
            return
        self._check_expansion(node)
        for child in node.children:
            self._nested(child)

    def _check_expansion(self, node: tree_sitter.Node) -> None:
        """Note expansions that can run what a variable holds."""
        if node.type == "expansion" and not re.fullmatch(r"\$\{[#]?\w+\}", text_of(node)):
            plain = re.fullmatch(r"\$\{\w+(:?[-+?]|%%?|##?|\^\^?|,,?)[^@]*\}", text_of(node), re.S)
            if not plain:
                self.problems.append("an expansion that can run or change what a variable holds")
        if node.type == "arithmetic_expansion" and re.search(r"[A-Za-z_]", text_of(node)):
            self.problems.append("arithmetic, which can run commands")
