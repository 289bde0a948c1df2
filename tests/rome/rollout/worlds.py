"""Small stand-ins for tests of the agent loop and the scheduler: an engine that speaks from a
script, a world of one rule.
"""

import asyncio
import dataclasses

import numpy as np

from envs.gem.core import Env
from envs.rock import SandboxError
from rome.engine.completion import Completion, Sampling
from rome.engine.errors import EngineError
from rome.model.tokenizer import TINY, Chat, Tokenizer

CHAT = Chat(Tokenizer.load(TINY))


def routes_of(ids):
    """[tokens, 1 layer, 2 experts], other ones for every place and token."""
    return np.array(
        [
            [[(place + token) % 250 + 1, (place + token) % 250 + 2]]
            for place, token in enumerate(ids)
        ],
        np.uint8,
    )


@dataclasses.dataclass
class ScriptedEngine:
    """Says `turns` one after the other in each episode; records what it was asked."""

    turns: list[str]
    finish_reason: str = "stop"
    error: Exception | None = None
    delay: float = 0.0
    end: int = CHAT.tokenizer.im_end
    requests: list[tuple[list[int], Sampling]] = dataclasses.field(default_factory=list)
    running: int = 0
    most_running: int = 0

    async def generate(self, input_ids, sampling, deadline_s, *, affinity=None):
        self.requests.append((list(input_ids), sampling))
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            async with asyncio.timeout(deadline_s):
                await asyncio.sleep(self.delay)
        except TimeoutError:
            raise EngineError(f"no answer within {deadline_s:g} s") from None
        finally:
            self.running -= 1
        if self.error is not None:
            raise self.error
        number = (
            input_ids.count(CHAT.tokenizer.im_start) // 2 - 1
        )  # each turn opened a user's and an assistant's header
        ids = [*CHAT.turn(self.turns[number])[:-1], self.end]
        routes = (
            None
            if sampling.routes_from is None
            else routes_of(input_ids + ids)[sampling.routes_from : -1]
        )
        return Completion(
            ids, [-0.5] * len(ids), self.finish_reason, [(3, 0, len(ids))], routes=routes
        )


@dataclasses.dataclass
class Task:
    name: str
    family: str = "copy"


class EchoEnv(Env):
    """Answers each turn with its own text, after `delay` seconds; "done" ends it.

    The ending is what it was made with.
    """

    def __init__(self, name: str, ending: str = "success", delay: float = 0.0):
        self.task, self.ending, self.delay, self.closed = Task(name), ending, delay, 0

    def reset(self, seed=None):
        raise NotImplementedError

    def step(self, action):
        raise NotImplementedError

    async def areset(self, seed=None):
        return "say it", {}

    async def astep(self, action):
        await asyncio.sleep(self.delay)
        info = {"status": "ok", "use_tool": False, "parsed_action": action, "tool_type": None}
        if action == "done":
            return (
                "",
                float(self.ending == "success"),
                True,
                False,
                info | {"ending": self.ending, "note": "why"},
            )
        return f"echo {action}", 0.0, False, False, info

    async def aclose(self):
        self.closed += 1


class NeverClosed(EchoEnv):
    """An environment whose end takes longer than a test may."""

    async def aclose(self):
        self.closed += 1
        await asyncio.sleep(6000)


class FailsToClose(EchoEnv):
    """An environment whose end fails."""

    async def aclose(self):
        self.closed += 1
        raise SandboxError("the manager is gone")
