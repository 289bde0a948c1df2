"""Losses: pure functions `loss(logp_BT, batch, config, denominators) -> (value, metrics)` on arrays. No model, no I/O."""

from rome.losses.ipa import ipa_loss
from rome.losses.policy import grpo_loss, token_level_loss
from rome.losses.sft import sft_loss
from rome.losses.types import Denominators, Loss, LossConfig, Metrics, count_denominators

LOSSES: dict[str, Loss] = {"ipa": ipa_loss, "token_level": token_level_loss, "grpo": grpo_loss, "sft": sft_loss, "cpt": sft_loss}
LIKELIHOODS = ("sft", "cpt")  # learn from what is given; the others from what a policy did

__all__ = ["LIKELIHOODS", "LOSSES", "Denominators", "Loss", "LossConfig", "Metrics", "count_denominators"]
