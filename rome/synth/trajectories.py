"""Trajectory: plays accepted tasks, and keeps what was played. It measures how hard they are.

With an endpoint its model plays, and the pass rate over attempts is the difficulty. Without one a
script plays the reference solution as an agent would: it looks, writes the program, tries it.
"""

from __future__ import annotations

import dataclasses
import pathlib
import random
import shlex
from collections.abc import Sequence

from envs.gem import format_tool_call
from envs.gem.episode import PlayedEnv
from envs.rock import SandboxConfig
from envs.sources import Task
from envs.tasks.harbor import load_task
from rome.evals.agents import Outcome, StartedEnv, play_in_environment
from rome.evals.run import evaluate
from rome.synth.models import Endpoints


@dataclasses.dataclass
class Demonstrator:
    """Plays the reference solution turn by turn: looks around, writes, checks, and ends.

    Attributes:
      config: of the sandboxes.
      name: recorded with each attempt.
    """

    config: SandboxConfig
    name: str = "demonstrator"

    async def play(self, task: Task, attempt: int, seed: int) -> Outcome:
        """Play one attempt; the seed chooses how much it looks and tries."""
        commands = commands_of(task, random.Random(seed))

        async def converse(started: StartedEnv) -> Outcome:
            played = PlayedEnv(started, 300.0, task.start_seconds)
            await played.start()
            played.hand_over()
            turn = None
            for action in [*commands, "The program is written and tried; the task is done."]:
                turn = await played.step(action)
                if turn.ending:
                    break
            assert turn is not None
            return started.outcome(played.reward, turn.ending or "truncated_turns", turn.note)

        return await play_in_environment(task, self.config, converse)

    async def close(self) -> None:
        """Do nothing: no resources are held."""


def commands_of(task: Task, rng: random.Random) -> list[str]:
    """Return the turns of a demonstration of a made task."""
    assert task.path is not None
    step = load_task(task.path).steps[0]
    names = [name for name in step.solution if name != step.solve_script]
    program = names[0]
    text = step.solution[program][0].decode()
    looks = ["ls -la /app", "cat /app/*.txt /app/*.csv 2> /dev/null | head", "cd /app && ls"]
    turns = rng.sample(looks, rng.choice((1, 2)))
    if rng.random() < 0.3:
        turns.append(f"cat /app/{program}.old")  # an honest mistake, as agents make them
    limiter = "END_OF_PROGRAM"
    turns.append(f"cat > /app/{program} << '{limiter}'\n{text.rstrip(chr(10))}\n{limiter}")
    turns.append(f"cat {shlex.quote(f'/app/{program}')} | head -n 5")
    if rng.random() < 0.5:
        turns.append(f"wc -l /app/{program}")
    return [format_tool_call("bash", {"command": turn}) for turn in turns]


async def play_tasks(
    tasks: Sequence[Task],
    attempts: int,
    out: pathlib.Path,
    config: SandboxConfig,
    concurrency: int,
    seed: int,
    endpoints: Endpoints | None,
) -> tuple[dict[str, float], int]:
    """Play tasks, keep the transcripts in OUT/attempts, and return (pass rate by task, tokens).

    A task whose attempts were all spoiled by the infrastructure has no pass rate.
    """
    if endpoints is None:
        agent: object = Demonstrator(config)
    else:
        from rome.evals.endpoint import Endpoint

        chat = endpoints.chat
        agent = Endpoint(chat.url, chat.model, config, api_key=endpoints.api_key)
    results = await evaluate(
        "candidates",
        agent,  # type: ignore[arg-type]
        out,
        attempts=attempts,
        concurrency=concurrency,
        seed=seed,
        tasks=tasks,
    )
    solved: dict[str, list[bool]] = {}
    tokens = 0
    for record in results["tasks"]:
        tokens += sum((record.get("tokens") or {}).values())
        if record["reward"] is not None:
            solved.setdefault(record["task"], []).append(record["success"])
    return {name: sum(values) / len(values) for name, values in solved.items()}, tokens
