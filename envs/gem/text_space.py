"""A gymnasium space of arbitrary texts, which also works in gymnasium's shared memory."""

from __future__ import annotations

import string
from collections.abc import Sequence
from typing import Any

import numpy as np
from gymnasium import spaces
from gymnasium.vector.utils import (
    create_shared_memory,
    read_from_shared_memory,
    write_to_shared_memory,
)

MAX_TEXT = 16_384  # characters of an observation or action
MAX_SAMPLE = 64  # characters of a random text; a very long one would test nothing
_LENGTH_BYTES = 4  # before each text in shared memory
_CHARACTER_BYTES = 4  # at most, in UTF-8


class AnyText(spaces.Text):
    """All texts of up to `max_length` characters. Samples are printable ASCII.

    gymnasium's own Text knows only texts over a closed set of characters. In shared memory a text
    is its UTF-8 bytes after their number. A text that is too long must be cut by the environment.

    Args:
      max_length: number of characters.
      seed: of the samples.
    """

    def __init__(
        self, max_length: int = MAX_TEXT, seed: int | np.random.Generator | None = None
    ) -> None:
        charset = string.ascii_letters + string.digits + " .,<>/{}\\"
        super().__init__(max_length, min_length=0, charset=charset, seed=seed)

    def sample(self, mask: Any = None, probability: Any = None) -> str:
        if mask is None and probability is None:
            length = int(self.np_random.integers(0, min(self.max_length, MAX_SAMPLE) + 1))
            mask = (length, None)
        return super().sample(mask, probability)

    def contains(self, x: Any) -> bool:
        return isinstance(x, str) and len(x) <= self.max_length

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AnyText) and self.max_length == other.max_length

    def __repr__(self) -> str:
        return f"AnyText({self.max_length})"


def _slot_bytes(space: AnyText) -> int:
    """Return the size of one text's place in shared memory."""
    return _LENGTH_BYTES + _CHARACTER_BYTES * space.max_length


@create_shared_memory.register(AnyText)
def _create(space: AnyText, n: int = 1, ctx: Any = None) -> Any:
    return ctx.Array("B", n * _slot_bytes(space))


@write_to_shared_memory.register(AnyText)
def _write(space: AnyText, index: int, value: str, shared_memory: Any) -> None:
    data = value.encode("utf-8", "surrogatepass")
    view = memoryview(shared_memory.get_obj()).cast("B")
    length_start = index * _slot_bytes(space)
    text_start = length_start + _LENGTH_BYTES
    view[length_start:text_start] = len(data).to_bytes(_LENGTH_BYTES, "little")
    view[text_start : text_start + len(data)] = data


class _SharedTexts(Sequence[str]):
    """The texts that are in shared memory at the moment.

    gymnasium asks once for the observations and copies them at each step; a copy is a plain tuple.
    """

    def __init__(self, space: AnyText, shared_memory: Any, n: int) -> None:
        self._slot_bytes = _slot_bytes(space)
        self._memory = shared_memory
        self._n = n

    def __len__(self) -> int:
        return self._n

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return tuple(self)[index]
        number = range(self._n)[index]  # raises IndexError, and resolves negative numbers
        view = memoryview(self._memory.get_obj()).cast("B")
        length_start = number * self._slot_bytes
        text_start = length_start + _LENGTH_BYTES
        length = int.from_bytes(view[length_start:text_start], "little")
        data = bytes(view[text_start : text_start + length])
        return data.decode("utf-8", "surrogatepass")

    def __deepcopy__(self, memo: dict[int, Any]) -> tuple[str, ...]:
        return tuple(self)


@read_from_shared_memory.register(AnyText)
def _read(space: AnyText, shared_memory: Any, n: int = 1) -> _SharedTexts:
    return _SharedTexts(space, shared_memory, n)
