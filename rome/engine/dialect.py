"""Differences between the versions of SGLang that the client must know."""

from __future__ import annotations

import dataclasses
import re

from rome.engine.errors import EngineError

# First version whose weight update, pause and version fields were read and tested with this client.
MIN_SGLANG = (0, 5, 9)
# First version that was seen to return meta_info.weight_versions.
FIRST_WITH_VERSION_SPANS = (0, 5, 23)
# First version that was seen to have the action "checksum" of /weights_checker.
FIRST_WITH_CHECKSUMS = (0, 5, 15)


@dataclasses.dataclass(frozen=True)
class Dialect:
    """What a server's version understands.

    Attributes:
      name: the version as the server reports it.
      embedded: whether the server is `rome.serve`, which can hash its tensors by the names that
        they have in the checkpoint.
      version_spans: whether answers report the weight version of each token, so that a request may
        run on through an update. Versions without it also crashed in pause mode "retract".
      checksums: whether the server can hash its weights.
    """

    name: str
    embedded: bool
    version_spans: bool
    checksums: bool


def dialect_of(url: str, version: str, embedded: bool = False) -> Dialect:
    """Return the dialect of a server that reports `version`.

    Args:
      url: named in the error.
      version: such as "0.5.23".
      embedded: whether the server says that it is `rome.serve`; its version is then not checked.

    Raises:
      EngineError: the version is older than `MIN_SGLANG`, or is no version number.
    """
    if embedded:
        return Dialect(version, embedded=True, version_spans=True, checksums=True)
    match = re.match(r"(\d+)\.(\d+)\.(\d+)", version)
    number = tuple(map(int, match.groups())) if match else (0, 0, 0)
    if number < MIN_SGLANG:
        raise EngineError(
            f"{url} runs SGLang {version or 'of unknown version'}; weight updates need"
            f" {'.'.join(map(str, MIN_SGLANG))} or newer (requirements-sglang.txt)"
        )
    return Dialect(
        version,
        embedded=False,
        version_spans=number >= FIRST_WITH_VERSION_SPANS,
        checksums=number >= FIRST_WITH_CHECKSUMS,
    )
