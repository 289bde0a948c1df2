"""Seeds that depend on what they are for, never on the order in which work arrives."""

from __future__ import annotations

import hashlib
from typing import Any


def derive_seed(*parts: Any) -> int:
    """Return a 31-bit seed that depends on the text of all parts and on nothing else.

    Equal in every process: Python's randomised hash and global generators are not used.
    """
    text = "\x1f".join(map(str, parts))
    digest = hashlib.blake2s(text.encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") >> 1
