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
