"""An instance of SWE-bench or SWE-bench Verified: its fields, read and checked.

Field names are those of the data set (princeton-nlp/SWE-bench).
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re

from envs.tasks.rows import Row, read_rows

FIELDS = (
    "instance_id",
    "repo",
    "base_commit",
    "patch",
    "test_patch",
    "problem_statement",
    "FAIL_TO_PASS",
    "PASS_TO_PASS",
)
_COMMIT = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_NAME = re.compile(r"[\w][\w.-]*")
_REPO = re.compile(r"[\w.-]+(?:/[\w.-]+)*")


@dataclasses.dataclass(frozen=True)
class Instance:
    """One instance.

    Tests in `fail_to_pass` fail before the patch and pass after it; those in `pass_to_pass` pass
    before and after. Both are node ids of pytest.
    """

    instance_id: str
    repo: str  # owner/name, or a folder beside the data set's file
    base_commit: str
    patch: str = dataclasses.field(repr=False)
    test_patch: str = dataclasses.field(repr=False)
    problem_statement: str = dataclasses.field(repr=False)
    fail_to_pass: tuple[str, ...]
    pass_to_pass: tuple[str, ...] = dataclasses.field(repr=False)
    hints_text: str = dataclasses.field(default="", repr=False)
    version: str = ""
    environment_setup_commit: str = ""
    difficulty: str = ""  # Verified has it, as a time: "15 min - 1 hour"
    source: Row | None = dataclasses.field(default=None, repr=False, compare=False)


def is_instance(row: Row) -> bool:
    """Return whether a row has the fields of an instance."""
    return "instance_id" in row.values and "base_commit" in row.values


def load_instances(file: str | pathlib.Path) -> list[Instance]:
    """Read all instances of a .jsonl, .json or .parquet file.

    Raises:
      TaskError: an instance is malformed; names file, row and line.
    """
    return [parse_instance(row) for row in read_rows(pathlib.Path(file))]


def parse_instance(row: Row) -> Instance:
    """Read an instance. Raises TaskError, which names the field."""
    texts = {name: row.text(name) for name in FIELDS[:6]}
    optional = {
        name: row.text(name, "")
        for name in ("hints_text", "version", "environment_setup_commit", "difficulty")
    }
    if not _NAME.fullmatch(texts["instance_id"]) or len(texts["instance_id"]) > 200:
        raise row.fault(
            f"instance_id {texts['instance_id'][:60]!r} is not a name of letters, digits, '.', '_'"
            " and '-'"
        )
    if not _REPO.fullmatch(texts["repo"]) or ".." in texts["repo"].split("/"):
        raise row.fault(
            f"repo {texts['repo'][:60]!r} is neither owner/name nor a folder below that of this"
            " file"
        )
    for name in ("base_commit", "environment_setup_commit"):
        value = texts.get(name, optional.get(name, ""))
        if (name == "base_commit" or value) and not _COMMIT.fullmatch(value):
            raise row.fault(
                f"{name} {value[:60]!r} is not a full commit id (40 or 64 hexadecimal digits)"
            )
    for name in ("patch", "test_patch", "problem_statement"):
        if not texts[name].strip():
            raise row.fault(f"{name} is empty")
    for name in ("patch", "test_patch"):
        # Data sets strip their fields, and the last line of a diff ends with a newline.
        texts[name] = texts[name].removesuffix("\n") + "\n"
    failing = _ids(row, "FAIL_TO_PASS")
    passing = _ids(row, "PASS_TO_PASS")
    if not failing:
        raise row.fault(
            "FAIL_TO_PASS is empty: nothing would tell a solved instance from an unsolved one"
        )
    if both := sorted(set(failing) & set(passing)):
        raise row.fault(f"{both[0][:100]!r} is in FAIL_TO_PASS and in PASS_TO_PASS")
    return Instance(**texts, **optional, fail_to_pass=failing, pass_to_pass=passing, source=row)


def _ids(row: Row, name: str) -> tuple[str, ...]:
    """Return a list of node ids, stored as a list or as its JSON text (the data set's form)."""
    value = row.values.get(name)
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise row.fault(
                f"{name} is text, but not the JSON of a list: {str(error)[:80]}"
            ) from error
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise row.fault(
            f"{name} is a {type(value).__name__}, but must be a list of test ids, or its JSON"
        )
    for one in value:
        if not _is_node_id(one):
            raise row.fault(
                f"{name}: {one[:100]!r} is not a node id of pytest (tests/test_x.py::test_y);"
                " instances with another test runner cannot be graded here"
            )
        try:
            one.encode()
        except UnicodeEncodeError:
            raise row.fault(f"{name}: {one[:100]!r} holds half a surrogate pair") from None
    return tuple(dict.fromkeys(value))


def _is_node_id(text: str) -> bool:
    path, separator, _ = text.partition("::")
    if not separator or not path.endswith(".py"):
        return False
    leaves_repository = path.startswith("/") or ".." in path.split("/")
    return not leaves_repository and all(ord(letter) >= 32 for letter in text)
