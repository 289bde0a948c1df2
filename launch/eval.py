r"""Evaluates an agent on a dataset, or proves the dataset itself.

python -m launch.eval --dataset harbor --agent oracle --out OUT
python -m launch.eval --dataset terminal:wide:1000 --agent policy --checkpoint runs/X/final \
    --attempts 4 --out OUT
python -m launch.eval --dataset worlds:shop,gui:200 --agent oracle --out OUT
    # also problems, games, bfcl:FILE
python -m launch.eval --dataset DIR --agent endpoint --endpoint http://127.0.0.1:8000/v1 \
    --model NAME --out OUT                              # key: $OPENAI_API_KEY
python -m launch.eval --dataset repair::100 --validate --out OUT
    # 100 generated bugs in packages; those of a folder: repair:DIR:20
python -m launch.eval --dataset verified.parquet --agent oracle --out OUT
    # SWE-bench; also registry.json:NAME@VERSION
python -m launch.eval --dataset DIR --verifier_tools TOOLS --agent oracle --out OUT
    # what the tests install is taken from TOOLS, see docs/evaluation.md
python -m launch.eval --dataset DIR --validate --out OUT
    # exit status 1 if a task is not sound
python -m launch.eval --dataset DIR --decontaminate CORPUS --out OUT
    # exit status 1 if a task is found

Writes OUT/results.json, report.md, report.html (validation.*, contamination.*). After a kill, the
same command plays only what is missing.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import pathlib
import signal
from collections.abc import Coroutine, Iterator
from typing import TYPE_CHECKING, Any

from absl import flags

from launch._main import reject_arguments, run_command, use_compilation_cache

if TYPE_CHECKING:  # heavy modules are imported once the flags are checked
    from envs.rock import SandboxConfig
    from envs.sources import Settings, Task
    from envs.tasks.harbor import TaskError
    from rome.evals.agents import Agent

AGENTS = ("oracle", "noop", "cheat", "policy", "endpoint")

_DATASET = flags.DEFINE_string(
    "dataset",
    None,
    "A folder of Harbor or Terminal-Bench tasks; a registry (FILE.json[:NAME[@VERSION]]); a"
    " .parquet, .jsonl or .json file of SWE-bench instances or of archived tasks; harbor,"
    " harbor/TASK, terminal[:FAMILIES[:N]], repair[:PACKAGES[:N]], worlds[:NAMES[:N]],"
    " problems[:NAMES[:N]], games[:NAMES[:N]] or bfcl:FILE.",
    required=True,
)
_FETCH = flags.DEFINE_bool(
    "fetch",
    False,
    "Let git fetch the repositories that a registry names; they are kept in .cache/datasets.",
)
_OUT = flags.DEFINE_string("out", None, "Folder of the results.", required=True)
_AGENT = flags.DEFINE_enum("agent", "oracle", AGENTS, "The agent that plays.")
_ATTEMPTS = flags.DEFINE_integer(
    "attempts",
    None,
    "Attempts at each task. Default: 1; one of each cheat; with --validate 3 of the oracle.",
    lower_bound=1,
)
_CONCURRENCY = flags.DEFINE_integer("concurrency", 4, "Attempts at once.", lower_bound=1)
_SEED = flags.DEFINE_integer(
    "seed", 0, "Seed of sampling, and of generated instances.", lower_bound=0
)
_ISOLATION = flags.DEFINE_enum(
    "isolation", "best_available", ("required", "best_available"), "Isolation of the sandboxes."
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
    "max_tokens",
    None,
    "Tokens of one turn. Default: policy 512; endpoint: its own limit.",
    lower_bound=1,
)
_TEMPERATURE = flags.DEFINE_float(
    "temperature",
    None,
    "Temperature of sampling. Default: policy 1; endpoint: its own.",
    lower_bound=0.0,
)
_EPISODE_SECONDS = flags.DEFINE_float(
    "episode_seconds", 600.0, "Limit for one attempt of a policy or an endpoint.", lower_bound=1.0
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
    "HOST:PORT that the steps of a task's build may reach, but not its agent and tests; none:"
    " nothing. Default: for containers the whole network, for embedded sandboxes what the task"
    " grants.",
)
_TASK_ENV = flags.DEFINE_multi_string(
    "task_env",
    [],
    "NAME=VALUE, or NAME for the value of this process's own variable: what ${NAME} in the env"
    " tables of Harbor tasks stands for. No other variable is passed on, and none is recorded.",
)
_VERIFIER_TOOLS = flags.DEFINE_string(
    "verifier_tools",
    "~/.rock/tools",
    "Folder of Python packages that the tests of task folders find and agents never see, made by"
    " `pip install --target FOLDER pytest ...`. Read where it exists.",
)
_VERIFIER_EGRESS = flags.DEFINE_multi_string(
    "verifier_egress",
    [],
    "HOST:PORT that the tests of task folders may reach, but not their agent: what they install is"
    " installed then, and --verifier_tools need not have it.",
)
_MAX_TURNS = flags.DEFINE_integer(
    "max_turns",
    None,
    "Turns of an agent, in each step of a task folder. Default: the environment's own; 40 in task"
    " folders.",
    lower_bound=1,
)
_COMMAND_SECONDS = flags.DEFINE_float(
    "command_seconds",
    None,
    "Limit for one command in a sandbox. Default: the environment's own; 60 in task folders.",
    lower_bound=0.1,
)
_TIMEOUT_MULTIPLIER = flags.DEFINE_float(
    "timeout_multiplier", 1.0, "Of every time limit that a task folder sets.", lower_bound=0.01
)
_MEMORY_MB = flags.DEFINE_integer(
    "memory_mb", None, "Memory of a sandbox. Default: what the task asks for.", lower_bound=16
)
_DISK_MB = flags.DEFINE_integer(
    "disk_mb",
    None,
    "Disk of a sandbox, which is part of its memory. Default: what the task asks for, at most half"
    " of its memory.",
    lower_bound=1,
)
_VALIDATE = flags.DEFINE_bool("validate", False, "Prove the dataset: oracle 1, no-op 0, cheats 0.")
_DECONTAMINATE = flags.DEFINE_string(
    "decontaminate", "", "A folder of text: report which tasks stand in it."
)


def main(argv: list[str]) -> int:
    reject_arguments(argv, "--dataset=DIR")
    check_flags()
    from envs.sources import load_tasks

    faults: list[TaskError] = []
    tasks = load_tasks(
        _DATASET.value,
        _SEED.value,
        faults,
        play_settings(),
    )
    if faults and not tasks and not _VALIDATE.value:
        more = f" (and {len(faults) - 1} tasks more)" if len(faults) > 1 else ""
        raise ValueError(f"no task of {_DATASET.value} can be used: {faults[0]}{more}")
    if _DECONTAMINATE.value:
        return run_decontamination(tasks, faults)
    if _VALIDATE.value:
        return run_validation(tasks, faults)
    return run_evaluation(tasks, faults)


# -- the three jobs
# -------------------------------------------------------------------------------------------------


def run_evaluation(tasks: list[Task], faults: list[TaskError]) -> int:
    """Play and report; return 1 if no attempt counts, else 0, whatever the metrics."""
    from rome.evals.cheats import CHEATS
    from rome.evals.run import (
        Progress,
        describe_left_out,
        describe_results,
        evaluate,
        make_identity,
    )
    from rome.evals.runner import open_results

    out = pathlib.Path(_OUT.value)
    attempts = _ATTEMPTS.value or (len(CHEATS) if _AGENT.value == "cheat" else 1)
    settings = {**sandbox_settings(), **agent_settings()}
    progress = Progress()
    identity = make_identity(_DATASET.value, tasks, _AGENT.value, _SEED.value, settings)
    with open_results(out, identity):
        pass  # refuses a folder of another evaluation before an engine is started
    with open_agent(out) as agent:
        job = evaluate(
            _DATASET.value,
            agent,
            out,
            attempts=attempts,
            concurrency=_CONCURRENCY.value,
            seed=_SEED.value,
            tasks=tasks,
            faults=faults,
            settings=settings,
            on_finish=progress,
        )
        results = asyncio.run(until_sigterm(job))
    print(
        "\n".join([*describe_left_out(results["left_out"]), progress.summary(results["attempts"])])
    )
    print(f"{describe_results(results)}\nreport: {out / 'report.md'}", flush=True)
    return 0 if results["attempts_counted"] else 1


def run_validation(tasks: list[Task], faults: list[TaskError]) -> int:
    """Prove the dataset and report; return 1 if a task is not sound."""
    from rome.evals.run import ORACLE_RUNS, Progress, describe_validation, validate

    out = pathlib.Path(_OUT.value)
    progress = Progress()
    job = validate(
        _DATASET.value,
        sandbox_config(),
        out,
        oracle_runs=_ATTEMPTS.value or ORACLE_RUNS,
        concurrency=_CONCURRENCY.value,
        seed=_SEED.value,
        tasks=tasks,
        faults=faults,
        settings=sandbox_settings(),
        on_finish=progress,
    )
    proof = asyncio.run(until_sigterm(job))
    print(progress.summary(proof["runs"]))
    print("\n".join(describe_validation(proof)))
    print(f"report: {out / 'validation.md'}", flush=True)
    return 0 if proof["valid"] else 1


def run_decontamination(tasks: list[Task], faults: list[TaskError]) -> int:
    """Search the corpus and report; return 1 if a task is found, or cannot be searched for."""
    from rome.evals.run import decontaminate, describe_contamination

    out = pathlib.Path(_OUT.value)
    found = decontaminate(_DATASET.value, tasks, _DECONTAMINATE.value, out)
    print("\n".join(describe_contamination(found, len(tasks))))
    for fault in faults:
        print(f"not searched for: {fault}")
    print(f"report: {out / 'contamination.md'}", flush=True)
    return 1 if found["hits"] or faults else 0


async def until_sigterm(job: Coroutine[Any, Any, dict[str, Any]]) -> dict[str, Any]:
    """Run a job; SIGTERM cancels it as Ctrl-C does: sandboxes are closed, records are kept."""
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    return await job


# -- what the flags say
# -------------------------------------------------------------------------------------------------


def check_flags() -> None:
    """Raise ValueError for flags that exclude each other, are missing, or would not be read."""
    if _VALIDATE.value and _DECONTAMINATE.value:
        raise ValueError("--validate and --decontaminate are two jobs; give one of them")
    player = playing_agent()
    readers = {
        ("policy",): (_CHECKPOINT, _ENGINES, _MAX_CONTEXT),
        ("endpoint",): (_ENDPOINT, _MODEL),
        ("policy", "endpoint"): (_MAX_TOKENS, _TEMPERATURE),
    }
    for agents, read_flags in readers.items():
        for flag in read_flags:
            if flag.value not in (None, "") and player not in agents:
                reader = f"--agent {player}" if player else "--validate or --decontaminate"
                raise ValueError(f"--{flag.name} is not read by {reader}; leave it out")
    if player == "policy" and not _CHECKPOINT.value:
        raise ValueError(
            "--agent policy needs --checkpoint, a Hugging Face directory; with --engines its"
            " tokenizer is read"
        )
    if player == "endpoint" and not (_ENDPOINT.value and _MODEL.value):
        raise ValueError("--agent endpoint needs --endpoint URL and --model NAME")


def playing_agent() -> str:
    """Return the agent whose flags count; "" for a job that chooses its agents."""
    return "" if _VALIDATE.value or _DECONTAMINATE.value else _AGENT.value


def read_alias(text: str) -> tuple[str, tuple[str, ...]]:
    """Return IMAGE=PROGRAM,PROGRAM as (image, programs)."""
    image, equals, programs = text.partition("=")
    if not image or not equals:
        raise ValueError(
            f"--stands_for={text!r} is not IMAGE=PROGRAM,PROGRAM, such as"
            " python:3.13-slim=python3,pip"
        )
    return image, tuple(program for program in programs.split(",") if program)


def read_build_egress() -> tuple[str, ...] | None:
    """Return the hosts of --build_egress; None for the default."""
    from envs.rock.config import parse_grant

    if _BUILD_EGRESS.value is None:
        return None
    if _BUILD_EGRESS.value == ["none"]:
        return ()
    for grant in _BUILD_EGRESS.value:
        parse_grant(grant)
    return tuple(_BUILD_EGRESS.value)


def read_task_env() -> dict[str, str]:
    """Return the variables of --task_env."""
    variables = {}
    for given in _TASK_ENV.value:
        name, equals, value = given.partition("=")
        if not equals and name not in os.environ:
            raise ValueError(
                f"--task_env {name}: there is no such variable here; set it, or give its value as"
                f" --task_env {name}=VALUE"
            )
        variables[name] = value if equals else os.environ[name]
    return variables


def play_settings() -> Settings:
    """Return how the tasks are played."""
    from envs.rock.config import parse_grant
    from envs.sources import Settings

    for grant in _VERIFIER_EGRESS.value:
        parse_grant(grant)
    return Settings(
        images=dict(map(read_alias, _STANDS_FOR.value)),
        build_egress=read_build_egress(),
        verifier_egress=tuple(_VERIFIER_EGRESS.value),
        environ=read_task_env(),
        fetch=_FETCH.value,
        max_turns=_MAX_TURNS.value or 0,
        command_timeout=_COMMAND_SECONDS.value or 0.0,
        timeout_multiplier=_TIMEOUT_MULTIPLIER.value,
    )


def agent_settings() -> dict[str, Any]:
    """Return the flags that make the results of an agent with a model its own."""
    limits = {
        "temperature": _TEMPERATURE.value,
        "max_tokens": _MAX_TOKENS.value,
        "episode_seconds": _EPISODE_SECONDS.value,
    }
    if playing_agent() == "policy":
        from rome.evals.policy import checkpoint_digest

        folder = pathlib.Path(_CHECKPOINT.value)
        return {
            "checkpoint": str(folder.resolve()),
            "checkpoint_files": checkpoint_digest(folder),
            "engines": _ENGINES.value,
            **limits,
            "max_context": _MAX_CONTEXT.value,
        }
    if playing_agent() == "endpoint":
        return {"endpoint": _ENDPOINT.value, "model": _MODEL.value, **limits}
    return {}


def sandbox_settings() -> dict[str, Any]:
    """Return the tier of the sandboxes, and the image of containers."""
    from rome.stages.isolation import find_isolation

    settings = {"isolation": find_isolation(sandbox_config())}
    # What is not given is not written, so that folders of earlier versions are gone on with.
    given = (
        _STANDS_FOR,
        _BUILD_EGRESS,
        _VERIFIER_EGRESS,
        _MEMORY_MB,
        _DISK_MB,
        _DOCKER_IMAGE,
        _MAX_TURNS,
        _COMMAND_SECONDS,
    )
    for flag in given:
        if flag.value:
            settings[flag.name] = flag.value
    if _TIMEOUT_MULTIPLIER.value != _TIMEOUT_MULTIPLIER.default:
        settings[_TIMEOUT_MULTIPLIER.name] = _TIMEOUT_MULTIPLIER.value
    return settings


def sandbox_config() -> SandboxConfig:
    """Return the config of every sandbox."""
    from envs.rock import SandboxConfig

    fields: dict[str, Any] = {"isolation": _ISOLATION.value}
    if _DOCKER_IMAGE.value:
        fields |= {"backend": "docker", "image": _DOCKER_IMAGE.value}
    if _MEMORY_MB.value:
        fields["memory_mb"] = _MEMORY_MB.value
    if _DISK_MB.value:
        fields["disk_mb"] = _DISK_MB.value
    tools = pathlib.Path(_VERIFIER_TOOLS.value).expanduser()
    if _VERIFIER_TOOLS.value and tools.is_dir():
        fields["verifier_tools"] = str(tools)
    elif _VERIFIER_TOOLS.present:
        raise ValueError(
            f"--verifier_tools={_VERIFIER_TOOLS.value} is no folder; make it by"
            f" `pip install --target {_VERIFIER_TOOLS.value} pytest`"
        )
    return SandboxConfig(**fields)


@contextlib.contextmanager
def open_agent(out: pathlib.Path) -> Iterator[Agent]:
    """Yield the agent of the flags; an embedded engine that it needs runs as long."""
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
        from rome.evals.policy import open_policy

        urls = [url.strip() for url in _ENGINES.value.split(",") if url.strip()]
        if not urls:
            print("starting the embedded engine", flush=True)
        with open_policy(
            _CHECKPOINT.value,
            config,
            log_path=out / "engine.log",
            engines=urls,
            max_context=_MAX_CONTEXT.value,
            max_tokens=_MAX_TOKENS.value,
            temperature=_TEMPERATURE.value,
            episode_seconds=_EPISODE_SECONDS.value,
            slots=_CONCURRENCY.value,
        ) as policy:
            yield policy
    else:
        from rome.evals.agents import Scripted

        yield Scripted(_AGENT.value, config)


# -- starting
# -------------------------------------------------------------------------------------------------


def known_errors() -> list[type[BaseException]]:
    """Return the errors that are shown as one line."""
    from envs.rock import SandboxError
    from rome.engine.errors import EngineError

    return [SandboxError, EngineError]


def stop_message() -> str:
    """Return what is printed after Ctrl-C or SIGTERM."""
    return f"stopped; what has ended is kept in {_OUT.value}, and the same command plays the rest"


if __name__ == "__main__":
    use_compilation_cache()  # of the embedded engine
    run_command(
        "launch.eval",
        main,
        known_errors=known_errors,
        failure_status=2,
        when_stopped=stop_message,
    )
