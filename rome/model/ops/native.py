"""The CPU's own forms of experts and paged attention, in C++ (native_*.cc): for engines.

They are built by the machine's C++ compiler at first use, for its processor, and kept in
.cache/native. Where there is no compiler, engines run the forms of XLA; `reason_missing` says why.

T tokens, D model, E experts, k experts a token, F expert hidden, S slots of adapters, r rank, N
query heads, K key heads, H head dim, R rows, M pages of a row, P positions of a page.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import pathlib
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array

HERE = pathlib.Path(__file__).parent
SOURCES = (HERE / "native_experts.cc", HERE / "native_attention.cc")
HEADER = HERE / "native.h"
CACHE = pathlib.Path(__file__).parents[3] / ".cache" / "native"
COMPILERS = ("g++", "clang++")
FLAGS = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-w")
BUILD_SECONDS = 300.0
LANES = 16  # widths of rows that the forms take are multiples of this
TARGETS = ("rome_experts", "rome_adapted_experts", "rome_paged_attention")


class NativeError(RuntimeError):
    """The forms cannot be built here."""


def fits(dtype: str, *widths: int) -> bool:
    """Return whether the forms take a model of this type with rows of these widths."""
    return dtype == "float32" and all(width % LANES == 0 for width in widths)


@functools.cache
def reason_missing() -> str | None:
    """Build and register the forms; return None, or why that is not possible here."""
    try:
        library = ctypes.cdll.LoadLibrary(str(_build()))
    except (NativeError, OSError) as error:
        return str(error)
    for name in TARGETS:
        target = jax.ffi.pycapsule(getattr(library, name))
        jax.ffi.register_ffi_target(name, target, platform="cpu")
    return None


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


def _build() -> pathlib.Path:
    """Return the shared library, built before or now."""
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        raise NativeError(f"no C++ compiler; install one of {', '.join(COMPILERS)}")
    texts = [path.read_text() for path in (HEADER, *SOURCES)]
    parts = (*texts, compiler, jax.__version__, *FLAGS, _processor())
    name = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    library = CACHE / f"{name}.so"
    if library.exists():
        return library
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        built = pathlib.Path(scratch) / "native.so"
        include = f"-I{jax.ffi.include_dir()}"
        command = [compiler, *FLAGS, include, *map(str, SOURCES), "-o", str(built)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_SECONDS)
        except subprocess.TimeoutExpired:
            raise NativeError(f"{compiler} took more than {BUILD_SECONDS:g} s") from None
        if done.returncode:
            raise NativeError(f"{compiler} failed: {done.stderr.strip()[-500:]}")
        os.replace(built, library)
    return library


def _processor() -> str:
    """Return what a library that was built for one processor must find on another."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
