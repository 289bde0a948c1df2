"""Data sets of tasks in the published forms.

   load_files("tasks/")                            a folder of Harbor or Terminal-Bench 1 tasks
    load_files("registry.json:my-dataset@1.0")      a registry of Harbor's: tasks by path, or by git
    repository, commit and path load_files("train.parquet")                     SWE-bench rows, or
    one archive a task (task_id and archive, or path and task_binary) load_files("verified.jsonl")
    SWE-bench rows, JSON Lines or one list

Nothing is fetched from a network unless `fetch` is True. Tasks in a git repository are read at the
commit that the registry names, never at a branch. A `digest` beside a task pins its files, wherever
they come from.
"""

from __future__ import annotations

import dataclasses
import functools
import gzip
import hashlib
import io
import os
import pathlib
import re
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Mapping
from typing import Any

from envs.tasks.git import RepositoryError, fetch_commit, files_below, is_repository
from envs.tasks.harbor.errors import TaskError
from envs.tasks.harbor.fields import MAX_FOLDER_BYTES, MAX_FOLDER_FILES, read_folder, read_text
from envs.tasks.harbor.load import load_dataset, load_task
from envs.tasks.harbor.task import Environment, Files, HarborTask
from envs.tasks.rows import Row, collect_tasks, parse_json, read_rows
from envs.tasks.swebench import is_instance, load_swebench

SUFFIXES = (".json", ".jsonl", ".parquet")
# Columns (name, archive) of Terminal-Bench's exports, and of Harbor's converter.
ARCHIVES = (("task_id", "archive"), ("path", "task_binary"))
MAX_REGISTRY_BYTES = 64 << 20
CACHE = pathlib.Path(".cache/datasets")
_COMMIT = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_URL = re.compile(r"(?:https|ssh|git)://[^\s\x00-\x20]+|[\w.-]+@[\w.-]+:[\w./~-]+")
_WITH_DATASET = re.compile(r"(?P<file>.+\.json):(?P<name>[^:]+?)(?:@(?P<version>[^@:]+))?")


def load_files(
    dataset: str,
    faults: list[TaskError] | None = None,
    fetch: bool = False,
    environ: Mapping[str, str] | None = None,
) -> list[HarborTask]:
    """Load the tasks of a folder or a file; the module describes the forms.

    Args:
      dataset: the path; for a registry with the data set's name and version.
      faults: a list to which malformed tasks are added as errors instead of being raised.
      fetch: whether git may fetch repositories.
      environ: the values of ${NAME} in the tasks' env tables, see `harbor.load_task`.

    Raises:
      TaskError: a task or the file is malformed; names the file, and the row or line in it.
    """
    match = _WITH_DATASET.fullmatch(dataset)
    file = pathlib.Path(match["file"] if match else dataset)
    if match:
        return load_registry(file, match["name"], match["version"], faults, fetch, environ)
    if file.suffix not in SUFFIXES or file.is_dir():
        return load_dataset(file, faults, environ)
    if file.suffix == ".json" and _is_registry(file):
        return load_registry(file, None, None, faults, fetch, environ)
    broken: list[TaskError] = []
    first = next(read_rows(file, None if faults is None else broken), None)
    if first is None:
        raise broken[0] if broken else TaskError(file, 0, "no rows are in it")
    if is_instance(first):
        return load_swebench(file, faults)
    columns = [pair for pair in ARCHIVES if set(pair) <= set(first.values)]
    if not columns:
        fields = ", ".join(map(str, list(first.values)[:12]))[:200]
        archives = " or ".join(" and ".join(pair) for pair in ARCHIVES)
        raise first.fault(
            f"the fields {fields} are neither SWE-bench's (instance_id, base_commit, ...) nor those"
            f" of archives of tasks ({archives})"
        )
    name, archive = columns[0]
    loads = []
    for row in read_rows(file, faults):
        loads.append((row.fault, functools.partial(_load_archive, row, name, archive, environ)))
    return collect_tasks(faults, loads)


def task_digest(files: Files) -> str:
    """Return "sha256:" and a digest over the paths, permissions and contents of a task's files.

    A registry may pin a task by it.
    """
    whole = hashlib.sha256()
    for path, (content, mode) in sorted(files.items()):
        row = f"{path}\0{mode:o}\0{hashlib.sha256(content).hexdigest()}\n"
        whole.update(row.encode(errors="surrogateescape"))
    return f"sha256:{whole.hexdigest()}"


def _load_from(
    files: Files,
    name: str,
    origin: pathlib.Path,
    fault: Callable[[str], TaskError],
    digest: str | None = None,
    *,
    environ: Mapping[str, str] | None,
) -> HarborTask:
    """Load the task in these files.

    `origin` becomes the task's path. Errors about its files name them relative to the task.
    """
    if digest is not None and task_digest(files) != digest:
        raise fault(f"its files have the digest {task_digest(files)}, and {digest} is asked for")
    with tempfile.TemporaryDirectory(prefix="task-") as place:
        folder = pathlib.Path(place, re.sub(r"[^\w.-]", "-", name).lstrip(".") or "task")
        _lay_out(folder, files)
        try:
            task = load_task(folder, environ)
        except TaskError as error:
            inner = error.file
            if inner.is_relative_to(folder):
                inner = inner.relative_to(folder)
            where = f"{inner}:{error.line}" if error.line else f"{inner}"
            raise fault(f"{where}: {error.message}") from error
        except (OSError, ValueError) as error:  # a name that no file can have
            raise fault(f"its files cannot be laid out: {error}") from error
        steps = []
        for step in task.steps:
            environment = _environment_at(step.verifier_environment, folder, origin)
            steps.append(dataclasses.replace(step, verifier_environment=environment))
        environment = _environment_at(task.environment, folder, origin)
        return dataclasses.replace(task, path=origin, environment=environment, steps=tuple(steps))


def _lay_out(folder: pathlib.Path, files: Files) -> None:
    for path, (content, mode) in files.items():
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
        target.chmod(mode)
    folder.mkdir(exist_ok=True)


def _environment_at(
    environment: Environment | None, folder: pathlib.Path, origin: pathlib.Path
) -> Environment | None:
    if environment is None:
        return None
    return dataclasses.replace(
        environment,
        dockerfile_path=_moved(environment.dockerfile_path, folder, origin),
        compose_path=_moved(environment.compose_path, folder, origin),
    )


def _moved(
    path: pathlib.Path | None, folder: pathlib.Path, origin: pathlib.Path
) -> pathlib.Path | None:
    return None if path is None else origin / path.relative_to(folder)


# -- Archives in rows
# -------------------------------------------------------------------------------------------------


def _load_archive(
    row: Row, name_column: str, archive_column: str, environ: Mapping[str, str] | None = None
) -> HarborTask:
    name = row.text(name_column)
    content = row.binary(archive_column)
    wanted = row.values.get("tar_sha256")
    found = hashlib.sha256(content).hexdigest()
    if wanted is not None and wanted != found:
        raise row.fault(
            f"the archive has the digest {found}, and tar_sha256 is {str(wanted)[:80]!r}"
        )
    files = unpack(content, row.fault)
    roots = []
    for path in files:
        folder, _, file = path.rpartition("/")
        if file in ("task.toml", "task.yaml"):
            roots.append(folder)
    if not roots:
        raise row.fault("neither task.toml nor task.yaml is in the archive")
    root = min(roots, key=len)
    prefix = f"{root}/" if root else ""
    below = {
        path.removeprefix(prefix): file for path, file in files.items() if path.startswith(prefix)
    }
    last_name = name.rstrip("/").rpartition("/")[2]
    origin = row.file / f"row {row.number}"
    return _load_from(below, last_name, origin, row.fault, environ=environ)


def unpack(content: bytes, fault: Callable[[str], TaskError]) -> dict[str, tuple[bytes, int]]:
    """Return the regular files of a tar, which may be compressed by gzip.

    Raises:
      TaskError: a link, a device, a path outside the archive, or more than a task folder may hold.
    """
    files: dict[str, tuple[bytes, int]] = {}
    left = MAX_FOLDER_BYTES
    try:
        inner: Any = io.BytesIO(content)
        if content.startswith(b"\x1f\x8b"):
            inner = gzip.GzipFile(fileobj=inner)
        plain = _Bounded(inner, 2 * MAX_FOLDER_BYTES)
        with tarfile.open(fileobj=plain, mode="r|") as archive:
            for member in archive:
                parts = [part for part in member.name.split("/") if part not in ("", ".")]
                if member.name.startswith("/") or ".." in parts or "\0" in member.name:
                    raise fault(f"the archive holds {member.name[:100]!r}, which lies outside it")
                if member.isdir():
                    continue
                if not member.isreg() or not parts:
                    raise fault(
                        f"the archive holds {member.name[:100]!r}, which is not a regular file"
                    )
                left -= member.size
                if left < 0 or len(files) >= MAX_FOLDER_FILES:
                    raise fault(
                        f"the archive holds more than {MAX_FOLDER_BYTES} bytes or"
                        f" {MAX_FOLDER_FILES} files"
                    )
                mode = 0o755 if member.mode & 0o100 else 0o644
                files["/".join(parts)] = (archive.extractfile(member).read(), mode)
    except (tarfile.TarError, OSError, EOFError, zlib.error, ValueError, OverflowError) as error:
        if isinstance(error, TaskError):
            raise
        raise fault(
            f"the archive cannot be read: {type(error).__name__}: {str(error)[:100]}"
        ) from error
    for path in files:
        if _above(path) & files.keys():
            raise fault(f"the archive holds a file where {path[:100]!r} needs a folder")
    return files


def _above(path: str) -> set[str]:
    parts = path.split("/")
    return {"/".join(parts[:count]) for count in range(1, len(parts))}


class _Bounded(io.RawIOBase):
    """A reader that fails after so many bytes, because a small archive can unpack to a huge one."""

    def __init__(self, inner: Any, limit: int) -> None:
        self._inner = inner
        self._left = limit

    def read(self, size: int = -1) -> bytes:
        """Read like the inner file. Raises ValueError beyond the limit."""
        data = self._inner.read(self._left + 1 if size < 0 else min(size, self._left + 1))
        self._left -= len(data)
        if self._left < 0:
            raise ValueError(f"it unpacks to more than {2 * MAX_FOLDER_BYTES} bytes")
        return data


# -- Registries
# -------------------------------------------------------------------------------------------------


def _is_registry(file: pathlib.Path) -> bool:
    value = parse_json(file, read_text(file, MAX_REGISTRY_BYTES).encode(), 1)
    first = value[0] if isinstance(value, list) and value else value
    return isinstance(first, dict) and "tasks" in first


@dataclasses.dataclass(frozen=True)
class _Place:
    """The place of something in a registry, for messages."""

    file: pathlib.Path
    line: int
    name: str

    def fault(self, message: str) -> TaskError:
        """Return an error about this place."""
        return TaskError(self.file, self.line, f"{self.name}: {message}")


def load_registry(
    file: pathlib.Path,
    name: str | None,
    version: str | None,
    faults: list[TaskError] | None = None,
    fetch: bool = False,
    environ: Mapping[str, str] | None = None,
) -> list[HarborTask]:
    """Load a data set of a registry.

    Without a version the data set must have only one, and without a name it must be the only one.
    The other arguments are those of `load_files`.
    """
    text = read_text(file, MAX_REGISTRY_BYTES)
    value = parse_json(file, text.encode(), 1)
    sets = value if isinstance(value, list) else [value]
    for number, entry in enumerate(sets, 1):
        if not _is_data_set(entry):
            raise TaskError(
                file,
                _line_of(text, entry),
                f"data set {number} must be an object with name and version (texts) and tasks (a"
                " list)",
            )
    known = [f"{entry['name']}@{entry.get('version', '')}" for entry in sets]
    found = [
        entry
        for entry in sets
        if name in (None, entry["name"]) and version in (None, entry.get("version", ""))
    ]
    if len(found) != 1:
        wanted = name or "the data set"
        if version:
            wanted += f"@{version}"
        listed = ", ".join(known[:20])[:500]
        raise TaskError(
            file,
            0,
            f"{wanted} is there {len(found)} times; name one as {file}:NAME@VERSION: {listed}",
        )
    entry = found[0]
    loads = []
    for number, task in enumerate(entry["tasks"], 1):
        place = _Place(file, _line_of(text, task), f"data set {entry['name']!r}, task {number}")
        loads.append(
            (place.fault, functools.partial(_load_registered, place, task, fetch, environ))
        )
    tasks = collect_tasks(faults, loads)
    if not tasks and not faults:
        raise TaskError(file, 0, f"data set {entry['name']!r} has no tasks")
    return tasks


def _is_data_set(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("name"), str)
        and isinstance(entry.get("tasks"), list)
        and isinstance(entry.get("version", ""), str)
    )


def _line_of(text: str, entry: Any) -> int:
    """Return the line where an entry's name is first written; the JSON parser keeps no lines."""
    name = entry.get("name") if isinstance(entry, Mapping) else None
    if not isinstance(name, str):
        return 0
    match = re.search(r'"name"\s*:\s*' + re.escape(f'"{name}"'), text)
    return text.count("\n", 0, match.start()) + 1 if match else 0


def _load_registered(
    place: _Place, entry: Any, fetch: bool, environ: Mapping[str, str] | None
) -> HarborTask:
    if not isinstance(entry, dict):
        raise place.fault(f"a {type(entry).__name__}, but must be an object")
    for key in ("name", "path", "git_url", "git_commit_id", "digest"):
        value = entry.get(key)
        if value is None and key in ("name", "path"):
            raise place.fault(f"{key} is missing")
        if value is not None and not _is_line(value):
            raise place.fault(f"{key} must be a text of one line, and is {str(value)[:60]!r}")
    name = entry["name"]
    path = entry["path"]
    digest = entry.get("digest")
    if digest is not None and not _DIGEST.fullmatch(digest):
        raise place.fault(f'digest {digest[:80]!r} is not "sha256:" and 64 hexadecimal digits')
    if not entry.get("git_url"):
        if entry.get("git_commit_id"):
            raise place.fault("git_commit_id without git_url")
        folder = place.file.parent / path
        if not folder.is_dir():
            raise place.fault(f"{folder} is not a folder")
        return _load_from(read_folder(folder), name, folder, place.fault, digest, environ=environ)
    commit = entry.get("git_commit_id") or ""
    if not _COMMIT.fullmatch(commit):
        raise place.fault(
            f"git_commit_id {commit[:60]!r} is not a full commit id; a branch or HEAD may name"
            " another task tomorrow"
        )
    if path.startswith("/") or ".." in path.split("/"):
        raise place.fault(f"path {path[:100]!r} leaves the repository")
    try:
        repository = _repository(place, entry["git_url"], commit, fetch)
        files = files_below(repository, commit, path.strip("/"), MAX_FOLDER_BYTES, MAX_FOLDER_FILES)
    except RepositoryError as error:
        raise place.fault(str(error)) from error
    if not files:
        raise place.fault(f"no files are below {path!r} at {commit} of {entry['git_url']}")
    origin = pathlib.Path(f"{entry['git_url']}@{commit[:12]}") / path
    return _load_from(files, name, origin, place.fault, digest, environ=environ)


def _is_line(value: Any) -> bool:
    """Return whether a value is a non-empty text of one line that can be encoded."""
    if not isinstance(value, str) or not value:
        return False
    return not any(ord(letter) < 32 or "\ud800" <= letter <= "\udfff" for letter in value)


def _repository(place: _Place, url: str, commit: str, fetch: bool) -> pathlib.Path:
    """Return a local copy of a repository.

    A local one is read in place. Another one is fetched if `fetch` allows it, and kept.
    """
    if url.startswith(("file:///", "/", "./", "../")):
        local = place.file.parent / url.removeprefix("file://")
        if not is_repository(local):
            raise place.fault(f"git_url {url!r}: no git repository is at {local}")
        return local
    if not _URL.fullmatch(url) or url.startswith("-"):
        raise place.fault(
            f"git_url {url[:100]!r} is neither an https, ssh, git or file URL nor a path"
        )
    kept = CACHE / "git" / hashlib.sha256(url.encode()).hexdigest()[:32]
    if is_repository(kept) and os.path.exists(kept / f"fetched-{commit}"):
        return kept
    if not fetch:
        raise place.fault(
            f"{url} has not been fetched, and nothing is fetched unasked; give --fetch"
        )
    fetch_commit(kept, url, commit)
    (kept / f"fetched-{commit}").touch()
    return kept
