"""Compiler flags by chip, each with its reason.

`rome.train.devices` sets them for the trainer before JAX is imported, where the machine says which
chip it has. They are the trainer's: embedded engines do not get them.

A flag that the user has set in LIBTPU_INIT_ARGS, XLA_FLAGS or the environment is kept. A flag that
the library does not know ends the process at start, so each was checked: those for TPU by compiling
a step with libtpu 0.0.42 (jax 0.10.2) for every topology named here (that of the exchange for v5e
and v5p only), those for GPU by jaxlib's own parser. No gain is claimed: they were not timed on
these chips.
"""

from __future__ import annotations

import glob
import pathlib
from collections.abc import Mapping

_TPU = {
    # A weight's all-gather may run beside matmuls of its own layer. Layers are one scan, so that of
    # layer k + 1 does not begin while layer k multiplies.
    "--xla_enable_async_all_gather": "true",
    "--xla_enable_async_all_reduce": "true",
    # Such a collective is cut into pieces that ride along inside matmul fusions; several steps of
    # it, so that a long one finds enough work to hide in.
    "--xla_tpu_enable_async_collective_fusion": "true",
    "--xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
    "--xla_tpu_enable_async_collective_fusion_multiple_steps": "true",
    # An exchange of experts starts and ends apart, so that the rows of one part travel while those
    # of another are multiplied (rome.model.ops.expert_exchange).
    "--xla_tpu_enable_async_ragged_all_to_all": "true",
    # The tensor core itself may drive the collective while it computes.
    "--xla_tpu_overlap_compute_collective_tc": "true",
    # Several slices: the gradients' all-reduce over the data-centre network starts as soon as a
    # layer's gradient is there, whatever its size.
    "--xla_tpu_enable_data_parallel_all_reduce_opt": "true",
    "--xla_tpu_data_parallel_opt_different_sized_ops": "true",
}
LIBTPU_ARGS: dict[str, dict[str, str]] = {  # chip -> flags for LIBTPU_INIT_ARGS
    # A kernel may take 16 MiB of VMEM unless told otherwise, which is all that a v4 core has. Where
    # there is more, grouped matmuls can hold larger tiles; the rest stays for weights that are
    # fetched ahead. VMEM a core, as Pallas' table of TPUs has it:
    "v4": _TPU,  # 16 MiB
    "v5e": _TPU | {"--xla_tpu_scoped_vmem_limit_kib": "81920"},  # 128 MiB
    "v5p": _TPU | {"--xla_tpu_scoped_vmem_limit_kib": "49152"},  # 64 MiB
    "v6e": _TPU | {"--xla_tpu_scoped_vmem_limit_kib": "81920"},  # 128 MiB
    "tpu7x": _TPU | {"--xla_tpu_scoped_vmem_limit_kib": "49152"},  # 64 MiB
}
GPU_XLA_FLAGS = {
    # Collectives start early and end late, with matmuls in between.
    "--xla_gpu_enable_latency_hiding_scheduler": "true",
    # Any matmul may use Triton where autotuning finds it faster than cuBLAS: the experts' odd
    # shapes are its case.
    "--xla_gpu_triton_gemm_any": "true",
    # FSDP under a scan over layers: the gather of the next layer and the scatter of the last one
    # cross the loop's edge, and unrolling it once saves the copies between its buffers.
    "--xla_gpu_enable_pipelined_all_gather": "true",
    "--xla_gpu_enable_pipelined_reduce_scatter": "true",
    "--xla_gpu_enable_while_loop_double_buffering": "true",
    # Small collectives are joined up to this size: NCCL reaches its bandwidth only with tens of
    # megabytes.
    "--xla_gpu_all_gather_combine_threshold_bytes": "134217728",
    "--xla_gpu_reduce_scatter_combine_threshold_bytes": "134217728",
    "--xla_gpu_all_reduce_combine_threshold_bytes": "134217728",
}
GPU_ENVIRONMENT = {
    # JAX takes three quarters of the memory by default; what this leaves is for NCCL and cuBLAS.
    "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92",
    # Twice the default a channel: fewer rounds over InfiniBand and RoCE.
    "NCCL_BUFFSIZE": "8388608",
}
# Device ids under Google's vendor id.
_PCI_CHIPS = {
    "0x005e": "v4",
    "0x0062": "v5p",
    "0x0063": "v5e",
    "0x006f": "v6e",
    "0x0076": "tpu7x",
}
_GOOGLE = "0x1ae0"
_NVIDIA = "0x10de"


def environment_of(chip: str | None, given: Mapping[str, str]) -> dict[str, str]:
    """Return the variables to set for a chip, beside the environment that is `given`."""
    if chip in LIBTPU_ARGS:
        arguments = merge(given.get("LIBTPU_INIT_ARGS", ""), LIBTPU_ARGS[chip])
        return {"LIBTPU_INIT_ARGS": arguments}
    if chip == "gpu":
        variables = {"XLA_FLAGS": merge(given.get("XLA_FLAGS", ""), GPU_XLA_FLAGS)}
        variables |= {name: value for name, value in GPU_ENVIRONMENT.items() if name not in given}
        if "XLA_CLIENT_MEM_FRACTION" in given:  # the newer name; JAX refuses both together
            variables.pop("XLA_PYTHON_CLIENT_MEM_FRACTION", None)
        return variables
    return {}


def merge(given: str, flags: Mapping[str, str]) -> str:
    """Return the given flags, followed by those of `flags` that they do not name."""
    merged = given.split()
    named = {flag.partition("=")[0] for flag in merged}
    merged += [f"{name}={value}" for name, value in flags.items() if name not in named]
    return " ".join(merged)


def find_chips(
    devices: str = "/sys/bus/pci/devices", nodes: str = "/dev"
) -> tuple[str | None, int]:
    """Return the accelerator on the PCI bus (a TPU's name, "gpu", or None), and how many there are.

    It only reads files, because importing JAX would fix the flags.
    """
    has_gpu = False
    tpus = []
    for vendor in sorted(glob.glob(f"{devices}/*/vendor")):
        path = pathlib.Path(vendor)
        maker = _word(path)
        model = _word(path.with_name("device"))
        if maker == _GOOGLE and model in _PCI_CHIPS:
            tpus.append(_PCI_CHIPS[model])
        has_gpu = has_gpu or maker == _NVIDIA
    if tpus:
        return tpus[0], len(tpus)
    gpus = glob.glob(f"{nodes}/nvidia[0-9]*")  # one for each GPU that has a driver
    return ("gpu", len(gpus)) if has_gpu and gpus else (None, 0)


def _word(path: pathlib.Path) -> str:
    """Return the content of a small file, "" where it cannot be read."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""
