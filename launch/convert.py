r"""Checkpoints from one form into the other: Hugging Face safetensors, and the orbax checkpoints
that training keeps.

python -m launch.convert --input=RUN --output=DIR --dtype=bfloat16     # a training workdir (or its checkpoints/) -> Hugging Face
python -m launch.convert --input=DIR --output=DIR2                     # Hugging Face -> orbax, which --config.init_from takes too
python -m launch.convert --input=DIR --output=DIR2 --to=hf --dtype=bfloat16   # Hugging Face -> Hugging Face in another type

The tokenizer comes along. Towards Hugging Face it works in a few gigabytes of memory whatever the
model's size, and only parameters are read, not the optimizer's moments. Towards orbax the
parameters are held by the devices that JAX finds: on a CPU, by its memory.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import pathlib
import shutil
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from absl import app, flags, logging

if TYPE_CHECKING:
    from rome.model.config import ModelConfig

_INPUT = flags.DEFINE_string(
    "input",
    None,
    "A Hugging Face directory, a training workdir, or the checkpoints/ of one.",
    required=True,
)
_OUTPUT = flags.DEFINE_string(
    "output", None, "The directory to make. It must not exist yet, or be empty.", required=True
)
_TO = flags.DEFINE_enum(
    "to", None, ["hf", "orbax"], "The form to write. Default: the one that the input does not have."
)
_DTYPE = flags.DEFINE_enum(
    "dtype", None, ["float32", "bfloat16"], "The type to write. Default: the input's own."
)
_STEP = flags.DEFINE_integer(
    "step", None, "Which training checkpoint to take. Default: the newest.", lower_bound=0
)

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "qwen.tiktoken",
    "chat_template.jinja",
    "generation_config.json",
)
LINE_SECONDS = 5.0  # without a terminal, one line of progress in so many seconds


@dataclasses.dataclass(frozen=True)
class Source:
    """What the input turned out to be.

    `checkpoints` is None for a Hugging Face directory; otherwise `step` is the one to take.

    `hf_config` is the config.json to write, of which `model` is the reading; `tokenizer` is the
    directory that has one, if any has.
    """

    directory: pathlib.Path
    checkpoints: pathlib.Path | None
    step: int
    hf_config: dict[str, Any]
    model: ModelConfig
    tokenizer: pathlib.Path


def find_source(directory: pathlib.Path, step: int | None) -> Source:
    """Looks into a directory. Raises ValueError or OSError that says what is missing."""
    from rome.model.config import ModelConfig
    from rome.model.hf.files import read_json
    from rome.train.parameters import saved_steps

    if not directory.is_dir():
        raise FileNotFoundError(
            f"--input={directory} is not a directory; give a Hugging Face checkpoint or a training"
            " workdir"
        )
    if not (directory / "checkpoints").is_dir() and (directory / "config.json").exists():
        if step is not None:
            raise ValueError(
                f"--step={step}, but {directory} is a Hugging Face checkpoint and has no steps;"
                " leave it out"
            )
        spelled = read_json(directory / "config.json")
        if "experiment" in spelled:
            raise FileNotFoundError(
                f"{directory} is the workdir of a run without checkpoints; let it train to its"
                " first one"
            )
        return Source(directory, None, 0, spelled, ModelConfig.from_hf(spelled), directory)
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
    spelled, tokenizer = _model_of(read_json(workdir / "config.json"), workdir)
    return Source(
        directory,
        checkpoints,
        steps[-1] if step is None else step,
        spelled,
        ModelConfig.from_hf(spelled),
        tokenizer,
    )


def _model_of(
    document: dict[str, Any], workdir: pathlib.Path
) -> tuple[dict[str, Any], pathlib.Path]:
    """config.json for Hugging Face and the tokenizer of what trained in `workdir`, whose own
    config.json is `document`.
    """
    from rome.model.config import PRESETS
    from rome.model.tokenizer import Tokenizer

    if (
        "experiment" not in document
    ):  # converted from a Hugging Face checkpoint: its config.json came along
        return document, workdir
    if document.get("model") not in PRESETS:
        raise ValueError(
            f"{workdir / 'config.json'} has model={document.get('model')!r}; known are"
            f" {', '.join(PRESETS)}"
        )
    tokenizer = Tokenizer.load(document["tokenizer"])
    config = dataclasses.replace(
        PRESETS[document["model"]], eos_token_id=tokenizer.im_end, pad_token_id=tokenizer.pad
    )
    return config.to_hf(), pathlib.Path(document["tokenizer"])


def write_hf(
    source: Source, directory: pathlib.Path, dtype: str | None, progress: Callable[[int, int], None]
) -> None:
    """Streams the source's tensors into a Hugging Face checkpoint."""
    from rome.model.hf.checkpoint import open_checkpoint, write_checkpoint
    from rome.model.hf.files import CheckpointWriter, file_dtype
    from rome.model.hf.names import expected_tensors
    from rome.train.parameters import StoredParameters

    shapes = expected_tensors(source.model)
    with contextlib.ExitStack() as stack:
        if source.checkpoints is None:
            reader = stack.enter_context(open_checkpoint(source.directory, source.model))
            own = reader.tensors["model.embed_tokens.weight"].dtype
            blocks = reader.blocks(shapes)
        else:
            stored = StoredParameters(source.checkpoints, source.step, source.model)
            own, blocks = stored.dtype, stored.blocks()
        dtype = file_dtype(dtype or own)
        spelled = source.hf_config | {"dtype": dtype.name, "torch_dtype": dtype.name}
        write_checkpoint(CheckpointWriter(directory, shapes, dtype), blocks, spelled, progress)


def write_orbax(
    source: Source, directory: pathlib.Path, dtype: str | None, progress: Callable[[int, int], None]
) -> None:
    """Loads the source onto the devices that are there, split as far as they divide the model, and
    writes parameters only.
    """
    import jax
    import jax.numpy as jnp

    from rome.model.hf.checkpoint import load_hf, open_checkpoint
    from rome.model.hf.files import write_json
    from rome.model.sharding import make_mesh, param_shardings
    from rome.train.parameters import StoredParameters, save_parameters

    devices = max(
        count for count in range(1, jax.device_count() + 1) if source.model.hidden_size % count == 0
    )
    shardings = param_shardings(make_mesh({"fsdp": devices}), source.model)
    if source.checkpoints is None:
        own = (
            open_checkpoint(source.directory, source.model)
            .tensors["model.embed_tokens.weight"]
            .dtype
        )
        _check_room(source.model, jnp.dtype(dtype or own), directory)
        params, _ = load_hf(source.directory, jnp.dtype(dtype or own), shardings, progress=progress)
    else:
        stored = StoredParameters(source.checkpoints, source.step, source.model)
        _check_room(source.model, jnp.dtype(dtype or stored.dtype), directory)
        params = stored.restore(shardings, jnp.dtype(dtype or stored.dtype))
    save_parameters(directory / "checkpoints", params)
    write_json(
        directory / "config.json", source.hf_config | {"dtype": str(params["norm"]["scale"].dtype)}
    )


def _check_room(model: ModelConfig, dtype: Any, directory: pathlib.Path) -> None:
    """Fails before a long job that could not end well: on the disk, and in memory where the devices
    are this machine's CPU.
    """
    import jax

    from rome.model.hf.files import check_space
    from rome.model.hf.names import expected_tensors

    needed = sum(map(math.prod, expected_tensors(model).values())) * dtype.itemsize
    check_space(directory.parent, needed)
    meminfo = pathlib.Path("/proc/meminfo")
    if jax.default_backend() != "cpu" or not meminfo.exists():
        return
    free = next(
        int(line.split()[1]) * 1024
        for line in meminfo.read_text().splitlines()
        if line.startswith("MemAvailable")
    )
    if needed > free:
        raise ValueError(
            f"the parameters take {needed / 1e9:.1f} GB as {dtype.name}, and {free / 1e9:.1f} GB of"
            " memory are free; run it where there is more, or on accelerators (JAX_PLATFORMS)"
        )


class ProgressBar:
    """Bytes done: a bar in a terminal, otherwise a line now and then.

    Called from several threads, one at a time.
    """

    def __init__(self, label: str) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        self._label, self._started, self._said = label, time.monotonic(), time.monotonic()
        console = Console(highlight=False)
        self._bar = None
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
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=total)
            return
        now = time.monotonic()
        if done < total and now - self._said < LINE_SECONDS:
            return
        self._said = now
        rate = done / max(now - self._started, 1e-9)
        left = f", {(total - done) / rate:.0f} s left" if done < total else ""
        print(
            f"{self._label} {done / 1e9:.2f} of {total / 1e9:.2f} GB, {rate / 1e6:.0f} MB/s{left}",
            flush=True,
        )


def convert(
    directory: pathlib.Path,
    output: pathlib.Path,
    to: str | None,
    dtype: str | None,
    step: int | None,
) -> str:
    """Makes `output`, whole or not at all, and returns what to say about it."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"--output={output} exists already; give another, or remove it")
    source = find_source(directory, step)
    to = to or ("orbax" if source.checkpoints is None else "hf")
    partial = output.absolute().with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a conversion that was killed
    partial.mkdir(parents=True)
    try:
        with ProgressBar("writing" if to == "hf" else "reading") as progress:
            (write_hf if to == "hf" else write_orbax)(source, partial, dtype, progress)
        copied = copy_tokenizer(source.tokenizer, partial)
        if output.exists():
            output.rmdir()
        partial.rename(output)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    what = "Hugging Face checkpoint" if to == "hf" else "orbax checkpoint of the parameters"
    taken = "" if source.checkpoints is None else f" of step {source.step}"
    return (
        f"{output}: {what}{taken}, with {', '.join(copied)}"
        if copied
        else f"{output}: {what}{taken}; the input has no tokenizer to copy"
    )


def copy_tokenizer(source: pathlib.Path, directory: pathlib.Path) -> list[str]:
    """Copies what the tokenizer and generation need. Returns the files' names."""
    names = [name for name in TOKENIZER_FILES if (source / name).is_file()]
    for name in names:
        shutil.copyfile(source / name, directory / name)
    return names


def main(argv: list[str]) -> int:
    if len(argv) > 1:
        raise ValueError(f"argument {argv[1]!r} is not understood; flags look like --input=DIR")
    logging.set_verbosity(logging.WARNING)  # orbax narrates
    print(
        convert(
            pathlib.Path(_INPUT.value),
            pathlib.Path(_OUTPUT.value),
            _TO.value,
            _DTYPE.value,
            _STEP.value,
        ),
        flush=True,
    )
    return 0


def parse(argv: list[str]) -> list[str]:
    """absl's parser, with one clear line for what it does not understand."""
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        sys.exit(f"launch.convert: {' '.join(str(error).split())}")


def run_main(argv: list[str]) -> int:
    """`main`; a known kind of failure becomes one line. ROME_DEBUG=1 keeps the traceback."""
    from rome.train.checkpoint import CheckpointError

    try:
        return main(argv)
    except (ValueError, OSError, CheckpointError) as error:
        if os.environ.get("ROME_DEBUG"):
            raise
        text = str(error)
        if isinstance(error, OSError) and error.strerror:
            text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
        print(f"launch.convert: {' '.join(text.split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("launch.convert: interrupted; nothing was written", file=sys.stderr)
        return 130


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # moving bytes needs no accelerator
    app.run(run_main, flags_parser=parse)
