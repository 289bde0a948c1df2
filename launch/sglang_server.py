"""Starts an SGLang server with the flags that RL needs.

It runs in the environment of requirements-sglang.txt and imports nothing of this repository.

    python launch/sglang_server.py --model_path /models/Qwen3-30B-A3B --tensor_parallel 4
    python launch/sglang_server.py --model_path ... --dry-run
        prints each flag with its reason, and the command
    python launch/sglang_server.py --model_path ... -- --attention-backend fa3
        passes the flags after -- to SGLang unchanged

Then give the trainer its URL: --config.engine.urls=http://host:30000. The server must see the
trainer's weights directory under the same path.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import re
import shlex
import sys

MIN_SGLANG = (0, 5, 9)  # rome.engine.dialect refuses older ones too


def flags_of(arguments: argparse.Namespace) -> list[tuple[list[str], str]]:
    """Return SGLang's flags, each with the reason for it."""
    flags = [
        (
            ["--model-path", arguments.model_path],
            "config, tokenizer and the first weights; publications replace the weights",
        ),
        (["--host", arguments.host], "address to listen on"),
        (["--port", str(arguments.port)], "port of its URL"),
        (
            ["--tp-size", str(arguments.tensor_parallel)],
            "GPUs that one copy of the model is split over",
        ),
        (
            ["--dtype", arguments.dtype],
            "of weights and computation; the trainer's probe tolerance depends on it",
        ),
        (
            ["--weight-version", "0"],
            "the trainer's versions are numbers; SGLang's first one would be the word default",
        ),
        (["--skip-tokenizer-init"], "token ids in, token ids out: nothing is tokenised twice"),
        (
            ["--tokenizer-worker-num", "1"],
            "with several, a pause and an update may meet different ones",
        ),
        (
            ["--sampling-defaults", "openai"],
            "the model's generation_config.json must not change the sampled distribution",
        ),
        (
            ["--enable-return-routed-experts"],
            "each token's experts come back, for routing replay in the trainer",
        ),
        (
            ["--mem-fraction-static", str(arguments.memory_fraction)],
            "of GPU memory for weights and cache; the rest is for activations and weight updates",
        ),
        (
            ["--random-seed", str(arguments.seed)],
            "of requests without a seed of their own; the trainer's all have one",
        ),
        (["--enable-metrics"], "/metrics for Prometheus: queue lengths, cache hits, throughput"),
    ]
    if arguments.deterministic:
        reason = (
            "batch-invariant kernels: a request's tokens depend on its seed, not on its neighbours;"
            " slower"
        )
        flags.append((["--enable-deterministic-inference"], reason))
    if arguments.memory_saver:
        reason = "release_memory_occupation works: the trainer may use this GPU between rollouts"
        flags.append((["--enable-memory-saver"], reason))
    return flags


def describe_version_problem() -> str | None:
    """Return what is wrong with the installed SGLang, in one sentence; None if it is usable."""
    try:
        version = importlib.metadata.version("sglang")
    except importlib.metadata.PackageNotFoundError:
        return (
            "sglang is not installed in this environment: pip install -r requirements-sglang.txt,"
            " in an environment of its own"
        )
    number = tuple(map(int, re.findall(r"\d+", version)[:3]))
    if number < MIN_SGLANG:
        return (
            f"sglang {version} is too old: updates, pauses and routed experts as the trainer uses"
            f" them need {'.'.join(map(str, MIN_SGLANG))}; pip install -r requirements-sglang.txt"
        )
    return None


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """Return the parsed command line, without the flags for SGLang."""
    parser = argparse.ArgumentParser(
        prog="sglang_server",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model_path", required=True)
    add("--host", default="127.0.0.1")
    add("--port", type=int, default=30000)
    add("--tensor_parallel", type=int, default=1)
    add("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    add("--memory_fraction", type=float, default=0.8)
    add("--seed", type=int, default=0)
    add("--deterministic", action=argparse.BooleanOptionalAction, default=True)
    add("--memory_saver", action=argparse.BooleanOptionalAction, default=True)
    add(
        "--dry-run",
        "--dry_run",
        action="store_true",
        help="print what would be run; SGLang need not be installed",
    )
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    split = argv.index("--") if "--" in argv else len(argv)
    arguments = parse_arguments(argv[:split])
    flags_for_sglang = argv[split + 1 :]
    flags = flags_of(arguments)
    command = [sys.executable, "-m", "sglang.launch_server"]
    for words, _ in flags:
        command += words
    command += flags_for_sglang
    if arguments.dry_run:
        for words, reason in flags:
            print(f"{shlex.join(words):<44} {reason}")
        print("\n" + shlex.join(command))
        return 0
    problem = describe_version_problem()
    if problem:
        print(f"sglang_server: {problem}", file=sys.stderr)
        return 1
    os.execv(command[0], command)  # signals and the exit status are SGLang's own


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
