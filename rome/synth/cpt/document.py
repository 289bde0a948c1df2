"""A document of a corpus: text, the places of Qwen's control tokens in it, and where it is from."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

KINDS = ("localisation", "repair", "tests", "steps", "file", "repository", "trajectory")
FIM_PREFIX = "<|fim_prefix|>"
FIM_SUFFIX = "<|fim_suffix|>"
FIM_MIDDLE = "<|fim_middle|>"
REPOSITORY_NAME = "<|repo_name|>"
FILE_SEPARATOR = "<|file_sep|>"


class Control(NamedTuple):
    """A control token, as opposed to text that spells one."""

    token: str


class SetAside(NamedTuple):
    """An input that is not used: its file or repository, the record in it, and the reason."""

    file: str
    record: str
    reason: str


class Fault(str):
    """A reason that lies with the machine and not with the input: a resumed run tries again."""


def shown_path(path: str) -> str:
    """Return a path that can be written as UTF-8, on one line."""
    return " ".join(path.encode(errors="backslashreplace").decode().splitlines())


@dataclasses.dataclass(frozen=True)
class Document:
    """A text to train on.

    Attributes:
      kind: one of KINDS.
      text: all of it, control tokens spelled out.
      control: (first character, end) of each control token in it.
      origin: where it is from: repository, commit, path, licence and the like.
    """

    kind: str
    text: str
    control: tuple[tuple[int, int], ...] = ()
    origin: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def source(self) -> str:
        """Return the text without control tokens, each middle back in its place.

        It is what the document was made of, by which copies and evaluation tasks are found.
        """
        parts: list[str] = []
        suffix = ""
        # A control token, and the text up to the next one.
        starts = [0, *(end for _, end in self.control)]
        ends = [*(start for start, _ in self.control), len(self.text)]
        tokens = ["", *(self.text[start:end] for start, end in self.control)]
        for token, start, end in zip(tokens, starts, ends, strict=True):
            if token == FIM_SUFFIX:
                suffix = self.text[start:end]
                continue
            # Other control tokens separate words, as they do in the text.
            separator = "" if token in ("", FIM_PREFIX, FIM_MIDDLE) else "\n"
            parts.append(f"{separator}{self.text[start:end]}")
            if token == FIM_MIDDLE:
                parts.append(suffix)
                suffix = ""
        return "".join([*parts, suffix])

    def to_line(self) -> str:
        """Return the document as a line of JSON, which `rome.data.text` reads."""
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False) + "\n"


def make_document(
    kind: str, parts: Iterable[str | Control], origin: dict[str, Any] | None = None
) -> Document:
    """Return the document of these parts, one after the other."""
    text = ""
    control = []
    for part in parts:
        if isinstance(part, Control):
            control.append((len(text), len(text) + len(part.token)))
            text += part.token
        else:
            text += part
    return Document(kind, text, tuple(control), origin or {})


def document_of(value: dict[str, Any]) -> Document:
    """Return the document of a line's JSON object."""
    control = tuple((start, end) for start, end in value["control"])
    return Document(value["kind"], value["text"], control, value["origin"])


def read_documents(lines: Iterable[str]) -> Iterator[Document]:
    """Yield the documents of lines."""
    return (document_of(json.loads(line)) for line in lines)
