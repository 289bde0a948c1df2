"""Convert checkpoints: Hugging Face safetensors, and the orbax checkpoints that training keeps.

Towards Hugging Face it works in a few gigabytes of memory whatever the model's size, and reads only
parameters, not the optimizer's moments. Towards orbax the parameters are held by the devices that
JAX finds: on a CPU, by its memory.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import pathlib
import shutil
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from rome.files import sync
from rome.model.config import ModelConfig
from rome.model.hf.checkpoint import (
    Block,
    load_hf,
    merged_blocks,
    open_checkpoint,
    write_checkpoint,
)
from rome.model.hf.companions import copy_companions
from rome.model.hf.digest import FilesDigest
from rome.model.hf.files import CheckpointReader, check_space, read_document, write_json
from rome.model.hf.names import expected_tensors
from rome.model.hf.peft import HostAdapters, load_peft, save_peft
from rome.model.hf.writer import CheckpointWriter, file_dtype
from rome.model.lora import Lora, find_targets
from rome.model.params import param_shardings
from rome.model.sharding import make_mesh
from rome.train.parameters import (
    StoredParameters,
    save_parameters,
    saved_steps,
    stored_adapters,
    stored_base,
)
from rome.train.workdir import MODEL, start_directory, tokenizer_directory

LINE_SECONDS = 5.0  # between two lines of progress, where there is no terminal


@dataclasses.dataclass(frozen=True)
class Source:
    """The checkpoint that an input directory holds.

    Attributes:
      directory: the input.
      checkpoints: directory of orbax checkpoints; None for a Hugging Face directory.
      step: of the orbax checkpoint.
      hf_config: the dictionary of config.json to write.
      model: the model that it describes.
      tokenizer: directory with the tokenizer's files, if any.
      start: directory that the weights were trained from, if any.
      adapters: to add to the weights; those of `start` where a run has trained them.
      base: what the run noted of the weights that its adapters belong to.
    """

    directory: pathlib.Path
    checkpoints: pathlib.Path | None
    step: int
    hf_config: dict[str, Any]
    model: ModelConfig
    tokenizer: pathlib.Path
    start: pathlib.Path | None = None
    adapters: HostAdapters | None = None
    base: dict[str, str] | None = None


def convert(
    directory: pathlib.Path,
    output: pathlib.Path,
    to: str | None = None,
    dtype: str | None = None,
    step: int | None = None,
    adapter: pathlib.Path | None = None,
) -> str:
    """Convert a checkpoint with its tokenizer; return a sentence about the result.

    Args:
      directory: a Hugging Face directory, a training workdir, or the checkpoints/ of one.
      output: directory to make, whole or not at all. It must not exist or be empty.
      to: "hf", "orbax", or "peft" for the adapters of a run alone; None: the form that the input
        does not have.
      dtype: "float32" or "bfloat16"; None: the input's own.
      step: of the training checkpoint; None: the newest.
      adapter: directory in PEFT's layout, to merge into a Hugging Face directory.

    Raises:
      FileExistsError: `output` has content.
      FileNotFoundError: the input holds no checkpoint.
      ValueError: the input is damaged or a choice does not fit it.
      OSError: the disk has too little space.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"--output={output} exists already; give another, or remove it")
    source = find_source(directory, step)
    if adapter is not None:
        source = _with_adapter(source, adapter)
    if to is None:
        to = "orbax" if source.checkpoints is None and source.adapters is None else "hf"
    _check_form(source, to)
    if to == "peft":
        return _write_peft(source, output)
    write = write_hf if to == "hf" else write_orbax
    partial = output.absolute().with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a conversion that was killed
    partial.mkdir(parents=True)
    try:
        with ProgressBar("writing" if to == "hf" else "reading") as progress:
            write(source, partial, dtype, progress)
        copied = copy_companions(partial, source.tokenizer, source.start)
        if output.exists():
            output.rmdir()
        partial.rename(output)
        sync(output.absolute().parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    form = "Hugging Face checkpoint" if to == "hf" else "orbax checkpoint of the parameters"
    taken = "" if source.checkpoints is None else f" of step {source.step}"
    if copied:
        return f"{output}: {form}{taken}, with {', '.join(copied)}"
    return f"{output}: {form}{taken}; the input has no tokenizer to copy"


def find_source(directory: pathlib.Path, step: int | None) -> Source:
    """Return the checkpoint that a directory holds.

    Raises:
      FileNotFoundError: it holds none; the message says what is missing.
      ValueError: there is no such step, or a config.json is damaged.
    """
    if not directory.is_dir():
        raise FileNotFoundError(
            f"--input={directory} is not a directory; give a Hugging Face checkpoint or a training"
            " workdir"
        )
    if not (directory / "checkpoints").is_dir() and (directory / "config.json").exists():
        return _hf_source(directory, step)
    checkpoints = directory if directory.name == "checkpoints" else directory / "checkpoints"
    steps = saved_steps(checkpoints) if checkpoints.is_dir() else []
    if not steps:
        raise FileNotFoundError(
            f"{directory} holds neither a Hugging Face checkpoint (config.json) nor a training"
            " checkpoint (checkpoints/STEP)"
        )
    if step is not None and step not in steps:
        raise ValueError(
            f"--step={step} is not in {checkpoints}, which holds {', '.join(map(str, steps))};"
            " choose one of them"
        )
    workdir = checkpoints.absolute().parent
    document = read_document(workdir / "config.json")
    hf_config, tokenizer, start = _model_of(document, workdir)
    source = Source(
        directory,
        checkpoints,
        step=steps[-1] if step is None else step,
        hf_config=hf_config,
        model=ModelConfig.from_hf(hf_config),
        tokenizer=tokenizer,
        start=start,
    )
    return _with_trained_adapters(source, document.get("lora") or {})


def _with_trained_adapters(source: Source, settings: dict[str, Any]) -> Source:
    """Return the source with the adapters of its run, where that has trained some.

    Args:
      source: of a run.
      settings: the block `lora` of the run's config.
    """
    if not settings.get("rank") or source.checkpoints is None:
        return source
    targets = find_targets(settings["targets"], source.model)
    lora = Lora(settings["rank"], settings["alpha"], targets)
    return dataclasses.replace(
        source,
        adapters=stored_adapters(source.checkpoints, source.step, source.model, lora),
        base=stored_base(source.checkpoints, source.step),
    )


def write_hf(
    source: Source, directory: pathlib.Path, dtype: str | None, progress: Callable[[int, int], None]
) -> None:
    """Stream the source's tensors into a Hugging Face checkpoint.

    Args:
      source: the input.
      directory: to write into.
      dtype: as for `convert`.
      progress: told bytes done and bytes in all; called from several threads.
    """
    shapes = expected_tensors(source.model)
    with contextlib.ExitStack() as stack:
        blocks: Iterator[Block]
        base = None
        if source.base is not None:
            reader = stack.enter_context(open_checkpoint(_base_directory(source), source.model))
            own_dtype = np.dtype(source.base["dtype"])
            base = _BaseBlocks(reader.blocks(shapes), own_dtype)
            blocks = iter(base)
        elif source.checkpoints is None:
            reader = stack.enter_context(open_checkpoint(source.directory, source.model))
            own_dtype = _dtype_of(reader)
            blocks = reader.blocks(shapes)
        else:
            stored = StoredParameters(source.checkpoints, source.step, source.model)
            own_dtype = stored.dtype
            blocks = stored.blocks()
        if source.adapters is not None:
            blocks = merged_blocks(blocks, source.adapters)
        written = file_dtype(dtype or own_dtype)
        document = source.hf_config | {"dtype": written.name, "torch_dtype": written.name}
        write_checkpoint(CheckpointWriter(directory, shapes, written), blocks, document, progress)
        if base is not None:
            base.check(source)


def write_orbax(
    source: Source, directory: pathlib.Path, dtype: str | None, progress: Callable[[int, int], None]
) -> None:
    """Load the source onto the devices, split as far as they divide it, and write its parameters.

    Args:
      source: the input.
      directory: to write into.
      dtype: as for `convert`.
      progress: told bytes read and bytes in all; called from several threads.
    """
    counts = range(1, jax.device_count() + 1)
    devices = max(count for count in counts if source.model.hidden_size % count == 0)
    shardings = param_shardings(make_mesh({"fsdp": devices}), source.model)
    if source.checkpoints is None:
        own_dtype = _dtype_of(open_checkpoint(source.directory, source.model))
        loaded = jnp.dtype(dtype or own_dtype)
        _check_room(source.model, loaded, directory)
        params, _ = load_hf(source.directory, loaded, shardings, progress=progress)
    else:
        stored = StoredParameters(source.checkpoints, source.step, source.model)
        loaded = jnp.dtype(dtype or stored.dtype)
        _check_room(source.model, loaded, directory)
        params = stored.restore(shardings, loaded)
    save_parameters(directory / "checkpoints", params)
    document = source.hf_config | {"dtype": str(params["norm"]["scale"].dtype)}
    write_json(directory / "config.json", document)


class _BaseBlocks:
    """The blocks of the weights that a run's adapters belong to, as it had them, and their digest.

    Args:
      blocks: of the checkpoint.
      dtype: of the weights in the run.
    """

    def __init__(self, blocks: Iterator[Block], dtype: np.dtype) -> None:
        self._blocks = blocks
        self._dtype = dtype
        self._digest = FilesDigest()

    def __iter__(self) -> Iterator[Block]:
        for name, start, fetch in self._blocks:
            yield name, start, functools.partial(self._read, name, start, fetch)

    def _read(self, name: str, start: int, fetch: Callable[[], np.ndarray]) -> np.ndarray:
        rows = fetch().astype(self._dtype, copy=False)
        self._digest.add(name, start, rows)
        return rows

    def check(self, source: Source) -> None:
        """Raise ValueError where the blocks were not those that the adapters were trained on."""
        found = self._digest.result()
        if source.base is not None and found != source.base["digest"]:
            raise ValueError(
                f"{_base_directory(source)} has digest {found}, and the adapters of"
                f" {source.directory} were trained on {source.base['digest']}; bring that one back"
            )


class ProgressBar:
    """Bytes done: a bar in a terminal, otherwise a line every LINE_SECONDS.

    A context manager that returns the function to call, from several threads, one at a time.
    """

    def __init__(self, label: str) -> None:
        self._label = label
        self._started = time.monotonic()
        self._printed = self._started
        self._bar: Progress | None = None
        console = Console(highlight=False)
        if console.is_terminal and not console.is_dumb_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                DownloadColumn(),
                TransferSpeedColumn(),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=console)
            self._task = self._bar.add_task(label, total=None)

    def __enter__(self) -> Callable[[int, int], None]:
        if self._bar is not None:
            self._bar.start()
        return self.update

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, done: int, total: int) -> None:
        """Show that `done` of `total` bytes are done."""
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=total)
            return
        now = time.monotonic()
        if done < total and now - self._printed < LINE_SECONDS:
            return
        self._printed = now
        rate = done / max(now - self._started, 1e-9)
        left = f", {(total - done) / rate:.0f} s left" if done < total else ""
        print(
            f"{self._label} {done / 1e9:.2f} of {total / 1e9:.2f} GB, {rate / 1e6:.0f} MB/s{left}",
            flush=True,
        )


def _base_directory(source: Source) -> pathlib.Path:
    """Return the directory of the weights that a run's adapters belong to.

    Raises:
      FileNotFoundError: it started from random weights, or the directory is gone.
    """
    if source.start is None or not source.start.is_dir():
        raise FileNotFoundError(
            f"{source.directory} has trained adapters, and the weights that they belong to are not"
            f" there ({source.start or 'random ones'}); its final/ holds them merged"
        )
    return source.start


def _check_form(source: Source, to: str) -> None:
    if to == "peft" and source.base is None:
        raise ValueError(
            f"--to=peft writes the adapters of a run, and {source.directory} has none; a run has"
            " them with --config.lora.rank above 0"
        )
    if to == "orbax" and source.adapters is not None:
        raise ValueError(
            "--to=orbax does not merge adapters; write --to=hf first, and convert the result"
        )


def _write_peft(source: Source, output: pathlib.Path) -> str:
    """Write the adapters of a run alone; return a sentence about the result."""
    assert source.adapters is not None
    partial = output.absolute().with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    save_peft(source.adapters, str(source.start or ""), partial)
    if output.exists():
        output.rmdir()
    partial.rename(output)
    sync(output.absolute().parent)
    return f"{output}: adapters of step {source.step} in PEFT's layout"


def _with_adapter(source: Source, adapter: pathlib.Path) -> Source:
    """Return a Hugging Face directory with adapters to merge into it."""
    if source.checkpoints is not None:
        raise ValueError(
            f"--adapter={adapter} is merged into a Hugging Face directory, and {source.directory}"
            " is a run; convert that one first"
        )
    return dataclasses.replace(source, adapters=load_peft(adapter, source.model))


def _hf_source(directory: pathlib.Path, step: int | None) -> Source:
    if step is not None:
        raise ValueError(
            f"--step={step}, but {directory} is a Hugging Face checkpoint and has no steps;"
            " leave it out"
        )
    document = read_document(directory / "config.json")
    if "experiment" in document:
        raise FileNotFoundError(
            f"{directory} is the workdir of a run without checkpoints; let it train to its"
            " first one"
        )
    return Source(directory, None, 0, document, ModelConfig.from_hf(document), directory)


def _model_of(
    document: dict[str, Any], workdir: pathlib.Path
) -> tuple[dict[str, Any], pathlib.Path, pathlib.Path | None]:
    """Return a config.json for Hugging Face, the tokenizer and the start of a workdir's config."""
    if "experiment" not in document:
        # converted from a Hugging Face checkpoint: its config.json was copied
        return document, workdir, None
    tokenizer_folder = tokenizer_directory(document, workdir)
    start = start_directory(document, workdir)
    if (workdir / MODEL).exists():
        return read_document(workdir / MODEL), tokenizer_folder, start
    raise FileNotFoundError(
        f"{workdir} has no {MODEL}; it is written when a run starts. Bring it back from a copy."
    )


def _dtype_of(reader: CheckpointReader) -> np.dtype:
    return reader.tensors["model.embed_tokens.weight"].dtype


def _check_room(model: ModelConfig, dtype: np.dtype, directory: pathlib.Path) -> None:
    """Check that the parameters fit before a long job: on the disk, and in this CPU's memory.

    Raises:
      OSError: the disk has too little space.
      ValueError: the memory is too small, where the devices are this machine's CPU.
    """
    needed = sum(map(math.prod, expected_tensors(model).values())) * dtype.itemsize
    check_space(directory.parent, needed)
    meminfo = pathlib.Path("/proc/meminfo")
    if jax.default_backend() != "cpu" or not meminfo.exists():
        return
    lines = meminfo.read_text().splitlines()
    available = next(line for line in lines if line.startswith("MemAvailable"))
    free = int(available.split()[1]) * 1024
    if needed > free:
        raise ValueError(
            f"the parameters take {needed / 1e9:.1f} GB as {dtype.name}, and {free / 1e9:.1f} GB of"
            " memory are free; run it where there is more, or on accelerators (JAX_PLATFORMS)"
        )
