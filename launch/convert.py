r"""Convert checkpoints: Hugging Face safetensors, and the orbax checkpoints that training keeps.

A training workdir (or its checkpoints/) to Hugging Face:
    python -m launch.convert --input=RUN --output=DIR --dtype=bfloat16
Hugging Face to orbax, which --config.init_from takes too:
    python -m launch.convert --input=DIR --output=DIR2
Hugging Face to Hugging Face in another type:
    python -m launch.convert --input=DIR --output=DIR2 --to=hf --dtype=bfloat16

Adapters (docs/lora.md) of a run, for PEFT and engines that load them; and merged into a model:
    python -m launch.convert --input=RUN --output=DIR --to=peft
    python -m launch.convert --input=MODEL --adapter=DIR --output=DIR2

A run that has trained adapters becomes a whole Hugging Face checkpoint, its base with the adapters
merged. The tokenizer is copied. Towards Hugging Face it works in a few gigabytes of memory whatever
the model's size, and reads only parameters, not the optimizer's moments. Towards orbax the
parameters are held by the devices that JAX finds: on a CPU, by its memory.
"""

from __future__ import annotations

import os
import pathlib

from absl import flags, logging

from launch._main import reject_arguments, run_command

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
    "to",
    None,
    ["hf", "orbax", "peft"],
    "The form to write. Default: the one that the input does not have.",
)
_DTYPE = flags.DEFINE_enum(
    "dtype", None, ["float32", "bfloat16"], "The type to write. Default: the input's own."
)
_STEP = flags.DEFINE_integer(
    "step", None, "Which training checkpoint to take. Default: the newest.", lower_bound=0
)


_ADAPTER = flags.DEFINE_string(
    "adapter", None, "Adapters in PEFT's layout, to merge into a Hugging Face directory."
)


def main(argv: list[str]) -> int:
    """Convert as the flags say and print the result."""
    from rome.train.convert import convert

    reject_arguments(argv, "--input=DIR")
    logging.set_verbosity(logging.WARNING)  # orbax logs every step
    source = pathlib.Path(_INPUT.value)
    output = pathlib.Path(_OUTPUT.value)
    adapter = None if _ADAPTER.value is None else pathlib.Path(_ADAPTER.value)
    print(
        convert(source, output, _TO.value, _DTYPE.value, _STEP.value, adapter=adapter), flush=True
    )
    return 0


def known_errors() -> tuple[type[BaseException], ...]:
    """Return the failures that say everything in their message."""
    from rome.train.checkpoint import CheckpointError

    return (CheckpointError,)


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # moving bytes needs no accelerator
    run_command(
        "launch.convert",
        main,
        known_errors=known_errors,
        when_stopped=lambda: "launch.convert: interrupted; nothing was written",
    )
