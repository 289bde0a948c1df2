"""Losses: pure functions on arrays, `loss(logp_BT, batch, config, denominators)`.

Each returns (value, metrics). No loss knows a model, a file or a device.

A config names a loss of `SPECS`, or own code (`rome.own_code`): a function, a dataclass with
`__call__`, or a `LossSpec`. `find_loss` finds all of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from rome.data.advantages import Estimator
from rome.losses.ipa import ipa_loss
from rome.losses.policy import (
    cispo_loss,
    dapo_loss,
    dr_grpo_loss,
    gigpo_loss,
    grpo_loss,
    gspo_loss,
    icepop_loss,
    rloo_loss,
    tis_loss,
    token_level_loss,
    topr_loss,
)
from rome.losses.sft import sft_loss
from rome.losses.types import Denominators, Loss, LossConfig, Metrics, count_denominators
from rome.own_code import build, find, require_signature


@dataclasses.dataclass(frozen=True)
class LossSpec:
    """A loss and what it needs.

    Args:
      function: the loss itself, or a dataclass that makes it of the config's own keys.
      advantage: how the episodes of a group are compared (`rome.data.advantages`); None: the loss
        does not read advantages.
      published: the switches that the loss reads, out of mismatch_limit, mismatch_low, clip_low,
        clip_high and dual_clip, with the values of its paper.
      likelihood: True where the loss learns from given text, False where it learns from episodes
        that a policy played.
      lambda_il: weight of the imitation term of Eq. 10 in the loss' paper.
      fresh_only: why the loss must not train on samples of older weights, whatever its switches
        are; "" where it may.
    """

    function: Loss | type
    advantage: Estimator | None = None
    published: Mapping[str, float] = dataclasses.field(default_factory=dict)
    likelihood: bool = False
    lambda_il: float = 0.0
    fresh_only: str = ""


_CLIP = {"clip_low": 0.2, "clip_high": 0.2, "dual_clip": 0.0}

SPECS: dict[str, LossSpec] = {
    "ipa": LossSpec(ipa_loss, published={"mismatch_limit": 5.0}, lambda_il=1.0),
    "token_level": LossSpec(token_level_loss, published={"mismatch_limit": 5.0}),
    "grpo": LossSpec(grpo_loss, "normalised", _CLIP),
    "dr_grpo": LossSpec(dr_grpo_loss, "centred", _CLIP),
    "rloo": LossSpec(
        rloo_loss,
        "leave_one_out",
        fresh_only="rloo weighs a sample of older weights as if it were fresh",
    ),
    "gspo": LossSpec(gspo_loss, "normalised", _CLIP | {"clip_low": 3e-4, "clip_high": 4e-4}),
    "dapo": LossSpec(dapo_loss, "normalised", _CLIP | {"clip_high": 0.28}),
    # the paper has no lower bound: 1 - clip_low is 0
    "cispo": LossSpec(cispo_loss, "normalised", {"clip_low": 1.0, "clip_high": 4.0}),
    "topr": LossSpec(topr_loss),
    "tis": LossSpec(tis_loss, "normalised", _CLIP | {"mismatch_limit": 2.0}),
    "icepop": LossSpec(
        icepop_loss, "normalised", _CLIP | {"mismatch_low": 0.5, "mismatch_limit": 5.0}
    ),
    "gigpo": LossSpec(gigpo_loss, "steps", _CLIP),
    "sft": LossSpec(sft_loss, likelihood=True),
    "cpt": LossSpec(sft_loss, likelihood=True),
}

# Views of SPECS by property.
LOSSES: dict[str, Any] = {name: spec.function for name, spec in SPECS.items()}
PUBLISHED: dict[str, Mapping[str, float]] = {
    name: spec.published for name, spec in SPECS.items() if not spec.likelihood
}
# Arguments of a loss, by position.
PARAMETERS = ("logp_BT", "batch", "config", "denominators")


def find_loss(name: str) -> LossSpec:
    """Return the loss of this name: an entry of SPECS, or own code.

    Own code that is no LossSpec reads normalised advantages and no switch.

    Raises:
      OwnCodeError: there is no such loss, or it cannot be called as one.
    """
    found = find(name, SPECS)
    spec = found if isinstance(found, LossSpec) else LossSpec(found, "normalised")
    require_signature(spec.function, PARAMETERS)
    return spec


def build_loss(name: str, keys: Mapping[str, Any] | None = None) -> Loss:
    """Return the function of a loss, with its own keys set where it declares any.

    Raises:
      OwnCodeError: as `find_loss`, or the loss refuses a value.
    """
    return build(find_loss(name).function, keys or {})


def unbounded_weight(loss: str, dual_clip: float) -> str | None:
    """Return why this loss must not train on samples of older weights, or None if it may.

    A loss may where the weight that it gives to such a sample has an upper bound.

    Args:
      loss: its name, as for `find_loss`.
      dual_clip: the value that the run uses; 0 is no dual clip.
    """
    spec = find_loss(loss)
    if spec.fresh_only:
        return f"{spec.fresh_only}. Choose ipa, cispo or topr, or sample at the weights of the step"
    if "dual_clip" in spec.published and not dual_clip:
        return (
            f"{loss} has no upper bound for the ratio of a failure. Set dual_clip=3, or choose ipa,"
            " cispo or topr"
        )
    return None


__all__ = [
    "LOSSES",
    "PARAMETERS",
    "PUBLISHED",
    "SPECS",
    "Denominators",
    "Loss",
    "LossConfig",
    "LossSpec",
    "Metrics",
    "build_loss",
    "count_denominators",
    "find_loss",
    "unbounded_weight",
]
