"""Plays attempts side by side and keeps each as it ends: OUT/results.jsonl, one line an attempt, on
the disk before the next begins there.

After a kill the same command plays only what is missing. OUT/run.json says what is evaluated;
something else in the same OUT is refused. An attempt that the infrastructure spoiled is tried
again, a few times now and once more by the next command; until then it stands there with its
ending.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import fcntl
import json
import os
import pathlib
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO

from rome.data.seeds import derive_seed
from rome.evals.agents import Agent, Outcome
from rome.evals.statistics import counted
from rome.evals.tasks import EvalTask
from rome.train.metrics import write_atomically

TRIES = 3
RETRY_WAIT_S = 0.5
Key = tuple[str, str, int]


class EvalError(ValueError):
    """What stands in OUT cannot be continued."""


@dataclasses.dataclass(frozen=True)
class Job:
    """One attempt of one agent at one task; attempts count from 0."""

    agent: Agent
    task: EvalTask
    attempt: int

    @property
    def key(self) -> Key:
        return self.agent.name, self.task.name, self.attempt


class Results:
    """OUT/results.jsonl and the lock of OUT. A line that a kill cut off is dropped when the file is
    opened.
    """

    def __init__(self, out: pathlib.Path, file: BinaryIO) -> None:
        self.path, self._file = out / "results.jsonl", file
        self.records: dict[Key, dict[str, Any]] = {}
        self._load()

    def _load(self) -> None:
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                record = json.loads(line)
                self.records[record["agent"], record["task"], record["attempt"]] = record
                (
                    counted(record),
                    record["reward"],
                    record["domain"],
                    record["difficulty"],
                    record["seconds"],
                )
            except (ValueError, LookupError, TypeError, AttributeError) as error:
                raise EvalError(
                    f"{self.path}:{number}: not a record of an attempt ({error}); remove the line,"
                    " and its attempt is played again"
                ) from error
        if len(whole) < len(content):
            self._file.truncate(len(whole))

    def add(self, record: dict[str, Any]) -> None:
        """Appends; the record is on the disk when this returns.

        A later record of an attempt takes the place of an earlier one.
        """
        self._file.write(json.dumps(record).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.records[record["agent"], record["task"], record["attempt"]] = record


@contextlib.contextmanager
def open_results(out: pathlib.Path, identity: Mapping[str, Any]) -> Iterator[Results]:
    """Claims OUT for this evaluation.

    Raises EvalError where it holds another one (naming what differs) or another process works
    there.
    """
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "results.jsonl", "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise EvalError(
                f"another process writes into {out}; wait for it, or give another --out"
            ) from None
        _claim(out, identity)
        yield Results(out, file)


def _claim(out: pathlib.Path, identity: Mapping[str, Any]) -> None:
    path = out / "run.json"
    if not path.exists():
        if (out / "results.jsonl").stat().st_size:
            raise EvalError(
                f"{out} holds results without a run.json, so nobody knows of what; give another"
                " --out"
            )
        write_atomically(path, json.dumps(identity, indent=1) + "\n")
        return
    try:
        theirs = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise EvalError(f"{path} is not JSON ({error}); give another --out") from error
    ours = json.loads(json.dumps(identity))
    names = [name for name in {**theirs, **ours} if theirs.get(name) != ours.get(name)]
    if names:
        different = "; ".join(
            f"{name} is {str(theirs.get(name))[:100]!r} there and {str(ours.get(name))[:100]!r} now"
            for name in names
        )
        raise EvalError(f"{out} belongs to another evaluation: {different}. Give another --out")


async def run_jobs(
    jobs: Sequence[Job],
    results: Results,
    *,
    concurrency: int,
    seed: int,
    on_finish: Callable[[dict[str, Any]], None] | None = None,
) -> int:
    """Plays what is missing, `concurrency` attempts at once.

    Returns how many were played. The first error that is a bug ends all of them.
    """
    missing = [
        job
        for job in jobs
        if job.key not in results.records or not counted(results.records[job.key])
    ]
    queue = iter(missing)

    async def work() -> None:
        for job in queue:
            record = await play(job, seed)
            results.add(record)
            if on_finish is not None:
                on_finish(record)

    async with asyncio.TaskGroup() as group:
        for _ in range(min(concurrency, len(missing))):
            group.create_task(work())
    return len(missing)


async def play(job: Job, seed: int) -> dict[str, Any]:
    """One attempt as its record; one that the infrastructure spoiled is tried again with another
    seed, TRIES times in all.
    """
    began = time.monotonic()
    for number in range(TRIES):
        first = time.monotonic()
        outcome: Outcome = await job.agent.play(
            job.task,
            job.attempt,
            derive_seed(seed, job.task.name, job.attempt, *(("try", number) if number else ())),
        )
        if not outcome.spoiled or outcome.permanent:
            break
        if number + 1 < TRIES:
            await asyncio.sleep(RETRY_WAIT_S * 2**number * random.uniform(0.5, 1.5))
    now = time.monotonic()
    return {
        "task": job.task.name,
        "attempt": job.attempt,
        "agent": job.agent.name,
        "reward": outcome.reward,
        "ending": outcome.ending,
        "seconds": round(now - first if not outcome.spoiled else now - began, 3),
        "tries": number + 1,
        "turns": outcome.turns,
        "note": outcome.note,
        "domain": job.task.domain,
        "difficulty": job.task.difficulty,
        **({"tokens": outcome.tokens} if outcome.tokens is not None else {}),
    }
