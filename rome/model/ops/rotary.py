"""Rotary position embedding, stretched beyond the training length as a checkpoint says.

B rows, T time, N heads, H head dim; h is H / 2.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from jax import Array

from rome.model.config import ModelConfig
from rome.model.rope import RopeScaling


def rotary_angles(positions_BT: Array, config: ModelConfig) -> tuple[Array, Array]:
    """Return cos and sin of each position's angles, each [B, T, 1, H / 2] float32.

    Stretched as config.rope_scaling says.
    """
    frequency_h = rotary_frequencies(config).astype(np.float32)
    angle_BT1h = positions_BT.astype(jnp.float32)[:, :, None, None] * frequency_h
    magnitude = config.rope_scaling.attention_factor if config.rope_scaling else 1.0
    return jnp.cos(angle_BT1h) * magnitude, jnp.sin(angle_BT1h) * magnitude


def rotary_frequencies(config: ModelConfig) -> np.ndarray:
    """Return the angle between neighbouring positions in radians, [H / 2] float64.

    YaRN as in arXiv 2309.00071, section 3.2, and as transformers implements it.
    """
    H = config.head_dim
    scaling = config.rope_scaling
    frequency_h = config.rope_theta ** (-np.arange(0, H, 2) / H)
    if scaling is None:
        return frequency_h
    if scaling.kind == "linear":
        return frequency_h / scaling.factor
    low = _dimension_of(scaling.beta_fast, scaling, config)
    high = _dimension_of(scaling.beta_slow, scaling, config)
    if scaling.truncate:
        low = math.floor(low)
        high = math.ceil(high)
    low = max(low, 0)
    high = min(high, H - 1)
    width = (high - low) or 0.001
    stretched_h = np.clip((np.arange(H // 2) - low) / width, 0, 1)
    return frequency_h * (1 - stretched_h) + frequency_h / scaling.factor * stretched_h


def rotate(x_BTNH: Array, cos_BT1h: Array, sin_BT1h: Array) -> Array:
    """Rotate queries or keys, in float32; dimension i is paired with i + H / 2.

    That is the layout of the published weights.
    """
    first_BTNh, second_BTNh = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    rotated_first_BTNh = first_BTNh * cos_BT1h - second_BTNh * sin_BT1h
    rotated_second_BTNh = second_BTNh * cos_BT1h + first_BTNh * sin_BT1h
    rotated_BTNH = jnp.concatenate([rotated_first_BTNh, rotated_second_BTNh], axis=-1)
    return rotated_BTNH.astype(x_BTNH.dtype)


def _dimension_of(rotations: float, scaling: RopeScaling, config: ModelConfig) -> float:
    """Return the dimension that turns this often over the original length."""
    wavelength = scaling.original_max_position / (rotations * 2 * math.pi)
    return config.head_dim * math.log(wavelength) / (2 * math.log(config.rope_theta))
