"""Names of images: NAME[:TAG][@DIGEST], where NAME may begin with a registry and its port.

The grammar is that of https://github.com/distribution/reference.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

_DEFAULT_REGISTRY = re.compile(r"^(?:(?:index\.)?docker\.io/)?(?:library/)?")


class ImageName(NamedTuple):
    """The parts of an image's name; "" for a tag or a digest that is not given."""

    name: str
    tag: str
    digest: str


def parse_image_name(text: str) -> ImageName:
    """Split an image's name into its parts."""
    rest, _, digest = text.partition("@")
    # A colon before a slash is that of a registry's port.
    folder, slash, last = rest.rpartition("/")
    last, _, tag = last.partition(":")
    return ImageName(f"{folder}{slash}{last}", tag, digest)


def find_image(text: str, known: Iterable[str]) -> str | None:
    """Return the known name that means this image, or None.

    A known name with a tag or a digest means that one alone, and a name without them means all.
    Docker's own registry need not be named.
    """
    name, tag, digest = parse_image_name(text)
    short = _DEFAULT_REGISTRY.sub("", name)
    table = set(known)
    for base in (name, short):
        tagged = f"{base}:{tag}" if tag else base
        for candidate in (f"{tagged}@{digest}", f"{base}@{digest}", tagged, base):
            if candidate in table:
                return candidate
    return None
