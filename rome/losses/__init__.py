"""Losses: pure functions `loss(logp_BT, batch, config, denominators) -> (value, metrics)` on
arrays.

No model, no I/O.
"""

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

LOSSES: dict[str, Loss] = {
    "ipa": ipa_loss,
    "token_level": token_level_loss,
    "grpo": grpo_loss,
    "dr_grpo": dr_grpo_loss,
    "rloo": rloo_loss,
    "gspo": gspo_loss,
    "dapo": dapo_loss,
    "cispo": cispo_loss,
    "topr": topr_loss,
    "tis": tis_loss,
    "icepop": icepop_loss,
    "gigpo": gigpo_loss,
    "sft": sft_loss,
    "cpt": sft_loss,
}
LIKELIHOODS = ("sft", "cpt")  # learn from what is given; the others from what a policy did
# Of the losses that compare the episodes of a group: how (rome.data.advantages).
ADVANTAGES = {
    "grpo": "normalised",
    "dr_grpo": "centred",
    "rloo": "leave_one_out",
    "gspo": "normalised",
    "dapo": "normalised",
    "cispo": "normalised",
    "tis": "normalised",
    "icepop": "normalised",
    "gigpo": "steps",
}
# The switches among these five that a loss reads, with the values of its paper.
_CLIP = {"clip_low": 0.2, "clip_high": 0.2, "dual_clip": 0.0}
PUBLISHED: dict[str, dict[str, float]] = {
    "ipa": {"mismatch_limit": 5.0},
    "token_level": {"mismatch_limit": 5.0},
    "grpo": _CLIP,
    "dr_grpo": _CLIP,
    "rloo": {},
    "topr": {},
    "gigpo": _CLIP,
    "gspo": {"clip_low": 3e-4, "clip_high": 4e-4, "dual_clip": 0.0},
    "dapo": {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": 0.0},
    "cispo": {"clip_low": 1.0, "clip_high": 4.0},  # no lower bound
    "tis": _CLIP | {"mismatch_limit": 2.0},
    "icepop": _CLIP | {"mismatch_low": 0.5, "mismatch_limit": 5.0},
}


def unbounded_weight(loss: str, dual_clip: float) -> str | None:
    """Why samples of older weights must not be trained on with this loss; None where every one of
    them has a bounded weight.
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
    "Denominators",
    "Loss",
    "LossConfig",
    "Metrics",
    "count_denominators",
    "unbounded_weight",
]
