"""Rotary angles of a checkpoint: their base, and how they are stretched."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

KINDS = ("default", "linear", "yarn")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the length that a model was trained on.

    Attributes:
      kind: "linear", or "yarn" (arXiv 2309.00071).
      factor: slow frequencies are divided by it.
      original_max_position: length that the model was trained on.
      attention_factor: multiplies cos and sin.
      beta_fast: rotations over original_max_position; faster frequencies stay as they are.
      beta_slow: slower frequencies than this are divided by `factor`; those between are mixed.
      truncate: round the borders of that range outwards.
    """

    kind: str
    factor: float
    original_max_position: int = 0
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    @classmethod
    def yarn(cls, factor: float, trained_length: int) -> RopeScaling:
        """Return YaRN with the constants of its paper, for `factor` times the trained length."""
        magnitude = _attention_factor({}, factor)
        return cls("yarn", factor, trained_length, magnitude)

    @classmethod
    def from_hf(cls, rope: dict[str, Any], max_position: int) -> RopeScaling | None:
        """Read `rope_scaling` or `rope_parameters` of a config.json; None: not stretched.

        Absent keys have transformers' defaults.

        Args:
          rope: the dictionary under that key.
          max_position: of the model; stands for an absent original_max_position_embeddings.

        Raises:
          ValueError: a stretched rope has no factor of at least 1.
        """
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind == "default":
            return None
        if not isinstance(rope.get("factor"), (int, float)) or rope["factor"] < 1:
            raise ValueError(
                f"config.json has a {kind} rope without a factor of at least 1"
                f" ({rope.get('factor')!r}); take it from the model card"
            )
        factor = float(rope["factor"])
        if kind == "linear":
            return cls(kind, factor)
        return cls(
            kind,
            factor,
            original_max_position=rope.get("original_max_position_embeddings") or max_position,
            attention_factor=_attention_factor(rope, factor),
            beta_fast=float(rope.get("beta_fast") or 32),
            beta_slow=float(rope.get("beta_slow") or 1),
            truncate=bool(rope.get("truncate", True)),
        )

    def to_hf(self) -> dict[str, Any]:
        """Return the dictionary that config.json holds under `rope_scaling`."""
        if self.kind == "linear":
            return {"rope_type": "linear", "factor": self.factor}
        return {
            "rope_type": "yarn",
            "factor": self.factor,
            "original_max_position_embeddings": self.original_max_position,
            "attention_factor": self.attention_factor,
            "beta_fast": self.beta_fast,
            "beta_slow": self.beta_slow,
            "truncate": self.truncate,
        }


def scaling_of(hf: dict[str, Any], max_position: int) -> RopeScaling | None:
    """Return how a config.json stretches its angles, in either spelling; None: it does not.

    Raises:
      ValueError: the two spellings contradict each other.
    """
    places = [hf[key] for key in ("rope_scaling", "rope_parameters") if hf.get(key)]
    found = {
        RopeScaling.from_hf(place, max_position)
        for place in places
        if "rope_type" in place or "type" in place
    }
    if len(found) > 1:
        raise ValueError(
            f"config.json stretches its rope in two ways, {places}; keep the checkpoint's own"
        )
    return found.pop() if found else None


def theta_of(hf: dict[str, Any]) -> float:
    """Return the base of a config.json's angles, in either spelling.

    Raises:
      ValueError: it is absent, or given twice with different values.
    """
    places = (hf, hf.get("rope_parameters") or {})
    found = {place["rope_theta"] for place in places if place.get("rope_theta") is not None}
    if not found:
        raise ValueError(
            "config.json has neither rope_theta nor rope_parameters.rope_theta; take it from the"
            " checkpoint's model card"
        )
    if len(found) > 1:
        raise ValueError(
            f"config.json gives rope_theta twice, as {sorted(found)}; keep the checkpoint's own"
            " value"
        )
    return float(found.pop())


def _attention_factor(rope: dict[str, Any], factor: float) -> float:
    """Return YaRN's factor of cos and sin: given, or computed as transformers does."""

    def magnitude(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return float(magnitude(rope["mscale"]) / magnitude(rope["mscale_all_dim"]))
    return magnitude(1.0)
