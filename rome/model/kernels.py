"""Which form of attention and of the experts a platform runs: chosen by measure, overridden by name, refused with the reason."""

from __future__ import annotations

import importlib.util
from typing import NamedTuple

from rome.model import attention, experts
from rome.model.config import ModelConfig

ONLY_ON = {"splash": "tpu", "megablox": "tpu", "cudnn": "gpu", "tokamax": "gpu"}
LANES = 128  # of a TPU's vector unit; splash wants heads of whole lanes


class Kernels(NamedTuple):
    """Names as in `rome.model.attention.attention` and `rome.model.experts.experts`."""

    attention: str = "auto"
    experts: str = "auto"


def choose_kernels(platform: str, config: ModelConfig, wanted: Kernels = Kernels()) -> Kernels:
    """Replaces "auto" by the best form for `platform` ("cpu", "gpu", "tpu": of the mesh's devices, which need not be this process's own).

    Raises: ValueError for a name that is unknown or cannot run there.
    """
    for kind, name, known in (("attention", wanted.attention, attention.IMPLEMENTATIONS), ("experts", wanted.experts, experts.IMPLEMENTATIONS)):
        if name not in known:
            raise ValueError(f"kernels.{kind}={name!r} is unknown. Choose one of {', '.join(known)}.")
        if ONLY_ON.get(name, platform) != platform:
            raise ValueError(f"kernels.{kind}={name!r} runs on {ONLY_ON[name]} only, and the mesh's devices are {platform}. Set it to 'auto'.")
        if name == "tokamax" and importlib.util.find_spec("tokamax") is None:
            raise ValueError(f"kernels.{kind}='tokamax' needs the package tokamax, which is not installed. Install requirements-cuda.txt, or set it to 'auto'.")
    best = {"tpu": _on_tpu, "gpu": _on_gpu}.get(platform, lambda config: Kernels())(config)
    return Kernels(*(ours if name == "auto" else name for name, ours in zip(wanted, best)))


def _on_tpu(config: ModelConfig) -> Kernels:
    return Kernels("splash" if config.head_dim % LANES == 0 else "blocked", "megablox")


def _on_gpu(config: ModelConfig) -> Kernels:
    """XLA's own ragged_dot, which is taken where tokamax is not installed, computes every expert there up to jaxlib 0.10.2."""
    return Kernels("cudnn" if config.dtype == "bfloat16" else "blocked", "tokamax" if importlib.util.find_spec("tokamax") else "ragged")
