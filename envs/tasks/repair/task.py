"""Generated program repair: a package with one small bug, judged by the package's own tests.

    tasks = repair_tasks(["csvlite", "path/to/my_package"], count=100, seed=0)

Each task is proven before it is returned: with the bug some tests fail, without it they pass. The
same seed gives the same tasks.
"""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import itertools
import random
from collections.abc import Iterator, Sequence

from envs.rock.sync import run
from envs.tasks.harbor.errors import TaskError
from envs.tasks.harbor.task import Environment, HarborTask, Step
from envs.tasks.judge import judge_files
from envs.tasks.judge.folder import SETTINGS, pack, settings_above
from envs.tasks.repair.mutate import Edit, candidates_of, is_another_program
from envs.tasks.repair.package import Package, load_package, shipped
from envs.tasks.repair.prove import Run, check_baseline, is_sound, run_tests

ROOT = "/app"
MAX_BATCH = 24  # mutants that one sandbox runs
MAX_SANDBOXES = 2  # that run at once
AGENT_SECONDS = 600.0
TEST_SECONDS = 60.0
PROOF_SECONDS = 3600.0
_INSTRUCTION = """\
The Python package in {root}, {name}{about}, has a bug: some of its tests fail. Run them in {root} \
with `{command}`, find the fault in the package's code and mend it.
The tests are right and stay as they are; they are brought back as they were before they judge \
your work, and all of them must pass.
"""
_DOCKERFILE = """\
FROM python:3
WORKDIR {root}
ADD package.tar.gz {root}/
"""
_ADD_PYTEST = """\
ENV PYTHONPATH=/opt/pytest
ADD pytest.tar.gz /opt/pytest/
"""


def repair_tasks(
    packages: Sequence[str] = (),
    count: int | None = None,
    seed: int = 0,
    faults: list[TaskError] | None = None,
) -> list[HarborTask]:
    """Return `count` tasks, spread evenly over packages, and in each over the kinds of bugs.

    Args:
      packages: names of the packages in this repository, or paths; none for all in this repository.
      count: the number of tasks; None for one of each package.
      seed: the seed of the draws.
      faults: a list to which packages that cannot be used are added as errors instead of being
        raised. Their share of the tasks is missing then.

    Raises:
      TaskError: a package's own tests fail here, or they detect fewer bugs than asked for.
      SandboxError: a fault of the machine.
    """
    names = list(packages) or list(shipped())
    count = len(names) if count is None else count
    loaded = []
    for name in names:
        try:
            loaded.append(load_package(name))
        except TaskError as error:
            if faults is None or len(names) == 1:
                raise
            faults.append(error)
    if not loaded:
        return []
    if len({package.name for package in loaded}) < len(loaded):
        listed = ", ".join(package.name for package in loaded)
        raise TaskError(loaded[0].path, 0, f"two packages have one name among {listed}")
    each, rest = divmod(count, len(names))
    share = [each + (number < rest) for number in range(len(names))][: len(loaded)]
    found = []
    for made in run(_all(loaded, share, seed), PROOF_SECONDS):
        if isinstance(made, list):
            found.append(made)
        elif faults is None or not isinstance(made, TaskError):
            raise made
        else:
            faults.append(made)
    return [task for row in itertools.zip_longest(*found) for task in row if task is not None]


async def _all(
    packages: Sequence[Package], share: Sequence[int], seed: int
) -> list[list[HarborTask] | BaseException]:
    """Return the tasks of each package, or the error that kept it from having any."""
    gate = asyncio.Semaphore(MAX_SANDBOXES)
    pairs = zip(packages, share, strict=True)
    made = [_tasks(package, count, seed, gate) for package, count in pairs]
    return await asyncio.gather(*made, return_exceptions=True)


async def _tasks(
    package: Package, count: int, seed: int, gate: asyncio.Semaphore
) -> list[HarborTask]:
    """Return the first `count` sound mutants, in the order of the seed."""
    found: list[HarborTask] = []
    candidates = draw(package, seed)
    tried = 0
    while len(found) < count:
        size = min(MAX_BATCH, 2 * (count - len(found)) + 4)
        batch = list(itertools.islice(candidates, size))
        if not batch:
            raise TaskError(
                package.path,
                0,
                f"{len(found)} of its {tried} possible bugs are noticed by its tests, and {count}"
                " tasks are asked for; ask for fewer, or give it more tests",
            )
        tried += len(batch)
        async with gate:
            before, *runs = await run_tests(package, batch)
        check_baseline(package, before)
        for (path, edit), after in zip(batch, runs, strict=True):
            if is_sound(before, after):
                found.append(make_task(package, path, edit, before, after))
    return found[:count]


def draw(package: Package, seed: int) -> Iterator[tuple[str, Edit]]:
    """Yield all edits of all sources in an order given by the seed.

    Each round takes one edit of every operator, so that rare kinds are not drowned out.
    """
    rng = random.Random(f"repair/{package.name}/{seed}")
    by_operator: dict[str, list[tuple[str, Edit]]] = {}
    for path in sorted(package.sources):
        try:
            text = package.files[path][0].decode()
        except UnicodeDecodeError:  # a source in another encoding runs, but is not mutated
            continue
        if "\r" in text or "\f" in text:
            continue
        for edit in candidates_of(text):
            by_operator.setdefault(edit.operator, []).append((path, edit))
    for edits in by_operator.values():
        rng.shuffle(edits)
    for round_ in itertools.zip_longest(*(by_operator[name] for name in sorted(by_operator))):
        candidates = [one for one in round_ if one is not None]
        rng.shuffle(candidates)
        for path, edit in candidates:
            if is_another_program(package.files[path][0].decode(), edit):
                yield path, edit


def _judge(package: Package, before: Run) -> dict[str, tuple[bytes, int]]:
    """Return the tests folder of a task: the package's tests and what configures them."""
    files = {}
    for name, content in package.files.items():
        if name in package.tests or name.rpartition("/")[2] in SETTINGS:
            files[name] = content
    added = settings_above(package.tests) - files.keys() if package.framework == "pytest" else ()
    return judge_files(
        package.framework,
        sorted(before.passed),
        files,
        targets=package.targets,
        control_folder=package.control_folder,
        remove=added,
        timeout=TEST_SECONDS,
    )


def make_task(package: Package, path: str, edit: Edit, before: Run, after: Run) -> HarborTask:
    """Return the Harbor task of one mutant. Its reference solution restores the file."""
    original, mode = package.files[path]
    broken = edit.apply(original.decode()).encode()
    tests = _judge(package, before)
    context = {"package.tar.gz": (pack({**package.files, path: (broken, mode)}), 0o644)}
    dockerfile = _DOCKERFILE.format(root=ROOT)
    if "pytest.tar.gz" in tests:
        context["pytest.tar.gz"] = tests["pytest.tar.gz"]
        dockerfile += _ADD_PYTEST
    context = {"Dockerfile": (dockerfile.encode(), 0o644), **context}
    solve = f"#!/bin/bash\ngunzip -c /solution/original.gz > '{ROOT}/{path}'\n"
    identity = b"\0".join([path.encode(), str(edit.start).encode(), broken])
    digest = hashlib.sha256(identity).hexdigest()[:8]
    about = (
        f" ({package.about[:1].lower()}{package.about[1:].rstrip('.')})" if package.about else ""
    )
    step = Step(
        "task",
        _INSTRUCTION.format(root=ROOT, name=package.name, about=about, command=package.command),
        tests,
        solution={
            "solve.sh": (solve.encode(), 0o755),
            "original.gz": (gzip.compress(original, mtime=0), 0o644),
        },
        solve_script="solve.sh",
        agent_timeout=AGENT_SECONDS,
        verifier_timeout=TEST_SECONDS + 30.0,
    )
    environment = Environment(
        context=context,
        dockerfile=dockerfile,
        dockerfile_path=package.path / "Dockerfile",
        network_mode="no-network",
        memory_mb=512,
    )
    return HarborTask(
        name=f"repair/{package.name}/{edit.operator}/{digest}",
        path=package.path,
        format="repair",
        schema_version="",
        environment=environment,
        steps=(step,),
        category=f"repair-{edit.operator}",
        tags=(package.name, edit.operator),
        metadata={
            "package": package.name,
            "operator": edit.operator,
            "file": path,
            "line": original.decode().count("\n", 0, edit.start) + 1,
            "fail_to_pass": sorted(before.passed - after.passed),
            "pass_to_pass": sorted(before.passed & after.passed),
        },
    )
