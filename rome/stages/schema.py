"""Load configs, and the schema that each is checked against.

The default config of a shipped experiment is the schema of its kind of training: experiments/cpt.py
and sft.py of the losses of these names and of own losses that are likelihoods, experiments/ipa.py
of every policy loss. Its block `own` has the keys that the config's own code declares.
"""

from __future__ import annotations

import functools
import importlib.util
import pathlib
from collections.abc import Mapping
from typing import Any

import ml_collections

from rome.files import find_shipped
from rome.losses import find_loss
from rome.own_code import OwnCodeError, search_in
from rome.stages.own_code import own_schema, refusal
from rome.train.workdir import ConfigError

EXPERIMENTS = pathlib.Path(__file__).parents[2] / "experiments"
SCHEMAS: Mapping[str, str] = {"cpt": "cpt.py", "sft": "sft.py", "rl": "ipa.py"}  # by kind


def load_config(path: str, preset: str) -> ml_collections.ConfigDict:
    """Return `get_config(preset)` of an experiment file.

    Raises:
      ConfigError: where there is no such file.
    """
    file = find_shipped(path)
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if not file.is_file() or spec is None or spec.loader is None:
        files = (p.name for p in EXPERIMENTS.glob("*.py"))
        names = sorted(set(files) - {"__init__.py", "common.py"})
        raise ConfigError(
            f"there is no experiment file {path}; experiments/ holds {', '.join(names)}"
        )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    search_in(file.parent)
    return module.get_config(preset)


def kind_of(loss: str) -> str:
    """Return the kind of training that a loss belongs to: cpt, sft or rl."""
    if loss == "cpt":
        return "cpt"
    return "sft" if find_loss(loss).likelihood else "rl"


@functools.cache
def schema_of_kind(kind: str) -> Mapping[str, Any]:
    """Return the default config of a kind of training."""
    return load_config(str(EXPERIMENTS / SCHEMAS[kind]), "tiny").to_dict()


def schema_of(config: ml_collections.ConfigDict) -> Mapping[str, Any]:
    """Return the default config that a config is checked against.

    Its block `own` has the keys that the config's own code declares.

    Raises:
      ConfigError: a key names a loss or other code that is not there, or cannot be used.
    """
    loss = config.get("loss")
    try:
        schema = schema_of_kind(kind_of(loss) if isinstance(loss, str) else "rl")
    except OwnCodeError as error:
        raise refusal("loss", loss, error) from None
    return {**schema, "own": own_schema(config, schema)} if "own" in schema else schema


def with_own_defaults(values: Mapping[str, Any], schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a config with the defaults of the keys of own code that it leaves out.

    Args:
      values: of the config.
      schema: as `schema_of` returns it.
    """
    own = values.get("own")
    if not isinstance(own, Mapping) or "own" not in schema:
        return dict(values)
    completed = dict(own)
    for role, keys in schema["own"].items():
        given = own.get(role, {})
        completed[role] = {**keys, **given} if isinstance(given, Mapping) else given
    return {**values, "own": completed}


def fill_own_keys(config: ml_collections.ConfigDict) -> None:
    """Set the keys of own code that a config leaves out to their defaults.

    So the workdir's config.json holds them, and a default that changes is seen as a change.
    """
    completed = with_own_defaults(config.to_dict(), schema_of(config))
    if isinstance(completed.get("own"), Mapping):
        with config.unlocked():
            config.own = ml_collections.ConfigDict(completed["own"])
