"""Which form of attention and of the experts a platform runs: chosen by measure, overridden by
name, refused with the reason.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import NamedTuple

from rome.model.config import ModelConfig
from rome.model.ops import attention, experts
from rome.model.ops import experts_on_mesh as expert_parallel
from rome.model.ops.expert_exchange import is_worthwhile

ONLY_ON = {
    "splash": "tpu",
    "megablox": "tpu",
    "cudnn": "gpu",
    "tokamax": "gpu",
    "all_to_all": "tpu",
}
LANES = 128  # of a TPU's vector unit; splash wants heads of whole lanes


class Kernels(NamedTuple):
    """Names as in `rome.model.ops.attention.attention`, `rome.model.ops.experts.experts` and, for
    how tokens reach their experts on a mesh, `rome.model.ops.experts_on_mesh.experts_on_mesh`.
    """

    attention: str = "auto"
    experts: str = "auto"
    exchange: str = "auto"


def choose_kernels(
    platform: str,
    config: ModelConfig,
    wanted: Kernels = Kernels(),
    group: int = 1,
    extent: tuple[int, ...] = (),
) -> Kernels:
    """Replaces "auto" by the best form for `platform` ("cpu", "gpu", "tpu": of the mesh's devices,
    which need not be this process's own).

    group: devices of the mesh's expert axis. extent: of the chips that these extend over, as of
    `rome.model.sharding.extent`. Raises: ValueError for a name that is unknown or cannot run there.
    """
    for kind, name, known in zip(
        Kernels._fields,
        wanted,
        (attention.IMPLEMENTATIONS, experts.IMPLEMENTATIONS, expert_parallel.FORMS),
    ):
        if name not in known:
            raise ValueError(
                f"learner.{kind}={name!r} is unknown. Choose one of {', '.join(known)}."
            )
        if ONLY_ON.get(name, platform) != platform:
            raise ValueError(
                f"learner.{kind}={name!r} runs on {ONLY_ON[name]} only, and the mesh's devices are"
                f" {platform}. Set it to 'auto'."
            )
        if name == "tokamax" and importlib.util.find_spec("tokamax") is None:
            raise ValueError(
                f"learner.{kind}='tokamax' needs the package tokamax, which is not installed."
                " Install requirements-cuda.txt, or set it to 'auto'."
            )
    best = {"tpu": functools.partial(_on_tpu, group=group, extent=extent), "gpu": _on_gpu}.get(
        platform, lambda config: Kernels(exchange="ring")
    )(config)
    chosen = Kernels(*(ours if name == "auto" else name for name, ours in zip(wanted, best)))
    if chosen.exchange != "all_to_all" or chosen.experts in experts.GROUPED:
        return chosen
    if wanted.exchange == "auto":
        return chosen._replace(exchange="ring")
    raise ValueError(
        "learner.exchange='all_to_all' needs a grouped matmul, and"
        f" learner.experts={chosen.experts!r} has none. Set that to one of"
        f" {', '.join(experts.GROUPED)}, or the exchange to 'ring'."
    )


def _on_tpu(config: ModelConfig, group: int, extent: tuple[int, ...]) -> Kernels:
    exchange = "all_to_all" if is_worthwhile(config.experts_per_token, group, extent) else "ring"
    return Kernels("splash" if config.head_dim % LANES == 0 else "blocked", "megablox", exchange)


def _on_gpu(config: ModelConfig) -> Kernels:
    """XLA's own ragged_dot, which is taken where tokamax is not installed, computes every expert
    there up to jaxlib 0.10.2.
    """
    return Kernels(
        "cudnn" if config.dtype == "bfloat16" else "blocked",
        "tokamax" if importlib.util.find_spec("tokamax") else "ragged",
        "ring",
    )
