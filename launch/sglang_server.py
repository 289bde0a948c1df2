"""Starts an SGLang server with the flags that RL needs.

Runs in SGLang's own environment (requirements-sglang.txt); imports nothing of this repository.

    python launch/sglang_server.py --model_path /models/Qwen3-30B-A3B --port 30000 --tensor_parallel 4
    python launch/sglang_server.py --model_path ... --dry-run            prints each flag with its reason, and the command
    python launch/sglang_server.py --model_path ... -- --attention-backend fa3       flags after -- go to SGLang as they are

Then give the trainer its URL: --config.engines=http://host:30000. The trainer's weights directory
must be seen by the server under the same path.
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
    """What SGLang is given, and why."""
    flags = [
        (
            ["--model-path", arguments.model_path],
            "config, tokenizer and the first weights; publications replace the weights",
        ),
        (["--host", arguments.host], "address to listen on"),
        (["--port", str(arguments.port)], "its URL's port"),
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
            "versions are numbers here; SGLang's own first one is the word default",
        ),
        (["--skip-tokenizer-init"], "token ids in, token ids out: nothing is ever tokenised twice"),
        (
            ["--tokenizer-worker-num", "1"],
            "with several, a pause and an update may meet different ones",
        ),
        (
            ["--sampling-defaults", "openai"],
            (
                "the model's generation_config.json must not change the distribution that is"
                " trained on"
            ),
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
        flags.append(
            (
                ["--enable-deterministic-inference"],
                (
                    "batch-invariant kernels: a request's tokens depend on its seed, not on its"
                    " neighbours; slower"
                ),
            )
        )
    if arguments.memory_saver:
        flags.append(
            (
                ["--enable-memory-saver"],
                "release_memory_occupation works: the trainer may have this GPU between rollouts",
            )
        )
    return flags


def check_version() -> str | None:
    """One sentence when the installed SGLang will not do."""
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


def main(argv: list[str]) -> int:
    own, _, rest = (
        (argv[: argv.index("--")], "--", argv[argv.index("--") + 1 :])
        if "--" in argv
        else (argv, "", [])
    )
    parser = argparse.ArgumentParser(
        prog="sglang_server",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model_path", required=True)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=30000)
    parser.add_argument("--tensor_parallel", type=int, default=1)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--memory_fraction", type=float, default=0.8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--deterministic", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--memory_saver", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument(
        "--dry-run",
        "--dry_run",
        action="store_true",
        help="print what would be run; SGLang need not be installed",
    )
    arguments = parser.parse_args(own)
    flags = flags_of(arguments)
    command = [
        sys.executable,
        "-m",
        "sglang.launch_server",
        *(word for words, _ in flags for word in words),
        *rest,
    ]
    if arguments.dry_run:
        for words, reason in flags:
            print(f"{shlex.join(words):<44} {reason}")
        print("\n" + shlex.join(command))
        return 0
    if problem := check_version():
        print(f"sglang_server: {problem}", file=sys.stderr)
        return 1
    os.execv(command[0], command)  # signals and the exit status are SGLang's own


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
