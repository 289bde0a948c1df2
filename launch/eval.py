r"""Evaluates an agent on a dataset, or proves the dataset itself.

python -m launch.eval --dataset harbor --agent oracle --out OUT
python -m launch.eval --dataset terminal:wide:1000 --agent policy --checkpoint runs/X/final \
    --attempts 4 --out OUT
python -m launch.eval --dataset worlds:shop,gui:200 --agent oracle --out OUT
    # also problems, games, bfcl:FILE
python -m launch.eval --dataset DIR --agent endpoint --endpoint http://127.0.0.1:8000/v1 \
    --model NAME --out OUT                              # key: $OPENAI_API_KEY
python -m launch.eval --dataset terminal:wide:200 --agent iflow --checkpoint runs/X/final \
    --iflow_tools task --iflow_compaction 0.8 --out OUT
python -m launch.eval --dataset harbor --agent 'command:python3 $AGENT_FILES/outside_agent.py' \
    --agent_files examples/agents --checkpoint runs/X/final --out OUT
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

from launch import _eval_flags as given
from launch._main import reject_arguments, run_command, use_compilation_cache

if TYPE_CHECKING:  # heavy modules are imported once the flags are checked
    from envs.sources import Task
    from envs.tasks.harbor import TaskError
    from rome.agent.command import CommandAgent
    from rome.evals.agents import Agent

flags.adopt_module_key_flags(given)  # --help shows them


def main(argv: list[str]) -> int:
    reject_arguments(argv, "--dataset=DIR")
    given.check_flags()
    from envs.sources import load_tasks

    faults: list[TaskError] = []
    tasks = load_tasks(
        given.DATASET.value,
        given.SEED.value,
        faults,
        given.play_settings(),
    )
    if faults and not tasks and not given.VALIDATE.value:
        more = f" (and {len(faults) - 1} tasks more)" if len(faults) > 1 else ""
        raise ValueError(f"no task of {given.DATASET.value} can be used: {faults[0]}{more}")
    if given.DECONTAMINATE.value:
        return run_decontamination(tasks, faults)
    if given.VALIDATE.value:
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

    out = pathlib.Path(given.OUT.value)
    attempts = given.ATTEMPTS.value or (len(CHEATS) if given.AGENT.value == "cheat" else 1)
    settings = {**given.sandbox_settings(), **given.agent_settings()}
    given.check_command(settings["isolation"], tasks)
    progress = Progress()
    name, seed = given.playing_agent(), given.SEED.value
    identity = make_identity(given.DATASET.value, tasks, name, seed, settings)
    with open_results(out, identity):
        pass  # refuses a folder of another evaluation before an engine is started
    with open_agent(out) as agent:
        job = evaluate(
            given.DATASET.value,
            agent,
            out,
            attempts=attempts,
            concurrency=given.CONCURRENCY.value,
            seed=seed,
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

    out = pathlib.Path(given.OUT.value)
    progress = Progress()
    job = validate(
        given.DATASET.value,
        given.sandbox_config(),
        out,
        oracle_runs=given.ATTEMPTS.value or ORACLE_RUNS,
        concurrency=given.CONCURRENCY.value,
        seed=given.SEED.value,
        tasks=tasks,
        faults=faults,
        settings=given.sandbox_settings(),
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

    out = pathlib.Path(given.OUT.value)
    found = decontaminate(given.DATASET.value, tasks, given.DECONTAMINATE.value, out)
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


@contextlib.contextmanager
def open_agent(out: pathlib.Path) -> Iterator[Agent]:
    """Yield the agent of the flags; an embedded engine that it needs runs as long."""
    config = given.sandbox_config()
    if given.AGENT.value == "endpoint":
        from rome.evals.endpoint import Endpoint

        yield Endpoint(
            given.ENDPOINT.value,
            given.MODEL.value,
            config,
            api_key=os.environ.get(given.API_KEY_ENV.value) or None,
            temperature=given.TEMPERATURE.value,
            max_tokens=given.MAX_TOKENS.value,
            episode_seconds=given.EPISODE_SECONDS.value,
        )
    elif (command := given.command_agent()) is not None and given.ENDPOINT.value:
        yield make_forwarded(command)
    elif given.playing_agent() in given.PLAYERS:
        from rome.evals.policy import open_policy

        urls = [url.strip() for url in given.ENGINES.value.split(",") if url.strip()]
        if not urls:
            print("starting the embedded engine", flush=True)
        with open_policy(
            given.CHECKPOINT.value,
            config,
            log_path=out / "engine.log",
            engines=urls,
            max_context=given.MAX_CONTEXT.value,
            max_tokens=given.MAX_TOKENS.value,
            temperature=given.TEMPERATURE.value,
            episode_seconds=given.EPISODE_SECONDS.value,
            slots=given.CONCURRENCY.value,
            command=command,
            iflow=given.iflow_agent(),
        ) as policy:
            yield policy
    else:
        from rome.evals.agents import Scripted

        yield Scripted(given.AGENT.value, config)


def make_forwarded(command: CommandAgent) -> Agent:
    """Return a command whose calls the endpoint of the flags answers."""
    from rome.agent.endpoint import ChatEndpoint
    from rome.agent.loop import Limits
    from rome.evals.command import ForwardedCommand
    from rome.model.tokenizer import Chat, Tokenizer

    api_key = os.environ.get(given.API_KEY_ENV.value) or None
    return ForwardedCommand(
        ChatEndpoint(given.ENDPOINT.value, given.MODEL.value, api_key),
        Chat(Tokenizer.load(given.CHECKPOINT.value)),
        command,
        Limits(0, 0, given.EPISODE_SECONDS.value),
        given.sandbox_config(),
        temperature=given.TEMPERATURE.value,
        max_tokens=given.MAX_TOKENS.value,
    )


# -- starting
# -------------------------------------------------------------------------------------------------


def known_errors() -> list[type[BaseException]]:
    """Return the errors that are shown as one line."""
    from envs.rock import SandboxError
    from rome.engine.errors import EngineError

    return [SandboxError, EngineError]


def stop_message() -> str:
    """Return what is printed after Ctrl-C or SIGTERM."""
    out = given.OUT.value
    return f"stopped; what has ended is kept in {out}, and the same command plays the rest"


if __name__ == "__main__":
    use_compilation_cache()  # of the embedded engine
    run_command(
        "launch.eval",
        main,
        known_errors=known_errors,
        failure_status=2,
        when_stopped=stop_message,
    )
