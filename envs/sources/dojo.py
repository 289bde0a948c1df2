"""AgentDojo's tasks: agentdojo[:SUITES[:N]], see envs.safety.agentdojo."""

from __future__ import annotations

from envs.gem import Env
from envs.rock import SandboxConfig
from envs.safety import agentdojo
from envs.sources.generated import MADE_PLAY_SECONDS, parse_count
from envs.sources.source import LISTED_APART, Finite
from envs.sources.task import MARGIN_SECONDS, Content, SourceError, Task


def open_agentdojo(spec: str) -> Finite:
    """Return the source of agentdojo[:SUITES[:N]]; it is only ever evaluated.

    Raises:
      SourceError: a suite is unknown, or the package is not installed.
    """
    parts = spec.split(":")
    names = [name for name in parts[1].split(",") if name] if len(parts) > 1 else []
    unknown = [name for name in names if name not in agentdojo.SUITES]
    if unknown or len(parts) > 3:
        raise SourceError(
            f"dataset {spec!r} is not agentdojo[:SUITES[:N]] with suites of"
            f" {', '.join(agentdojo.SUITES)}"
        )
    tasks = []
    try:
        for suite in names or agentdojo.SUITES:
            tasks += [_task(suite, user, injection) for user, injection in agentdojo.pairs(suite)]
    except agentdojo.AgentDojoMissingError as error:
        raise SourceError(str(error)) from error
    if len(parts) == 3:
        count = parse_count(parts[2], LISTED_APART)
        if count is None:
            raise SourceError(f"dataset {spec!r}: {parts[2]!r} is no number of tasks above 0")
        tasks = tasks[:: max(1, len(tasks) // count)][:count]
    return Finite(spec, tasks, eval_share=1.0)


def _task(suite: str, user: str, injection: str) -> Task:
    def new_env(config: SandboxConfig) -> Env:
        return agentdojo.AgentDojoEnv(suite, user, injection)

    example = agentdojo.AgentDojoEnv(suite, user, injection)

    def read() -> Content:
        opening, _ = agentdojo.AgentDojoEnv(suite, user, injection).reset()
        return Content((opening,), opening, [example.definition().encode()])

    return Task(
        name=example.task.name,
        family=suite,
        domain="agentdojo",
        difficulty=example.difficulty,
        cluster=f"{suite}/{user}",
        start_seconds=SandboxConfig().start_timeout + MARGIN_SECONDS,
        play_seconds=MADE_PLAY_SECONDS + MARGIN_SECONDS,
        grading_seconds=0.0,
        max_turns=agentdojo.MAX_TURNS,
        has_demonstrator=True,
        new_env=new_env,
        read=read,
        tools=tuple(example.tools),
        system=agentdojo.SYSTEM,
        has_attack=bool(injection),
    )
