"""SWE-bench instances as tasks in Harbor's form.

The repository is at /testbed, with no history after base_commit; the tests enter the sandbox only
for grading. The reward is 1 if every test of FAIL_TO_PASS and PASS_TO_PASS ran and passed. The
reference solution is the instance's patch.

    tasks = load_swebench("verified.parquet")   # repositories: repos/OWNER/NAME beside the file
    tasks = load_swebench("mine.jsonl")         # "repo": "my-project", a folder beside the file
"""

from __future__ import annotations

import functools
import gzip
import pathlib
import re
from collections.abc import Iterator, Mapping

from envs.tasks.git import RepositoryError, content_of, files_at, git, is_repository
from envs.tasks.harbor.errors import TaskError
from envs.tasks.harbor.task import Environment, Files, HarborTask, Step
from envs.tasks.judge import judge_files
from envs.tasks.judge.folder import SETTINGS, pytest_archive, settings_above
from envs.tasks.rows import Row, collect_tasks, read_rows
from envs.tasks.swebench.instance import Instance, parse_instance
from envs.tasks.swebench.repository import cut, patched

ROOT = "/testbed"
ARCHIVE = "repository.tar.gz"
AGENT_SECONDS = 1800.0
TEST_SECONDS = 1200.0
BUILD_SECONDS = 600.0
_DIFFICULTIES = {
    "<15 min fix": "easy",
    "15 min - 1 hour": "medium",
    "1-4 hours": "hard",
    ">4 hours": "very hard",
}
_INSTRUCTION = """\
The git repository in {root} ({repo}) has the issue below. Change its code so that the issue is \
resolved and nothing else breaks. Your work is checked by tests
that you do not see; changes to tests, and to how tests are run (conftest.py, pytest.ini and the \
like), are undone before they run. `python3 -m pytest` runs
the tests that are there.

<issue>
{issue}
</issue>
"""
_DOCKERFILE = """\
FROM python:3
ENV PYTHONPATH=/opt/pytest
ADD pytest.tar.gz /opt/pytest/
WORKDIR {root}
ADD repository.tar.gz {root}/
RUN git -C {root} read-tree HEAD
"""
_SOLVE = """\
#!/bin/bash
cd {root} && gunzip -c /solution/patch.gz | git apply --whitespace=nowarn -
"""


def load_swebench(
    file: str | pathlib.Path, faults: list[TaskError] | None = None
) -> list[HarborTask]:
    """Make a task of each row of a file.

    Args:
      file: a .jsonl, .json or .parquet file.
      faults: a list to which malformed rows are added as errors instead of being raised.

    Raises:
      TaskError: a row is malformed, or its repository cannot be used.
    """
    rows = read_rows(pathlib.Path(file), faults)
    return collect_tasks(faults, ((row.fault, functools.partial(_load, row)) for row in rows))


def _load(row: Row) -> HarborTask:
    return make_task(parse_instance(row))


def make_task(instance: Instance, repository: pathlib.Path | None = None) -> HarborTask:
    """Make the task of an instance.

    Args:
      instance: the instance.
      repository: a local clone; None: it is looked for beside the instance's file.

    Raises:
      TaskError: the repository or the commit is missing, or a patch does not apply; names the row.
    """
    place = repository or find_repository(instance)
    try:
        if git(place, "cat-file", "-t", instance.base_commit).strip() != b"commit":
            raise RepositoryError(f"{instance.base_commit} in {place} is not a commit")
        tests = _tests(instance, place)
        patched(place, instance.base_commit, instance.patch)  # fails early if it does not apply
    except RepositoryError as error:
        raise _fault(instance, str(error)) from error
    dockerfile = _DOCKERFILE.format(root=ROOT)
    files = {
        "Dockerfile": (dockerfile.encode(), 0o644),
        "pytest.tar.gz": (pytest_archive(), 0o644),
    }
    context = _Context(instance, place, files)
    issue = instance.problem_statement.strip()
    step = Step(
        "task",
        _INSTRUCTION.format(root=ROOT, repo=instance.repo, issue=issue),
        tests,
        solution={
            "solve.sh": (_SOLVE.format(root=ROOT).encode(), 0o755),
            "patch.gz": (gzip.compress(instance.patch.encode(), mtime=0), 0o644),
        },
        solve_script="solve.sh",
        agent_timeout=AGENT_SECONDS,
        verifier_timeout=TEST_SECONDS + 60.0,
    )
    source = instance.source.file if instance.source else place
    environment = Environment(
        context=context,
        dockerfile=dockerfile,
        dockerfile_path=source.parent / f"{instance.instance_id}.Dockerfile",
        build_timeout=BUILD_SECONDS,
        network_mode="no-network",
        memory_mb=2048,
    )
    return HarborTask(
        name=instance.instance_id,
        path=source,
        format="swebench",
        schema_version="",
        environment=environment,
        steps=(step,),
        category="swebench",
        difficulty=_DIFFICULTIES.get(instance.difficulty, instance.difficulty),
        tags=(instance.repo,),
        metadata={
            "repo": instance.repo,
            "base_commit": instance.base_commit,
            "version": instance.version,
            "environment_setup_commit": instance.environment_setup_commit,
        },
    )


class _Context(Mapping):
    """A build context that makes its repository on demand: hundreds would not fit in memory."""

    def __init__(self, instance: Instance, repository: pathlib.Path, files: Files) -> None:
        self._instance = instance
        self._repository = repository
        self._files = files
        self.identity = instance.base_commit  # a commit's id is a digest of all that it holds

    def __getitem__(self, name: str) -> tuple[bytes, int]:
        if name != ARCHIVE:
            return self._files[name]
        try:
            return cut(self._repository, self._instance.base_commit).archive, 0o644
        except RepositoryError as error:
            raise _fault(self._instance, str(error)) from error

    def __iter__(self) -> Iterator[str]:
        return iter((*self._files, ARCHIVE))

    def __len__(self) -> int:
        return len(self._files) + 1

    def __contains__(self, name: object) -> bool:
        return name == ARCHIVE or name in self._files


def find_repository(instance: Instance) -> pathlib.Path:
    """Return the clone of an instance's repository beside its file.

    The candidates are repos/OWNER/NAME, repos/OWNER__NAME, and the folder that `repo` names; each
    of them also as NAME.git.

    Raises:
      TaskError: there is no clone.
    """
    if instance.source is None:
        raise _fault(
            instance,
            "give make_task the repository: this instance is from no file, beside which it"
            " could lie",
        )
    folder = instance.source.file.parent
    places = [
        folder / "repos" / instance.repo,
        folder / "repos" / instance.repo.replace("/", "__"),
        folder / instance.repo,
    ]
    for place in places:
        for candidate in (place, place.with_name(f"{place.name}.git")):
            if is_repository(candidate):
                return candidate
    raise _fault(instance, f"no clone of {instance.repo!r} is here: git clone it to {places[0]}")


def _tests(instance: Instance, repository: pathlib.Path) -> dict[str, tuple[bytes, int]]:
    """Return the tests folder: the tests after test_patch, with their original configuration."""
    files, removed = patched(repository, instance.base_commit, instance.test_patch)
    solution_files, _ = patched(repository, instance.base_commit, instance.patch)
    everything = files_at(repository, instance.base_commit)
    # They are as of base_commit, or removed where there were none, unless the reference solution
    # changes them.
    settings = [path for path in everything if path.rsplit("/", 1)[-1] in SETTINGS]
    ids = (*instance.fail_to_pass, *instance.pass_to_pass)
    paths = sorted({one.split("::")[0] for one in ids})
    for path in {*settings, *paths}:
        if path not in everything or path in files or path in solution_files or path in removed:
            continue
        blob, permissions = everything[path]
        files[path] = (content_of(repository, blob, path), permissions)
    if absent := [path for path in paths if path not in files and path not in solution_files]:
        raise RepositoryError(
            f"{absent[0]} is named by FAIL_TO_PASS or PASS_TO_PASS, and is neither in the"
            " repository nor made by a patch"
        )
    return judge_files(
        "pytest",
        ids,
        files,
        targets=paths,
        control_folder=_folder(paths[0]),
        keep=[*settings, *solution_files],
        remove=removed | (settings_above(paths) - {*everything, *files, *solution_files}),
        timeout=TEST_SECONDS,
    )


def _folder(path: str) -> str:
    return re.sub(r"/?[^/]*$", "", path) or "."


def _fault(instance: Instance, message: str) -> TaskError:
    if instance.source is None:
        return TaskError(instance.instance_id, 0, message)
    return instance.source.fault(f"{instance.instance_id}: {message}")
