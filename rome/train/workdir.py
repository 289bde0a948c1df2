"""The directory of a run: its default name, and the config that owns it."""

from __future__ import annotations

import hashlib
import json
import pathlib
from typing import Any

import ml_collections

MAX_DIFFERENCES = 300  # characters of the message that lists them


class ConfigError(ValueError):
    """A config that cannot run: the message names the key, its value and the remedy."""


def default_workdir(config: ml_collections.ConfigDict) -> pathlib.Path:
    """Return runs/EXPERIMENT-PRESET-HASH, so that each config has a directory of its own."""
    digest = hashlib.sha256(_canonical(config).encode()).hexdigest()[:8]
    return pathlib.Path("runs") / f"{config.experiment}-{config.preset}-{digest}"


def claim_workdir(workdir: pathlib.Path, config: ml_collections.ConfigDict) -> None:
    """Write the config into a new workdir, or check that it is the one already there.

    Raises:
      ConfigError: where the workdir belongs to another config; the message lists the differences.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    path = workdir / "config.json"
    text = _canonical(config)
    if not path.exists():
        if (workdir / "metrics.jsonl").exists():
            raise ConfigError(
                f"{workdir} holds a run without a config.json. Give another --workdir."
            )
        path.write_text(text)
        return
    theirs = flatten(json.loads(path.read_text()))
    ours = flatten(json.loads(text))
    different = [
        f"{key} ({theirs.get(key)!r} there, {ours.get(key)!r} now)"
        for key in sorted(theirs.keys() | ours.keys())
        if theirs.get(key) != ours.get(key)
    ]
    if different:
        raise ConfigError(
            f"{workdir} belongs to another config: {'; '.join(different)[:MAX_DIFFERENCES]}. Give"
            " another --workdir, or none."
        )


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested values keyed by dotted name, such as {"mesh.fsdp": 4}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _canonical(config: ml_collections.ConfigDict) -> str:
    return json.dumps(config.to_dict(), sort_keys=True, indent=1)
