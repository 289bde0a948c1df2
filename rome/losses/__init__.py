"""Losses: pure functions on arrays, `loss(logp_BT, batch, config, denominators)`.

Each returns (value, metrics). No loss knows a model, a file or a device.

To add a loss, write the function (`rome.losses.policy` has a dozen) and register it in `SPECS`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

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


@dataclasses.dataclass(frozen=True)
class LossSpec:
    """A registered loss and what it needs.

    Args:
      function: the loss itself.
      advantage: how the episodes of a group are compared (`rome.data.advantages`); None: the loss
        does not read advantages.
      published: the switches that the loss reads, out of mismatch_limit, mismatch_low, clip_low,
        clip_high and dual_clip, with the values of its paper.
      likelihood: True where the loss learns from given text, False where it learns from episodes
        that a policy played.
      lambda_il: weight of the imitation term of Eq. 10 in the loss' paper.
    """

    function: Loss
    advantage: Estimator | None = None
    published: Mapping[str, float] = dataclasses.field(default_factory=dict)
    likelihood: bool = False
    lambda_il: float = 0.0


_CLIP = {"clip_low": 0.2, "clip_high": 0.2, "dual_clip": 0.0}

SPECS: dict[str, LossSpec] = {
    "ipa": LossSpec(ipa_loss, published={"mismatch_limit": 5.0}, lambda_il=1.0),
    "token_level": LossSpec(token_level_loss, published={"mismatch_limit": 5.0}),
    "grpo": LossSpec(grpo_loss, "normalised", _CLIP),
    "dr_grpo": LossSpec(dr_grpo_loss, "centred", _CLIP),
    "rloo": LossSpec(rloo_loss, "leave_one_out"),
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
LOSSES: dict[str, Loss] = {name: spec.function for name, spec in SPECS.items()}
LIKELIHOODS = tuple(name for name, spec in SPECS.items() if spec.likelihood)
ADVANTAGES: dict[str, Estimator] = {
    name: spec.advantage for name, spec in SPECS.items() if spec.advantage is not None
}
PUBLISHED: dict[str, Mapping[str, float]] = {
    name: spec.published for name, spec in SPECS.items() if not spec.likelihood
}


def unbounded_weight(loss: str, dual_clip: float) -> str | None:
    """Return why this loss must not train on samples of older weights, or None if it may.

    A loss may where the weight that it gives to such a sample has an upper bound.

    Args:
      loss: name in SPECS.
      dual_clip: the value that the run uses; 0 is no dual clip.
    """
    if loss == "rloo":
        return (
            "rloo weighs a sample of older weights as if it were fresh. Choose ipa, cispo or topr,"
            " or sample at the weights of the step"
        )
    if "dual_clip" in PUBLISHED.get(loss, {}) and not dual_clip:
        return (
            f"{loss} has no upper bound for the ratio of a failure. Set dual_clip=3, or choose ipa,"
            " cispo or topr"
        )
    return None


__all__ = [
    "ADVANTAGES",
    "LIKELIHOODS",
    "LOSSES",
    "PUBLISHED",
    "SPECS",
    "Denominators",
    "Loss",
    "LossConfig",
    "LossSpec",
    "Metrics",
    "count_denominators",
    "unbounded_weight",
]
