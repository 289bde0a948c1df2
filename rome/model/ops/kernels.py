"""The choice of kernels: which form of attention and experts a platform runs.

Chosen by measurement, overridden by name; a form that cannot run is refused with the reason.
"""

from __future__ import annotations

import importlib.util
import logging
from typing import NamedTuple

from rome.model.config import ModelConfig
from rome.model.ops import attention, experts, experts_on_mesh, native
from rome.model.ops.expert_exchange import is_worthwhile

ONLY_ON = {
    "splash": "tpu",
    "megablox": "tpu",
    "tokamax": "gpu",
    "all_to_all": "tpu",
}
LANES = 128  # of a TPU's vector unit; splash needs heads of whole lanes


class Kernels(NamedTuple):
    """Names of the forms that a model runs.

    Attributes:
      attention: as in `rome.model.ops.attention.attention`.
      experts: as in `rome.model.ops.experts.experts`.
      exchange: how tokens reach their experts on a mesh, as in
        `rome.model.ops.experts_on_mesh.experts_on_mesh`.
    """

    attention: str = "auto"
    experts: str = "auto"
    exchange: str = "auto"


AUTO = Kernels()
# All names of each kind.
KNOWN: tuple[tuple[str, ...], ...] = (
    attention.IMPLEMENTATIONS,
    experts.IMPLEMENTATIONS,
    experts_on_mesh.FORMS,
)


def choose_kernels(
    platform: str,
    config: ModelConfig,
    wanted: Kernels = AUTO,
    group: int = 1,
    extent: tuple[int, ...] = (),
) -> Kernels:
    """Replace "auto" by the best form for a platform.

    Args:
      platform: "cpu", "gpu" or "tpu": of the mesh's devices, which need not be this process's own.
      config: the model.
      wanted: names; "auto" leaves the choice to this function.
      group: devices of the mesh's expert axis.
      extent: chips that these extend over, as of `rome.model.sharding.extent`.

    Raises:
      ValueError: a name is unknown or cannot run on the platform.
    """
    for kind, name, names in zip(Kernels._fields, wanted, KNOWN, strict=True):
        _check_runs(kind, name, names, platform)
    best = _best(platform, config, group, extent)
    pairs = zip(wanted, best, strict=True)
    chosen = Kernels(*(ours if name == "auto" else name for name, ours in pairs))
    if chosen.exchange != "all_to_all" or chosen.experts in experts.GROUPED:
        return chosen
    if wanted.exchange == "auto":
        return chosen._replace(exchange="ring")
    raise ValueError(
        "learner.exchange='all_to_all' needs a grouped matmul, and"
        f" learner.experts={chosen.experts!r} has none. Set that to one of"
        f" {', '.join(experts.GROUPED)}, or the exchange to 'ring'."
    )


def choose_serving_kernels(platform: str, config: ModelConfig, tensor: int = 1) -> Kernels:
    """Return the forms that an engine runs: attention over pages, experts of few tokens.

    `attention` is then a name of `rome.model.ops.paged.paged_attention`.

    Args:
      platform: as for `choose_kernels`.
      config: the model.
      tensor: devices that share the hidden units of each expert.
    """
    if platform == "cpu":
        if config.dtype == "float32":
            widths = (config.hidden_size, config.moe_intermediate_size // tensor, config.head_dim)
            reason = native.reason_unfit(*widths) or native.reason_missing()
            if reason is None:
                return Kernels("native", "native", "ring")
            logging.warning(
                "slower, and the last bits of an answer depend on its company unless --call_tokens"
                " is at most 32: the engine runs without its C++ forms: %s",
                reason,
            )
        return Kernels("gather", "tiled", "ring")
    experts_form = _best(platform, config, group=1, extent=()).experts
    has_kernel = platform == "tpu" and config.head_dim % LANES == 0
    return Kernels("ragged_paged" if has_kernel else "gather", experts_form, "ring")


def _check_runs(kind: str, name: str, names: tuple[str, ...], platform: str) -> None:
    if name not in names:
        raise ValueError(f"learner.{kind}={name!r} is unknown. Choose one of {', '.join(names)}.")
    if ONLY_ON.get(name, platform) != platform:
        raise ValueError(
            f"learner.{kind}={name!r} runs on {ONLY_ON[name]} only, and the mesh's devices are"
            f" {platform}. Set it to 'auto'."
        )
    if name == "tokamax" and not _has_tokamax():
        raise ValueError(
            f"learner.{kind}='tokamax' needs the package tokamax, which is not installed."
            " Install requirements-cuda.txt, or set it to 'auto'."
        )


def _best(platform: str, config: ModelConfig, group: int, extent: tuple[int, ...]) -> Kernels:
    if platform == "tpu":
        attention_form = "splash" if config.head_dim % LANES == 0 else "blocked"
        sends = is_worthwhile(config.experts_per_token, group, extent)
        return Kernels(attention_form, "megablox", "all_to_all" if sends else "ring")
    if platform == "gpu":
        # XLA's own ragged_dot computes every expert on a GPU, up to jaxlib 0.10.2.
        experts_form = "tokamax" if _has_tokamax() else "ragged"
        attention_form = "blocked"
        if config.dtype == "bfloat16" and _has_tokamax():
            attention_form = "tokamax"
        return Kernels(attention_form, experts_form, "ring")
    return Kernels(exchange="ring")


def _has_tokamax() -> bool:
    return importlib.util.find_spec("tokamax") is not None
