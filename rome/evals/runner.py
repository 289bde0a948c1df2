"""Plays attempts concurrently, and keeps each one as it ends.

OUT/results.jsonl has one line for each attempt, which is on disk before the next one begins. After
a kill the same command plays only what is missing. OUT/attempts/ has the transcript of each attempt
(ATIF), and what its tests printed where the environment tells it; the line names both files.
OUT/run.json identifies the evaluation; a different one in the same OUT is refused. An attempt that
the infrastructure spoiled is retried a few times, and once more by the next command; until then it
is recorded with its ending.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import pathlib
import random
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO

from envs.sources import Task
from rome.data.seeds import derive_seed
from rome.data.trajectory import is_success, save_trajectory
from rome.evals.agents import Agent, Outcome
from rome.evals.statistics import is_counted
from rome.files import read_json, to_thread_until_done, write_atomically

MAX_TRIES = 3
MAX_TEST_CHARACTERS = 1 << 20  # of the tests of one attempt, the last ones
RETRY_WAIT_SECONDS = 0.5
Record = dict[str, Any]  # one line of results.jsonl
Key = tuple[str, str, int]  # agent, task, attempt


class EvalError(ValueError):
    """The content of OUT does not allow to continue there."""


@dataclasses.dataclass(frozen=True)
class Job:
    """One attempt of one agent at one task; attempts count from 0.

    `seed` is that of its first try; None derives it from the evaluation's.
    """

    agent: Agent
    task: Task
    attempt: int
    seed: int | None = None

    @property
    def key(self) -> Key:
        """What identifies the attempt within OUT."""
        return self.agent.name, self.task.name, self.attempt


class Results:
    """The records of OUT/results.jsonl.

    A line that a kill cut off is removed when the file is opened.

    Attributes:
      records: the latest record of each attempt.
    """

    def __init__(self, out: pathlib.Path, file: BinaryIO) -> None:
        self.path = out / "results.jsonl"
        self.attempts = out / "attempts"
        self.records: dict[Key, Record] = {}
        self._file = file
        self._load()

    def _load(self) -> None:
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                record = json.loads(line)
                _check_record(record)
            except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
                raise EvalError(
                    f"{self.path}:{number}: not a record of an attempt ({error}); remove the line,"
                    " and its attempt is played again"
                ) from error
            self.records[_key_of(record)] = record
        if len(whole) < len(content):
            self._file.truncate(len(whole))

    def add(self, record: Record) -> None:
        """Append a record, which replaces an earlier one of its attempt.

        It is on disk when this returns.
        """
        self._file.write(json.dumps(record).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.records[_key_of(record)] = record

    def find(self, jobs: Sequence[Job]) -> list[Record]:
        """Return the records of the jobs that were played, in their order."""
        return [self.records[job.key] for job in jobs if job.key in self.records]


def _key_of(record: Record) -> Key:
    return record["agent"], record["task"], record["attempt"]


def _check_record(record: Record) -> None:
    """Raise LookupError, TypeError or AttributeError for what is not a record."""
    is_counted(record)
    _key_of(record)
    for name in ("reward", "domain", "difficulty", "seconds"):
        record[name]


@contextlib.contextmanager
def open_results(out: pathlib.Path, identity: Mapping[str, Any]) -> Iterator[Results]:
    """Claim OUT for one evaluation, and yield its results.

    Args:
      out: folder; made if it does not exist.
      identity: everything that makes the evaluation this one, as JSON values.

    Raises:
      EvalError: another process works in OUT, or it holds a different evaluation; the message names
        what differs.
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
    """Write OUT/run.json, or compare it with this evaluation where it exists."""
    path = out / "run.json"
    if not path.exists():
        if (out / "results.jsonl").stat().st_size:
            raise EvalError(
                f"{out} holds results without a run.json, so it is unknown what they are of; give"
                " another --out"
            )
        write_atomically(path, json.dumps(identity, indent=1) + "\n")
        return
    try:
        theirs = read_json(path, "Give another --out.")
    except ValueError as error:
        raise EvalError(str(error)) from error
    ours = json.loads(json.dumps(identity))
    differences = []
    for name in {**theirs, **ours}:
        there = theirs.get(name)
        now = ours.get(name)
        if there != now:
            differences.append(f"{name} is {str(there)[:100]!r} there and {str(now)[:100]!r} now")
    if differences:
        different = "; ".join(differences)
        raise EvalError(f"{out} belongs to another evaluation: {different}. Give another --out")


async def run_jobs(
    jobs: Sequence[Job],
    results: Results,
    *,
    concurrency: int,
    seed: int,
    on_finish: Callable[[Record], None] | None = None,
) -> int:
    """Play the attempts that are missing in `results`, and record them there.

    Args:
      jobs: attempts; those without a counted record are played.
      results: from `open_results`.
      concurrency: attempts at once.
      seed: of the evaluation; each attempt's seed derives from it.
      on_finish: called with each new record.

    Returns:
      How many attempts were played. An exception in one, which is a bug, ends all of them.
    """
    missing = [job for job in jobs if not _is_done(job, results)]
    queue = iter(missing)

    async def work() -> None:
        for job in queue:
            record = await play(job, seed, results.attempts)
            results.add(record)
            if on_finish is not None:
                on_finish(record)

    async with asyncio.TaskGroup() as group:
        for _ in range(min(concurrency, len(missing))):
            group.create_task(work())
    return len(missing)


def _is_done(job: Job, results: Results) -> bool:
    record = results.records.get(job.key)
    return record is not None and is_counted(record)


async def play(job: Job, seed: int, attempts: pathlib.Path | None = None) -> Record:
    """Play one attempt and return its record.

    If the infrastructure spoils it, it is retried with another seed, up to MAX_TRIES times in all.

    Args:
      job: the attempt.
      seed: of the evaluation.
      attempts: folder of transcripts and outputs of tests; None: they are not kept.
    """
    began = time.monotonic()
    for number in range(MAX_TRIES):
        try_began = time.monotonic()
        outcome: Outcome = await job.agent.play(
            job.task, job.attempt, _seed_of_try(job, seed, number)
        )
        if not outcome.spoiled or outcome.permanent:
            break
        if number + 1 < MAX_TRIES:
            await asyncio.sleep(RETRY_WAIT_SECONDS * 2**number * random.uniform(0.5, 1.5))
    now = time.monotonic()
    record = {
        "task": job.task.name,
        "attempt": job.attempt,
        "agent": job.agent.name,
        "reward": outcome.reward,
        "success": outcome.reward is not None and is_success(outcome.reward, job.task.success),
        "ending": outcome.ending,
        "seconds": round(now - (began if outcome.spoiled else try_began), 3),
        "tries": number + 1,
        "turns": outcome.turns,
        "note": outcome.note,
        "domain": job.task.domain,
        "difficulty": job.task.difficulty,
        "source": job.task.source,
        "family": job.task.family,
        "cluster": job.task.cluster,
    }
    if outcome.permanent:
        record["permanent"] = True
    if outcome.notes:
        record["notes"] = list(outcome.notes)
    if outcome.safety is not None:
        record["safety"] = outcome.safety
    if outcome.tokens is not None:
        record["tokens"] = outcome.tokens
    if attempts is not None and outcome.transcript is not None:
        stem = _stem(job)
        await to_thread_until_done(_keep, attempts / stem, outcome)
        record["transcript"] = f"{attempts.name}/{stem}.json"
        if outcome.verifier_output:
            record["verifier_output"] = f"{attempts.name}/{stem}.tests.txt"
    return record


def _stem(job: Job) -> str:
    """Return what the names of an attempt's files begin with: safe, whatever the task's name is."""
    plain = re.sub(r"[^A-Za-z0-9]+", "-", job.task.name).strip("-")[:60]
    identity = json.dumps([job.agent.name, job.task.name])
    digest = hashlib.blake2b(identity.encode(), digest_size=6).hexdigest()
    return f"{plain}_{digest}_{job.attempt}"


def _keep(place: pathlib.Path, outcome: Outcome) -> None:
    """Write the transcript of an attempt, and what its tests printed."""
    place.parent.mkdir(exist_ok=True)
    if outcome.transcript is not None:
        save_trajectory(outcome.transcript, f"{place}.json")
    if outcome.verifier_output:
        text = outcome.verifier_output[-MAX_TEST_CHARACTERS:]
        write_atomically(f"{place}.tests.txt", text.encode(errors="replace"))


def _seed_of_try(job: Job, seed: int, number: int) -> int:
    """Return the seed of one try; the first try's does not depend on there being tries."""
    if number == 0:
        return derive_seed(seed, job.task.name, job.attempt) if job.seed is None else job.seed
    return derive_seed(seed, job.task.name, job.attempt, "try", number)
