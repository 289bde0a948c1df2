"""Hugging Face checkpoints, read and written: safetensors and config.json.

A checkpoint directory is exactly what `transformers` writes for Qwen3ForCausalLM and
Qwen3MoeForCausalLM. Both directions move one block of one tensor at a time, on several threads: a
range of its rows, at most BLOCK_BYTES, between files and arrays on any number of devices. So host
memory holds some hundred megabytes whatever the model's size, and the stacked parameters exist on
their devices only.

`rome.model.hf.names` says which tensor is which slice of a parameter, `files` and `writer` how
bytes lie in the files, `assemble` and `slices` how devices are filled and read.
"""

from __future__ import annotations

import functools
import pathlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from rome.model.config import ModelConfig
from rome.model.hf import files
from rome.model.hf.assemble import Read, partial_arrays, reads
from rome.model.hf.files import CheckpointReader, in_threads
from rome.model.hf.names import Tensor, checkpoint_tensors, expected_tensors
from rome.model.hf.peft import HostAdapters
from rome.model.hf.slices import check_parameters, start_cut
from rome.model.hf.writer import MAX_SHARD_BYTES, CheckpointWriter, file_dtype

Progress = Callable[[int, int], None]  # bytes done, bytes in all
Block = tuple[str, int, Callable[[], np.ndarray]]  # tensor, first row, function that fetches rows

_MAX_LISTED = 8  # names of a kind in an error


def read_config(directory: str | pathlib.Path, **overrides: Any) -> ModelConfig:
    """Return the model of a checkpoint directory.

    Args:
      directory: with a config.json.
      overrides: ModelConfig fields that config.json does not hold, such as remat="none".

    Raises:
      FileNotFoundError: there is no config.json.
      ValueError: config.json is damaged, or of a model that is not supported.
    """
    document = files.read_document(pathlib.Path(directory) / "config.json")
    return ModelConfig.from_hf(document, **overrides)


def load_hf(
    directory: str | pathlib.Path,
    dtype: Any = jnp.float32,
    shardings: Any = None,
    *,
    progress: Progress | None = None,
    **overrides: Any,
) -> tuple[Any, ModelConfig]:
    """Read a checkpoint directory into parameters stacked over layers; return them and their model.

    Args:
      directory: the checkpoint.
      dtype: of the parameters.
      shardings: a sharding for each parameter, as param_shardings gives. Parameters then go
        straight to their devices, and each process reads only its own part, once, however many
        devices hold it. With several processes all of them call this. None: NumPy arrays.
      progress: told the bytes of the files that are read so far, and how many this process will
        read; called from several threads.
      overrides: as in `read_config`.

    Raises:
      FileNotFoundError: the checkpoint or a file of it is missing.
      ValueError: a file is damaged, or tensors are missing, unknown or mis-shaped, all of which one
        error lists before any is read.
    """
    directory = pathlib.Path(directory)
    config = read_config(directory, **overrides)
    with open_checkpoint(directory, config) as reader:
        arrays = partial_arrays(config, np.dtype(dtype), shardings)

        def place_in_files(job: Read) -> tuple[pathlib.Path, int, int]:
            stored = reader.tensors[job.tensor.name]
            return stored.path, stored.offset, job.start

        jobs = sorted(reads(config, arrays, reader), key=place_in_files)
        counter = _Counter(progress, sum(job.bytes for job in jobs))

        def run(job: Read) -> None:
            each = job.tensor.rows_each
            block = reader.read(job.tensor.name, job.start * each, job.stop * each)
            for part in job.parts:
                part.write(job.tensor, job.start, job.stop, block)
            counter.add(job.bytes)

        in_threads(run, jobs)
    params: dict[str, Any] = {}
    for path, array in arrays.items():
        _insert(params, path, array.result())
    return params, config


def save_hf(
    params: Any,
    config: ModelConfig,
    directory: str | pathlib.Path,
    dtype: Any = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    *,
    progress: Progress | None = None,
    adapters: HostAdapters | None = None,
) -> None:
    """Write config.json and model.safetensors, or several shards and their index.

    A checkpoint that is already in `directory` is removed first, and the new one is there only when
    all of it is: to publish to readers that watch the directory, write beside it and rename. Where
    parameters lie on the devices of several processes, all of them call this with one shared
    directory; each writes its share of the shards.

    Args:
      params: stacked over layers, or unstacked (`unstack_layers`); NumPy arrays or on devices, in
        any sharding.
      config: the model.
      directory: made if absent.
      dtype: float32 (the default) or bfloat16.
      max_shard_bytes: tensors that exceed this together go to several files.
      progress: told the bytes written so far by this process, and how many it will write; called
        from several threads.
      adapters: whose products are added to the tensors as they are written, in float32.

    Raises:
      ValueError: parameters do not fit the config, or dtype is another one.
      OSError: the disk has too little space, or a shard of another process is missing.
    """
    dtype = file_dtype(dtype or jnp.float32)
    tensors = checkpoint_tensors(config)
    check_parameters(params, config)
    writer = CheckpointWriter(
        pathlib.Path(directory),
        {tensor.name: tensor.shape for tensor in tensors},
        dtype,
        max_shard_bytes,
        jax.process_index(),
        jax.process_count(),
    )
    document = config.to_hf() | {"dtype": dtype.name, "torch_dtype": dtype.name}
    blocks = _cut_all(params, tensors, writer)
    if adapters is not None:
        blocks = merged_blocks(blocks, adapters)
    write_checkpoint(writer, blocks, document, progress)


def write_checkpoint(
    writer: CheckpointWriter,
    blocks: Iterator[Block],
    config: dict[str, Any],
    progress: Progress | None = None,
) -> None:
    """Write a whole checkpoint with a writer.

    Args:
      writer: not yet opened.
      blocks: every row that this process owns. Drawn in this thread; the functions in it are called
        in others.
      config: the dictionary of config.json.
      progress: as in `save_hf`.
    """
    leads = jax.process_index() == 0
    counter = _Counter(progress, writer.own_bytes)

    def write(block: Block) -> None:
        tensor, start, fetch = block
        rows = fetch()
        writer.write(tensor, start, rows)
        counter.add(rows.size * writer.dtype.itemsize)

    try:
        if leads:
            writer.clear()
        _wait_for_all("checkpoint cleared")
        writer.open()
        in_threads(write, blocks)
        writer.finish()
        _wait_for_all("checkpoint written")
        if leads:
            writer.commit(config)
        _wait_for_all("checkpoint committed")
    finally:
        writer.close()


def named_tensors(
    params: Any, config: ModelConfig, only: str | None = None
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield name and values of each checkpoint tensor, in the parameters' own type.

    One at a time is on the host.

    Args:
      params: as in `save_hf`.
      config: the model.
      only: name of the one tensor that is wanted.
    """
    check_parameters(params, config)
    for tensor in checkpoint_tensors(config):
        if only in (None, tensor.name):
            fetch = start_cut(params, tensor, 0, tensor.sizes[tensor.rows[0]])
            yield tensor.name, fetch()


def open_checkpoint(directory: pathlib.Path, config: ModelConfig) -> CheckpointReader:
    """Return the reader of a checkpoint that holds the tensors of `config` and no others.

    Raises:
      FileNotFoundError: the checkpoint or a file of it is missing.
      ValueError: lists tensors that are missing, extra or mis-shaped.
    """
    reader = CheckpointReader(directory)
    wanted = expected_tensors(config)
    found = reader.tensors
    extra = set(found) - set(wanted)
    if config.tie_embeddings:
        extra.discard("lm_head.weight")  # some writers store the tied head a second time
    misshaped = []
    for name, shape in wanted.items():
        if name in found and found[name].shape != shape:
            misshaped.append(f"{name} is {found[name].shape}, not {shape}")
    faults = {
        "missing": [name for name in wanted if name not in found],
        "extra": sorted(extra),
        "misshaped": misshaped,
    }
    listed = [_list(kind, names) for kind, names in faults.items() if names]
    if listed:
        raise ValueError(
            f"{directory} does not hold the tensors its config.json asks for. {'; '.join(listed)}"
        )
    return reader


def _list(kind: str, names: list[str]) -> str:
    more = ", ..." if len(names) > _MAX_LISTED else ""
    return f"{len(names)} {kind}: {', '.join(names[:_MAX_LISTED])}{more}"


def _cut_all(params: Any, tensors: list[Tensor], writer: CheckpointWriter) -> Iterator[Block]:
    for tensor in tensors:
        for start, stop in tensor.blocks(4, files.BLOCK_BYTES):
            # by every process, in one order: it may be a collective
            fetch = start_cut(params, tensor, start, stop)
            if writer.owns(tensor.name):
                yield tensor.name, start * tensor.rows_each, fetch


def merged_blocks(blocks: Iterator[Block], adapters: HostAdapters) -> Iterator[Block]:
    """Yield the blocks of a checkpoint with the products of adapters added."""

    def merge(block: Block) -> np.ndarray:
        name, start, fetch = block
        return adapters.add(name, start, fetch())

    for block in blocks:
        yield block[0], block[1], functools.partial(merge, block)


def _wait_for_all(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


class _Counter:
    """Adds up bytes from several threads and reports them to `progress`."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress = progress
        self._total = total
        self._done = 0
        self._lock = threading.Lock()

    def add(self, count: int) -> None:
        with self._lock:
            self._done += count
            if self._progress is not None:
                self._progress(self._done, self._total)


def _insert(tree: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value
