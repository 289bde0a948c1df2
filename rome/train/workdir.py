"""The directory of a run: its default name, and the config that owns it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, Literal

import ml_collections

from rome.files import find_shipped, read_json, write_atomically
from rome.model.config import PRESETS
from rome.model.tokenizer import TINY

KeyClass = Literal["identity", "schedule", "operation"]
Change = dict[str, Any]  # {"step": of the newest checkpoint, "key", "before", "after"}
MODEL = "model.json"  # file in the workdir with the model that it trains, as config.json has it
RANDOM = "random"  # value of init_from: weights are drawn, also where a directory has some
BROKEN = "Write it again, or give another --workdir."  # what to do about a damaged file
MAX_DIFFERENCES = 300  # characters of the message that lists them


class ConfigError(ValueError):
    """A config that cannot run: the message names the key, its value and the remedy."""


@dataclasses.dataclass(frozen=True)
class KeyRules:
    """What a workdir needs to know about the keys of its config.

    Attributes:
      class_of: the class of a key with a dotted name. "identity" keys say what is learnt: with
        another value it is another run. "schedule" keys may change when a run is resumed, which is
        reported. "operation" keys say where and how it runs and are never compared.
      defaults: the default of each key by dotted name; a workdir that is older than a key has it.
    """

    class_of: Callable[[str], KeyClass]
    defaults: Mapping[str, Any]


def default_workdir(config: ml_collections.ConfigDict, rules: KeyRules) -> pathlib.Path:
    """Return runs/EXPERIMENT-PRESET-HASH, a directory for each identity.

    Only identity keys that differ from their default are hashed, so a new key renames nothing.
    """
    identity = {
        key: value
        for key, value in flatten(config.to_dict()).items()
        if rules.class_of(key) == "identity" and value != rules.defaults.get(key)
    }
    digest = _digest(identity)[:8]
    return pathlib.Path("runs") / f"{config.experiment}-{config.preset}-{digest}"


def config_digest(config: ml_collections.ConfigDict) -> str:
    """Return a hash of all keys."""
    return _digest(flatten(config.to_dict()))


def claim_workdir(
    workdir: pathlib.Path,
    config: ml_collections.ConfigDict,
    rules: KeyRules,
    before_going_on: Callable[[int, list[Change]], None] = lambda step, changes: None,
) -> list[Change]:
    """Write the config into a workdir, after a check that it is of the run already there.

    Args:
      workdir: made where it does not exist.
      config: of the experiment.
      rules: of its keys.
      before_going_on: called with the step of the newest checkpoint and the changes where a run
        that is not complete goes on. A kill while it runs leaves the old config, so that it is
        called with the same changes again.

    Returns:
      The schedule keys that have another value than at the last start. They are kept in
      WORKDIR/config_changes.json, unless the run is complete with them.

    Raises:
      ConfigError: where the workdir belongs to another config; the message lists the differences.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    path = workdir / "config.json"
    if not path.exists():
        if (workdir / "metrics.jsonl").exists():
            raise ConfigError(
                f"{workdir} holds a run without a config.json. Give another --workdir."
            )
        write_atomically(path, _text(config))
        return []
    if not _has_begun(workdir):
        # The run before was refused, for its model or its limits: this may be the remedy.
        (workdir / MODEL).unlink(missing_ok=True)
        write_atomically(path, _text(config))
        return []
    theirs = dict(rules.defaults) | flatten(read_json(path, BROKEN))
    ours = flatten(config.to_dict())
    keys = sorted(theirs.keys() | ours.keys())
    different = [key for key in keys if theirs.get(key) != ours.get(key)]
    refused = [
        f"{key} ({theirs.get(key)!r} there, {ours.get(key)!r} now)"
        for key in different
        if rules.class_of(key) == "identity"
    ]
    if refused:
        raise ConfigError(
            f"{workdir} belongs to another config: {'; '.join(refused)[:MAX_DIFFERENCES]}. Give"
            " another --workdir, or none."
        )
    step = newest_checkpoint(workdir)
    changes = [
        {"step": step, "key": key, "before": theirs.get(key), "after": ours.get(key)}
        for key in different
        if rules.class_of(key) == "schedule"
    ]
    if not is_complete(workdir, config):
        before_going_on(step, changes)
        _keep_changes(workdir, changes)
        write_atomically(path, _text(config))
    return changes


def _has_begun(workdir: pathlib.Path) -> bool:
    """Return whether a workdir holds anything that a run has made."""
    parts = ("metrics.jsonl", "report.json", "final", "checkpoints/*", "trajectories/*", "evals/*")
    return any(True for part in parts for _ in workdir.glob(part))


def read_changes(workdir: pathlib.Path) -> list[Change]:
    """Return the schedule keys that were changed when the run of a workdir was resumed."""
    path = workdir / "config_changes.json"
    return read_json(path, BROKEN, list) if path.exists() else []


def model_directory(config: Mapping[str, Any]) -> pathlib.Path | None:
    """Return the directory that config.model names; None: it names a preset.

    Raises:
      ConfigError: it is neither a preset nor a directory with a config.json.
    """
    name = config["model"]
    if name in PRESETS:
        return None
    directory = find_shipped(name)
    if not (directory / "config.json").is_file():
        raise ConfigError(
            f"config.model={name!r} is neither a directory with a config.json nor one of"
            f" {', '.join(PRESETS)}."
        )
    return directory


def experiment_before(init_from: str) -> tuple[str, str] | None:
    """Return the file and the preset of the experiment that a run starts from.

    Args:
      init_from: such as "experiments/sft.py:stage1", or "experiments/sft.py" with no preset.

    Returns:
      The preset is "" where none is named. None: it names a directory, or nothing.
    """
    file, suffix, preset = init_from.partition(".py")
    if not suffix or (preset and not preset.startswith(":")):
        return None
    return f"{file}.py", preset[1:]


def start_directory(config: Mapping[str, Any], workdir: pathlib.Path) -> pathlib.Path | None:
    """Return the folder of the weights that a run starts from; None for random ones.

    An experiment that a run starts from is run in WORKDIR/init. Where nothing is said, the weights
    are those of the model's directory.
    """
    init_from = config.get("init_from", "")
    if init_from == RANDOM:
        return None
    if not init_from:
        return model_directory(config)
    if experiment_before(init_from):
        return workdir / "init" / "final"
    return pathlib.Path(init_from)


def tokenizer_directory(config: Mapping[str, Any], workdir: pathlib.Path) -> pathlib.Path:
    """Return the folder of a run's tokenizer.

    Where nothing is said, it is that of the weights that the run starts from, or of the model's
    directory; a preset with random weights has the shipped one.
    """
    if config["tokenizer"]:
        return find_shipped(config["tokenizer"])
    return start_directory(config, workdir) or model_directory(config) or TINY


def newest_checkpoint(workdir: pathlib.Path) -> int:
    """Return the step of a workdir's newest checkpoint; 0 where it has none."""
    names = [path.name for path in (workdir / "checkpoints").glob("*")]
    return max((int(name) for name in names if name.isdecimal()), default=0)


def mark_complete(workdir: pathlib.Path, config: ml_collections.ConfigDict) -> None:
    """Write down beside WORKDIR/final which steps it is the result of."""
    write_atomically(workdir / "complete.json", json.dumps(_ends_at(config)) + "\n")


def is_complete(workdir: pathlib.Path, config: ml_collections.ConfigDict) -> bool:
    """Return whether WORKDIR/final is the result of this config, not that of fewer steps."""
    if not (workdir / "final").exists():
        return False
    path = workdir / "complete.json"
    if not path.exists():
        return True
    reached = read_json(path, BROKEN)
    wanted = _ends_at(config)
    has_steps = reached["steps"] >= wanted["steps"]
    return has_steps and reached["until_success"] == wanted["until_success"]


def _ends_at(config: ml_collections.ConfigDict) -> dict[str, Any]:
    return {"steps": config.steps, "until_success": config.get("until_success", 0.0)}


def _keep_changes(workdir: pathlib.Path, changes: list[Change]) -> None:
    kept = read_changes(workdir)
    new = [change for change in changes if change not in kept]
    if new:
        path = workdir / "config_changes.json"
        write_atomically(path, json.dumps([*kept, *new], indent=1) + "\n")


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested values keyed by dotted name, such as {"mesh.fsdp": 4}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _text(config: ml_collections.ConfigDict) -> str:
    return json.dumps(config.to_dict(), sort_keys=True, indent=1)


def _digest(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
