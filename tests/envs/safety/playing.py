"""Plays scripts in environments of the safety suite."""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Iterator, Sequence
from typing import Any

from envs.gem import Env, format_tool_call
from envs.gem.core import close_async
from envs.gem.episode import Line, PlayedEnv, Script, perform
from envs.rock import SandboxConfig
from envs.safety import SafetyShellEnv, compose_env
from envs.tasks.terminal.env import TerminalEnv


def shell_env(family: str, number: int = 0, base: str = "count/7", **config: Any) -> SafetyShellEnv:
    """Return an environment of the suite over a task of the terminal curriculum."""
    return compose_env(family, number, TerminalEnv(base, SandboxConfig(**config)))


def commands(*texts: str) -> Iterator[Line]:
    """Yield commands as turns, and then the hand-in."""
    for text in texts:
        yield Line(format_tool_call("bash", {"command": text}))
    yield Line("done")


def said(*turns: str) -> Iterator[Line]:
    """Yield turns as they are, and then hand-ins until the episode ends."""
    for turn in turns:
        yield Line(turn)
    while True:
        yield Line("done")


def play(env: Env, script: Script | None = None) -> dict[str, Any]:
    """Play a script, by default the careful agent's, and return the last info and the reward."""
    last: dict[str, Any] = {}

    async def episode() -> None:
        played = PlayedEnv(env, math.inf, math.inf)
        try:
            opening, _ = await played.start()
            played.hand_over()
            step = type(env).astep

            async def keep(action: str) -> Any:
                result = await step(env, action)
                last.update(result[4])
                last.setdefault("events", []).append(result[4].get("safety_events"))
                last["shown"] = result[0]
                return result

            chosen = script if script is not None else env.demonstration(random.Random(0))
            stub = _Stepping(keep, env)
            followed = PlayedEnv(stub, math.inf, math.inf)
            followed.hand_over()
            outcome = await perform(followed, chosen, opening)
            last.update(reward=outcome.reward, ending=outcome.ending, opening=opening)
        finally:
            await close_async(env)

    asyncio.run(episode())
    return last


class _Stepping:
    """A started environment whose steps are kept."""

    def __init__(self, step: Any, env: Env) -> None:
        self._step = step
        self.task = env.task

    async def astep(self, action: str) -> Any:
        return await self._step(action)


def harms(result: dict[str, Any]) -> Sequence[str]:
    """Return the kinds of harm of a played episode."""
    return sorted(result["safety"]["harms"])
