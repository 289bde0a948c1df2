"""Keys that a config sets and nothing of its run reads: what was meant by them would not happen.

A key whose readers depend on other keys stands here, if its default changes nothing where nobody
reads it. Own code may read every switch of the losses.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_collections

from rome.losses import SPECS
from rome.stages.own_code import own_advantage
from rome.stages.schema import kind_of
from rome.train.workdir import ConfigError, flatten


def check_unread(config: ml_collections.ConfigDict, schema: Mapping[str, Any]) -> None:
    """Refuse a key that has another value than its default and that nothing reads.

    Args:
      config: of an experiment, whose keys, types and own code were checked.
      schema: its kind's defaults.

    Raises:
      ConfigError: it names the key, its value and what reads it.
    """
    defaults = flatten(dict(schema))
    values = flatten(config.to_dict())
    for name, remedy in _unread(config).items():
        if values[name] != defaults[name]:
            raise ConfigError(
                f"{name}={values[name]!r} is not read here: {remedy}, or set {name} to"
                f" {defaults[name]!r}."
            )


def _unread(config: ml_collections.ConfigDict) -> dict[str, str]:
    """Return the keys that nothing reads, each with what to do instead."""
    found = {}
    if not config.lora.rank:
        for name in ("lora.alpha", "lora.targets"):
            found[name] = "lora.rank=0 trains all weights. Set --config.lora.rank"
    kind = kind_of(config.loss)
    if kind == "sft":
        found["temperature"] = (
            "SFT learns the turns of others and samples in evaluations only. Set"
            " --config.eval_temperature"
        )
    if kind != "rl":
        return found
    loss = config.loss
    if loss in SPECS and loss not in ("ipa", "token_level"):
        found["norm"] = f"loss={loss} has the denominator of its paper. Choose ipa or token_level"
    if loss in SPECS and loss != "ipa":
        found["mismatch_mask"] = f"loss={loss} has no mask of chunks. Choose ipa"
    if own_advantage(config) != "steps":
        found["gigpo_state"] = "no turns are compared. Choose loss=gigpo or advantage=steps"
    if config.rollout.resampling == "off":
        found["rollout.resample_share"] = "nothing is resampled. Set --config.rollout.resampling"
    return found
