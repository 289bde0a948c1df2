"""Which format a record has: its content says so, not the name of its file."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rome.data.formats.atif import read_atif
from rome.data.formats.conversation import Conversation, UnfitError
from rome.data.formats.messages import (
    read_list,
    read_openai,
    read_preference,
    read_swe_agent,
    read_tau_bench,
)
from rome.data.formats.nemo_gym import read_nemo_gym
from rome.data.formats.sharegpt import read_sharegpt
from rome.data.trajectory import Trajectory

Reader = Callable[[Any], Conversation | Trajectory]

# The first whose keys a record has. `tests` and docs/datasets.md list the same formats.
FORMATS: tuple[tuple[str, tuple[str, ...], Reader], ...] = (
    ("atif", ("schema_version", "steps"), read_atif),
    ("nemo_gym", ("responses_create_params", "response"), read_nemo_gym),
    ("swe_agent", ("trajectory", "history"), read_swe_agent),
    ("tau_bench", ("traj", "reward"), read_tau_bench),
    ("sharegpt", ("conversations",), read_sharegpt),
    ("preference", ("prompt", "chosen", "rejected"), read_preference),
    ("openai", ("messages",), read_openai),
)


def read_record(record: Any) -> tuple[str, Conversation | Trajectory]:
    """Return the name of a record's format, and the record.

    Raises:
      UnfitError: no format is known that looks like this, or the record breaks its own.
    """
    name, reader = _find_reader(record)
    try:
        return name, reader(record)
    except UnfitError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        raise UnfitError(f"not {name}: {type(error).__name__} {error}") from error


def is_conversation(value: Any) -> bool:
    """Return whether a list is the messages of one conversation, not a list of records."""
    return isinstance(value, list) and bool(value) and _has_role(value[0])


def _find_reader(record: Any) -> tuple[str, Reader]:
    if is_conversation(record):
        return "messages", read_list
    if not isinstance(record, dict):
        raise UnfitError(f"a record is an object or a list of messages, not {_kind(record)}")
    for name, keys, reader in FORMATS:
        if all(key in record for key in keys):
            return name, reader
    there = ", ".join(map(str, list(record)[:8]))[:200]
    raise UnfitError(f"no format is known that has the keys {there or '(none)'}")


def _has_role(value: Any) -> bool:
    return isinstance(value, dict) and "role" in value


def _kind(record: Any) -> str:
    return "an empty list" if record == [] else f"a {type(record).__name__}"
