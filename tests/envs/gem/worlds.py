"""Small environments for the tests of wrappers, vectors and the service."""

import asyncio
import threading
import time

from envs.gem import Env


class Counter(Env):
    """Ends after `length` steps, the last one with reward 1; tells its seed and turn.

    `length` 0: never ends.
    """

    def __init__(self, length=3, seed=0):
        self.length, self.seed, self.turn, self.closed = length, seed, 0, 0

    def reset(self, seed=None):
        self.seed, self.turn = self.seed if seed is None else seed, 0
        return f"start {self.seed}", {"suffix": f"[{self.turn}]"}

    def step(self, action):
        self.turn += 1
        done = self.turn == self.length
        return (
            f"{action} at {self.turn}",
            float(done),
            done,
            False,
            {"suffix": f"[{self.turn}]", "seed": self.seed, "last": done},
        )

    def sample_random_action(self):
        return "go"

    def spawn(self, same_state=False, **kwargs):
        twin = Counter(**{"length": self.length, "seed": self.seed, **kwargs})
        twin.turn = self.turn if same_state else 0
        return twin

    def close(self):
        self.closed += 1


class AsyncCounter(Counter):
    """The same with coroutines, which say in which thread they ran."""

    async def areset(self, seed=None):
        await asyncio.sleep(0)
        return super().reset(seed)

    async def astep(self, action):
        await asyncio.sleep(0)
        observation, reward, terminated, truncated, info = super().step(action)
        return (
            observation,
            reward,
            terminated,
            truncated,
            {**info, "thread": threading.current_thread().name},
        )

    async def aclose(self):
        super().close()


class Odd(Env):
    """Does what its action says: waits until `go` is set, raises, answers with nonsense."""

    def __init__(self, seed=0, hang=0.0, refuse=False):
        if refuse:
            raise ValueError("refuse is true")
        time.sleep(hang)
        self.waits, self.go, self.closed = (threading.Event() for _ in range(3))
        self.done = []  # its actions, as they ended

    def reset(self, seed=None):
        return "odd", {}

    def step(self, action):
        if action == "wait":
            self.waits.set()
            self.go.wait(60)
        self.done.append(action)
        if action == "raise":
            raise KeyError("the environment's own")
        info = {
            "nan": {"x": float("nan")},
            "object": {"x": object()},
            "numbers": {"x": __import__("numpy").float32(1.5), "s": {2, 1}},
        }.get(action, {})
        return "done", 0.0, False, False, info

    def close(self):
        self.closed.set()
