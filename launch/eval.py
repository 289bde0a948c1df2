"""Evaluates an agent on a dataset, or proves the dataset itself.

    python -m launch.eval --dataset harbor --agent oracle --out OUT
    python -m launch.eval --dataset terminal:wide:1000 --agent policy --checkpoint runs/X/final --attempts 4 --out OUT
    python -m launch.eval --dataset worlds:shop,gui:200 --agent oracle --out OUT      # also problems, games, bfcl:FILE, tau2:FOLDER
    python -m launch.eval --dataset DIR --agent endpoint --endpoint http://127.0.0.1:8000/v1 --model NAME --out OUT      # key: $OPENAI_API_KEY
    python -m launch.eval --dataset repair::100 --validate --out OUT        # 100 generated bugs in packages; a folder's: repair:DIR:20
    python -m launch.eval --dataset verified.parquet --agent oracle --out OUT       # SWE-bench; also registry.json:NAME@VERSION
    python -m launch.eval --dataset DIR --validate --out OUT                # exit status 1 where a task is not sound
    python -m launch.eval --dataset DIR --decontaminate CORPUS --out OUT    # exit status 1 where a task is found

Leaves OUT/results.json, report.md, report.html (validation.*, contamination.*). Killed, the same
command plays only what is missing.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import hashlib
import json
import os
import pathlib
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any

from absl import app, flags

AGENTS = ("oracle", "noop", "cheat", "policy", "endpoint")
ORACLE_RUNS = 3
SHOW_EVERY_S = 10.0

_DATASET = flags.DEFINE_string(
    "dataset",
    None,
    "A folder of Harbor or Terminal-Bench tasks; a registry (FILE.json[:NAME[@VERSION]]); a"
    " .parquet, .jsonl or .json file of SWE-bench instances or of archived tasks; harbor,"
    " harbor/TASK, terminal[:FAMILIES[:N]], repair[:PACKAGES[:N]], worlds[:NAMES[:N]],"
    " problems[:NAMES[:N]], games[:NAMES[:N]], bfcl:FILE or tau2:FOLDER.",
    required=True,
)
_FETCH = flags.DEFINE_bool(
    "fetch",
    False,
    "Let git fetch the repositories that a registry names; they are kept in .cache/datasets.",
)
_OUT = flags.DEFINE_string("out", None, "Folder of the results.", required=True)
_AGENT = flags.DEFINE_enum("agent", "oracle", AGENTS, "Who plays.")
_ATTEMPTS = flags.DEFINE_integer(
    "attempts",
    None,
    "At each task. Default: 1; one of each cheat; with --validate 3 of the oracle.",
    lower_bound=1,
)
_CONCURRENCY = flags.DEFINE_integer("concurrency", 4, "Attempts at once.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Of sampling, and of generated instances.", lower_bound=0)
_ISOLATION = flags.DEFINE_enum(
    "isolation", "best_available", ("required", "best_available"), "Of the sandboxes."
)
_DOCKER_IMAGE = flags.DEFINE_string(
    "docker_image",
    "",
    "Play in containers of this machine's Docker engine, where Harbor tasks have their real"
    " Dockerfile built; the image is for tasks that name none. Default: embedded sandboxes.",
)
_CHECKPOINT = flags.DEFINE_string(
    "checkpoint",
    "",
    "policy: a Hugging Face directory. With --engines only its tokenizer and config are read.",
)
_ENGINES = flags.DEFINE_string(
    "engines",
    "",
    "policy: URLs of SGLang servers with commas between them. Default: an embedded engine is"
    " started.",
)
_MAX_CONTEXT = flags.DEFINE_integer(
    "max_context",
    None,
    "policy: tokens of an episode. Default: what the model was made for, at most 4096.",
    lower_bound=2,
)
_MAX_TOKENS = flags.DEFINE_integer(
    "max_tokens", None, "Of one turn. Default: policy 512; endpoint: its own limit.", lower_bound=1
)
_TEMPERATURE = flags.DEFINE_float(
    "temperature", None, "Of sampling. Default: policy 1; endpoint: its own.", lower_bound=0.0
)
_EPISODE_SECONDS = flags.DEFINE_float(
    "episode_seconds", 600.0, "Of one attempt of a policy or an endpoint.", lower_bound=1.0
)
_ENDPOINT = flags.DEFINE_string(
    "endpoint", "", "endpoint: URL of an OpenAI-compatible server, up to and with /v1."
)
_MODEL = flags.DEFINE_string("model", "", "endpoint: name of the model.")
_API_KEY_ENV = flags.DEFINE_string(
    "api_key_env", "OPENAI_API_KEY", "endpoint: the environment variable that holds the key."
)
_STANDS_FOR = flags.DEFINE_multi_string(
    "stands_for",
    [],
    "IMAGE=PROGRAM,PROGRAM: a base image that cannot be had; this machine's system stands for it,"
    " if it has these programs.",
)
_BUILD_EGRESS = flags.DEFINE_multi_string(
    "build_egress",
    None,
    "HOST:PORT that the steps of a task's build reach, agent and tests not; none: nothing. Default:"
    " containers all of the network, embedded sandboxes what the task grants.",
)
_VALIDATE = flags.DEFINE_bool("validate", False, "Prove the dataset: oracle 1, no-op 0, cheats 0.")
_DECONTAMINATE = flags.DEFINE_string(
    "decontaminate", "", "A folder of text: report which tasks stand in it."
)


def main(argv: list[str]) -> int:
    if len(argv) > 1:
        raise ValueError(f"argument {argv[1]!r} is not understood; flags look like --dataset=DIR")
    check_flags()
    from rome.evals.tasks import dataset_digest, load_tasks

    faults = [] if _VALIDATE.value else None
    tasks = load_tasks(
        _DATASET.value,
        _SEED.value,
        faults,
        _FETCH.value,
        dict(map(read_alias, _STANDS_FOR.value)),
        read_build_egress(),
    )
    if _DECONTAMINATE.value:
        return decontaminate(tasks)
    identity = {
        "dataset": _DATASET.value,
        "dataset_digest": dataset_digest(tasks),
        "agent": "validate" if _VALIDATE.value else _AGENT.value,
        "seed": _SEED.value,
        "isolation": find_isolation(_ISOLATION.value),
        **({"docker_image": _DOCKER_IMAGE.value} if _DOCKER_IMAGE.value else {}),
        **agent_identity(),
    }
    return validate(tasks, faults, identity) if _VALIDATE.value else evaluate(tasks, identity)


def read_alias(text: str) -> tuple[str, tuple[str, ...]]:
    """IMAGE=PROGRAM,PROGRAM as (image, programs)."""
    image, equals, programs = text.partition("=")
    if not image or not equals:
        raise ValueError(
            f"--stands_for={text!r} is not IMAGE=PROGRAM,PROGRAM, such as"
            " python:3.13-slim=python3,pip"
        )
    return image, tuple(program for program in programs.split(",") if program)


def read_build_egress() -> tuple[str, ...] | None:
    from envs.rock.config import parse_grant

    if _BUILD_EGRESS.value in (None, ["none"]):
        return None if _BUILD_EGRESS.value is None else ()
    for grant in _BUILD_EGRESS.value:
        parse_grant(grant)
    return tuple(_BUILD_EGRESS.value)


def check_flags() -> None:
    """Raises ValueError for a flag that nobody would read."""
    if _VALIDATE.value and _DECONTAMINATE.value:
        raise ValueError("--validate and --decontaminate are two jobs; give one of them")
    readers = {
        ("policy",): (_CHECKPOINT, _ENGINES, _MAX_CONTEXT),
        ("endpoint",): (_ENDPOINT, _MODEL),
        ("policy", "endpoint"): (_MAX_TOKENS, _TEMPERATURE),
    }
    unread = [
        flag.name
        for agents, of_them in readers.items()
        for flag in of_them
        if flag.value not in (None, "") and player() not in agents
    ]
    if unread:
        raise ValueError(
            f"--{unread[0]} is not read by"
            f" {f'--agent {player()}' if player() else '--validate or --decontaminate'}; leave"
            " it out"
        )
    if player() == "policy" and not _CHECKPOINT.value:
        raise ValueError(
            "--agent policy needs --checkpoint, a Hugging Face directory; with --engines its"
            " tokenizer is read"
        )
    if player() == "endpoint" and not (_ENDPOINT.value and _MODEL.value):
        raise ValueError("--agent endpoint needs --endpoint URL and --model NAME")


def player() -> str:
    """The agent whose flags count; "" where none plays for itself."""
    return "" if _VALIDATE.value or _DECONTAMINATE.value else _AGENT.value


def agent_identity() -> dict[str, Any]:
    """What else makes an evaluation this one: figures of another checkpoint or temperature must not
    be mixed with it.
    """
    if player() == "policy":
        folder = pathlib.Path(_CHECKPOINT.value)
        return {
            "checkpoint": str(folder.resolve()),
            "checkpoint_files": files_digest(folder),
            "engines": _ENGINES.value,
            **limits_identity(),
            "max_context": _MAX_CONTEXT.value,
        }
    if player() == "endpoint":
        return {"endpoint": _ENDPOINT.value, "model": _MODEL.value, **limits_identity()}
    return {}


def limits_identity() -> dict[str, Any]:
    return {
        "temperature": _TEMPERATURE.value,
        "max_tokens": _MAX_TOKENS.value,
        "episode_seconds": _EPISODE_SECONDS.value,
    }


def files_digest(folder: pathlib.Path) -> str:
    """Of names, sizes and times of the files: weights are too large to be read for this."""
    if not folder.is_dir():
        raise ValueError(
            f"--checkpoint {str(folder)!r} is no folder; give a Hugging Face directory, such as"
            " runs/X/final"
        )
    entries = sorted(
        (path.name, path.stat().st_size, path.stat().st_mtime_ns)
        for path in folder.iterdir()
        if path.is_file()
    )
    return hashlib.blake2b(json.dumps(entries).encode(), digest_size=16).hexdigest()


def find_isolation(wanted: str) -> str:
    """The tier of sandboxes that this machine gives; says what it lacks.

    Raises where `wanted` is not to be had.
    """
    from envs.rock import probe
    from envs.rock.docker.probe import probe_docker

    tier = probe_docker() if _DOCKER_IMAGE.value else probe(wanted)
    tier.require(wanted)
    if tier.missing:
        print(tier.banner(), flush=True)
    return tier.tier


def sandbox_config() -> Any:
    """Of every sandbox that is played in."""
    from envs.rock import SandboxConfig

    return SandboxConfig(
        isolation=_ISOLATION.value,
        **({"backend": "docker", "image": _DOCKER_IMAGE.value} if _DOCKER_IMAGE.value else {}),
    )


# -- the three jobs
# -------------------------------------------------------------------------------------------------


def evaluate(tasks: list, identity: dict[str, Any]) -> int:
    """Plays and reports. 0, whatever the figures; 1 where no attempt counts."""
    from rome.evals.cheats import CHEATS
    from rome.evals.report import bounds, build_results, share, write_results
    from rome.evals.runner import Job, open_results

    out, k = (
        pathlib.Path(_OUT.value),
        _ATTEMPTS.value or (len(CHEATS) if _AGENT.value == "cheat" else 1),
    )
    with open_results(out, identity) as results, make_agent(out) as agent:
        jobs = [Job(agent, task, attempt) for task in tasks for attempt in range(k)]
        try:
            asyncio.run(play_all(jobs, results))
        finally:
            records = [results.records[job.key] for job in jobs if job.key in results.records]
            report = build_results({**identity, "complete": len(records) == len(jobs)}, records, k)
            write_results(out, report)
    shown = [
        f"{label} "
        + (
            f"{share(report[name])} ({bounds(report['intervals'][name])})"
            if report[name] is not None
            else "none"
        )
        for name, label in (("pass_at_1", "pass@1"), ("pass_at_k", f"pass@{k}"))[
            : 1 if k == 1 else 2
        ]
    ]
    print(
        f"{identity['agent']} on {identity['dataset']}: {', '.join(shown)};"
        f" {report['attempts_counted']} of {report['attempts']} attempts count; endings:"
        f" {', '.join(f'{name} {count}' for name, count in report['by_ending'].items())}\nreport:"
        f" {out / 'report.md'}",
        flush=True,
    )
    return 0 if report["attempts_counted"] else 1


def validate(tasks: list, faults: list, identity: dict[str, Any]) -> int:
    from rome.evals.runner import open_results
    from rome.evals.validate import build_proof, proof_jobs, write_proof

    out = pathlib.Path(_OUT.value)
    jobs = proof_jobs(tasks, sandbox_config(), _ATTEMPTS.value or ORACLE_RUNS)
    with open_results(out, identity) as results:
        asyncio.run(play_all(jobs, results))
        proof = build_proof(identity, tasks, [results.records[job.key] for job in jobs], faults)
        write_proof(out, proof)
    for verdict in proof["tasks"]:
        for reason in verdict["reasons"]:
            print(f"{verdict['task']}: {reason}", flush=True)
    print(
        f"{proof['sound']} of {proof['total']} tasks are sound, {proof['flaky']} flaky,"
        f" {proof['runs']} runs\nreport: {out / 'validation.md'}",
        flush=True,
    )
    return 0 if proof["valid"] else 1


def decontaminate(tasks: list) -> int:
    from rome.evals.contamination import find_contamination, write_contamination

    out = pathlib.Path(_OUT.value)
    found = find_contamination(tasks, pathlib.Path(_DECONTAMINATE.value))
    write_contamination(out, _DATASET.value, found)
    for hit in found["hits"]:
        canaries = f", canary {', '.join(hit['canaries'])}" if hit["canaries"] else ""
        print(
            f"{hit['task']}: {100 * hit['share']:.0f} % of its word runs{canaries};"
            f" {hit['places'][0]['file']}:{hit['places'][0]['line']}",
            flush=True,
        )
    print(
        f"{len(hits) if (hits := found['hits']) else 'none'} of {len(tasks)} tasks found in"
        f" {found['files']} files of {found['words']:,} words; {len(found['unchecked'])} are too"
        f" short to check\nreport: {out / 'contamination.md'}",
        flush=True,
    )
    return 1 if found["hits"] else 0


async def play_all(jobs: list, results: Any) -> None:
    """Plays what is missing and says from time to time how far it is.

    SIGTERM ends it as Ctrl-C does: sandboxes are closed, records are kept.
    """
    from rome.evals.runner import run_jobs

    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, asyncio.current_task().cancel)
    began, done, endings = time.monotonic(), 0, collections.Counter()
    missing, shown = None, began

    def on_finish(record: dict[str, Any]) -> None:
        nonlocal done, shown
        done += 1
        endings[record["ending"]] += 1
        if time.monotonic() - shown > SHOW_EVERY_S:
            shown = time.monotonic()
            counts = ", ".join(f"{name} {count}" for name, count in sorted(endings.items()))
            print(
                f"{done} attempts in {shown - began:.0f} s: {counts}", file=sys.stderr, flush=True
            )

    agents = {id(job.agent): job.agent for job in jobs}
    try:
        missing = await run_jobs(
            jobs, results, concurrency=_CONCURRENCY.value, seed=_SEED.value, on_finish=on_finish
        )
    finally:
        for agent in agents.values():
            await agent.close()
    print(
        f"{missing} attempts played in {time.monotonic() - began:.1f} s, {len(jobs) - missing} were"
        " there already",
        flush=True,
    )


# -- agents
# -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def make_agent(out: pathlib.Path) -> Iterator[Any]:
    """The agent of the flags; an embedded engine that it needs lives as long as this context."""
    from rome.evals.agents import Scripted

    config = sandbox_config()
    if _AGENT.value == "endpoint":
        from rome.evals.endpoint import Endpoint

        yield Endpoint(
            _ENDPOINT.value,
            _MODEL.value,
            config,
            api_key=os.environ.get(_API_KEY_ENV.value) or None,
            temperature=_TEMPERATURE.value,
            max_tokens=_MAX_TOKENS.value,
            episode_seconds=_EPISODE_SECONDS.value,
        )
    elif _AGENT.value == "policy":
        with make_policy(out, config) as policy:
            yield policy
    else:
        yield Scripted(_AGENT.value, config)


@contextlib.contextmanager
def make_policy(out: pathlib.Path, config: Any) -> Iterator[Any]:
    from rome.agent.loop import Limits
    from rome.engine.client import Engine
    from rome.engine.pool import EnginePool
    from rome.engine.process import start_server
    from rome.evals.agents import Policy
    from rome.model.hf.checkpoint import read_config
    from rome.model.tokenizer import TINY, Chat, Tokenizer

    model, tokenizer = read_config(_CHECKPOINT.value), Tokenizer.load(_CHECKPOINT.value)
    context = _MAX_CONTEXT.value or min(model.max_position, 4096)
    # the models of the tiny tokenizer learn the form of a call from their data: they never saw a
    # tool's description
    tell_tools = tokenizer.vocab_size != Tokenizer.load(TINY).vocab_size
    temperature = 1.0 if _TEMPERATURE.value is None else _TEMPERATURE.value
    limits = Limits(context, _MAX_TOKENS.value or min(512, context), _EPISODE_SECONDS.value)
    urls = [url.strip() for url in _ENGINES.value.split(",") if url.strip()]
    with contextlib.ExitStack() as stack:
        if not urls:
            print("starting the embedded engine", flush=True)
            urls = [
                stack.enter_context(
                    start_server(
                        _CHECKPOINT.value,
                        out / "engine.log",
                        flags=[
                            "--skip_tokenizer_init",
                            f"--slots={_CONCURRENCY.value}",
                            f"--max_context={context}",
                            f"--dtype={model.dtype}",
                        ],
                    )
                ).url
            ]
        yield Policy(
            EnginePool([Engine(url, model=model) for url in urls]),
            Chat(tokenizer),
            limits,
            config,
            temperature,
            tell_tools,
        )


# -- starting
# -------------------------------------------------------------------------------------------------


def parse(argv: list[str]) -> list[str]:
    """absl's parser, with one clear line for what it does not understand."""
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        sys.exit(f"launch.eval: {' '.join(str(error).split())}")


def run_main(argv: list[str]) -> int:
    """`main`; a known kind of failure becomes one line, and so does a stop.

    ROME_DEBUG=1 keeps the traceback.
    """
    from envs.rock import SandboxError
    from rome.engine.client import EngineError

    try:
        return main(argv)
    except (ValueError, OSError, SandboxError, EngineError) as error:
        if os.environ.get("ROME_DEBUG"):
            raise
        print(f"launch.eval: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, asyncio.CancelledError):
        print(
            f"stopped; what has ended is kept in {_OUT.value}, and the same command plays the rest",
            file=sys.stderr,
        )
        return 130


if __name__ == "__main__":
    os.environ.setdefault(
        "JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(".cache/jax").absolute())
    )  # of the embedded engine
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
    app.run(run_main, flags_parser=parse)
