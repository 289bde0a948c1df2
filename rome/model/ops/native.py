"""The CPU's own forms of products, experts and paged attention, in C++ (native_*.cc): for engines.

They are built by the machine's C++ compiler at first use, for its processor, and kept in
.cache/native. A library that cannot be loaded (cut short, or of a system with newer libraries) is
built again, and where nothing can be kept it is built for one process. Where there is no compiler,
engines run the forms of XLA; `reason_missing` says why.

T tokens, I inputs, O outputs, D model, E experts, k experts a token, F expert hidden, S slots of
adapters, r rank, N query heads, K key heads, H head dim, R rows, M pages of a row, P positions of a
page.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import pathlib
import platform
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
from jax import Array

HERE = pathlib.Path(__file__).parent
SOURCES = tuple(HERE / f"native_{name}.cc" for name in ("products", "experts", "attention"))
HEADER = HERE / "native.h"
CACHE = pathlib.Path(__file__).parents[3] / ".cache" / "native"
COMPILERS = ("g++", "clang++")
# Some compilers know their own processor by the second name only, such as Apple's on ARM.
OWN_PROCESSOR = ("-march=native", "-mcpu=native")
FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-w", "-ffp-contract=off")  # see `fused`
BUILD_SECONDS = 300.0
LANES = 16  # widths of rows that the forms take are multiples of this
FEW_COLUMNS = 32
TARGETS = (
    "rome_products",
    "rome_norm",
    "rome_experts",
    "rome_adapted_experts",
    "rome_paged_attention",
)


# Of /proc/cpuinfo, on x86, ARM and others: what chooses the instructions.
PROCESSOR_FIELDS = frozenset(
    {
        "vendor_id",
        "cpu family",
        "model",
        "flags",
        "Features",
        "CPU implementer",
        "CPU part",
        "cpu",
        "isa",
        "features",
    }
)

_lock = threading.Lock()


class NativeError(RuntimeError):
    """The forms cannot be built here."""


def reason_unfit(*widths: int) -> str | None:
    """Return why the forms take no float32 model with rows of these widths; None if they do."""
    if all(width % LANES == 0 for width in widths):
        return None
    return f"the widths {', '.join(map(str, widths))} are not all multiples of {LANES}"


def reason_missing() -> str | None:
    """Build and register the forms; return None, or why that is not possible here."""
    with _lock:  # several engines of one process may start at once
        return _register()


@functools.cache
def _register() -> str | None:
    try:
        library = _load()
    except (NativeError, OSError) as error:
        return str(error)
    for name in TARGETS:
        target = jax.ffi.pycapsule(getattr(library, name))
        jax.ffi.register_ffi_target(name, target, platform="cpu")
    return None


def products_native(x_TI: Array, *matrices: Array, transposed: bool = False) -> list[Array]:
    """Return the products of rows with matrices, each row's in an order of its own.

    Args:
      x_TI: the rows.
      matrices: [I, O] of any O, float32.
      transposed: they are [O, I].

    Returns:
      [T, O] for each matrix.
    """
    _require()
    widths = [matrix.shape[0 if transposed else 1] for matrix in matrices]
    shapes = [jax.ShapeDtypeStruct((x_TI.shape[0], width), x_TI.dtype) for width in widths]
    call = jax.ffi.ffi_call("rome_products", shapes)
    return list(call(x_TI, *matrices, transposed=transposed))


def product_of_rows(x_TI: Array, w_IO: Array, is_native: bool) -> Array:
    """Return the float32 product, by C++ or by XLA.

    XLA's sums depend on the number of rows where there are few columns and a processor has AVX2
    alone: narrow matrices are filled up with zeros.
    """
    if is_native:
        return products_native(x_TI, w_IO)[0]
    columns = w_IO.shape[1]
    if columns < FEW_COLUMNS:
        w_IO = jnp.pad(w_IO, ((0, 0), (0, FEW_COLUMNS - columns)))
    return jnp.matmul(x_TI, w_IO, precision="highest")[:, :columns]


def norm_native(x: Array, scale_D: Array, epsilon: float) -> Array:
    """Return x / rms(x) * scale over the last axis of a float32 array."""
    _require()
    D = x.shape[-1]
    call = jax.ffi.ffi_call("rome_norm", jax.ShapeDtypeStruct((x.size // D, D), x.dtype))
    return call(x.reshape(-1, D), scale_D, epsilon=np.float32(epsilon)).reshape(x.shape)


def experts_native(
    x_TD: Array, gate_EDF: Array, up_EDF: Array, down_EFD: Array, weights_Tk: Array, ids_Tk: Array
) -> Array:
    """Return what `rome.model.ops.experts.experts` does, without a gradient."""
    _require()
    call = jax.ffi.ffi_call("rome_experts", jax.ShapeDtypeStruct(x_TD.shape, x_TD.dtype))
    return call(x_TD, gate_EDF, up_EDF, down_EFD, weights_Tk, ids_Tk)


def adapted_experts_native(
    x_TD: Array,
    weights: tuple[Array, Array, Array],
    weights_Tk: Array,
    ids_Tk: Array,
    slot_T: Array,
    scale_S: Array,
    pairs: Sequence[tuple[Array, Array]],
) -> Array:
    """Return what `rome.model.ops.low_rank.adapted_experts` does.

    Args:
      x_TD: inputs of the experts.
      weights: gate, up and down, without adapters.
      weights_Tk: of the experts of each token.
      ids_Tk: experts of each token; negative or E is none.
      slot_T: adapter of each token; negative is none.
      scale_S: factor of each adapter's products.
      pairs: of gate, up and down: A [S, E, I, r] and B [S, E, r, O], r a multiple of LANES or 0.
    """
    _require()
    call = jax.ffi.ffi_call("rome_adapted_experts", jax.ShapeDtypeStruct(x_TD.shape, x_TD.dtype))
    flat = [array for pair in pairs for array in pair]
    return call(x_TD, *weights, weights_Tk, ids_Tk, slot_T, scale_S, *flat)


def attention_native(
    q_TNH: Array, kv_TKH: Array, row_T: Array, position_T: Array, table_RM: Array, kv: Array
) -> tuple[Array, Array]:
    """Write a call's keys and values to their pages, and attend: see `rome.model.ops.paged`.

    Args:
      q_TNH: queries, not scaled.
      kv_TKH: [T, 2 * K, H], keys and values as they lie in a page.
      row_T: row of the table of each token.
      position_T: place in its sequence; negative for padding.
      table_RM: pages of each row.
      kv: the pages, which the result takes the place of.

    Returns:
      [T, N, H], zeros for padding, and the pages.
    """
    _require()
    shapes = (
        jax.ShapeDtypeStruct(q_TNH.shape, q_TNH.dtype),
        jax.ShapeDtypeStruct(kv.shape, kv.dtype),
    )
    call = jax.ffi.ffi_call("rome_paged_attention", shapes, input_output_aliases={5: 1})
    out_TNH, kv = call(q_TNH, kv_TKH, row_T, position_T.astype(jnp.int32), table_RM, kv)
    return out_TNH, kv


def _require() -> None:
    reason = reason_missing()
    if reason is not None:
        raise ValueError(f"the native forms cannot run here: {reason}")


def _load() -> ctypes.CDLL:
    """Return the shared library, built before or now."""
    kept = CACHE / f"{_name()}.so"
    with contextlib.suppress(OSError):  # not there, cut short, or of another system
        return ctypes.CDLL(str(kept))
    with tempfile.TemporaryDirectory() as scratch:
        built = _build(pathlib.Path(scratch))
        with contextlib.suppress(OSError):  # a cache that is read-only, full, or runs nothing
            _keep(built, kept)
            return ctypes.CDLL(str(kept))
        return ctypes.CDLL(str(built))  # stays in memory when the file is gone


def _name() -> str:
    """Return a name that libraries share which give the same results on the same machines."""
    texts = [path.read_text() for path in (HEADER, *SOURCES)]
    versions = (jax.__version__, jaxlib.__version__)
    parts = (*texts, *versions, *OWN_PROCESSOR, *FLAGS, platform.system(), _processor())
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _keep(built: pathlib.Path, kept: pathlib.Path) -> None:
    """Copy a library to the cache, whole or not at all."""
    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=kept.parent) as scratch:
        copy = shutil.copy(built, scratch)
        os.replace(copy, kept)


def _build(scratch: pathlib.Path) -> pathlib.Path:
    """Return the shared library, built in a directory by the first compiler that can."""
    compilers = [path for path in map(shutil.which, COMPILERS) if path is not None]
    if not compilers:
        raise NativeError(f"no C++ compiler; install one of {', '.join(COMPILERS)}")
    built = scratch / "native.so"
    faults = []
    for compiler in compilers:
        for own in OWN_PROCESSOR:
            include = f"-I{jax.ffi.include_dir()}"
            command = [compiler, own, *FLAGS, include, *map(str, SOURCES), "-o", str(built)]
            try:
                done = subprocess.run(
                    command, capture_output=True, text=True, timeout=BUILD_SECONDS
                )
            except subprocess.TimeoutExpired:
                faults.append(f"{compiler} took more than {BUILD_SECONDS:g} s")
                break
            if not done.returncode:
                return built
            faults.append(f"{compiler} {own} failed: {done.stderr.strip()[-500:]}")
    raise NativeError("; ".join(faults))


def _processor() -> str:
    """Return what a library that was built for one processor must find on another."""
    try:
        first, *_ = pathlib.Path("/proc/cpuinfo").read_text().strip().split("\n\n")
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    fields = (line.partition(":") for line in first.splitlines())
    known = [value.strip() for name, _, value in fields if name.strip() in PROCESSOR_FIELDS]
    return " ".join((platform.machine(), *known))
