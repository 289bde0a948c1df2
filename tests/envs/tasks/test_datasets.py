"""Data sets in every form: what is read, what is pinned, and that anything malformed is an error
that names file, row and line.
"""

import contextlib
import copy
import gzip
import hashlib
import io
import itertools
import json
import os
import pathlib
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from envs.sources import dataset_digest, load_tasks
from envs.tasks import datasets
from envs.tasks.datasets import load_files, task_digest, unpack
from envs.tasks.git import fetch_commit
from envs.tasks.harbor import EXAMPLES, TaskError, load_task
from envs.tasks.harbor.fields import read_folder
from envs.tasks.rows import read_rows
from tests.envs.tasks.swebench.repositories import commit, git, make

PLAIN = {
    "task.toml": 'version = "1.0"\n',
    "instruction.md": "Make /app/out.txt.\n",
    "environment/Dockerfile": "FROM ubuntu:24.04\nWORKDIR /app\n",
    "tests/test.sh": "#!/bin/bash\ntrue\n",
}


def write_task(folder, **changes):
    for name, text in {**PLAIN, **changes}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def archive(files=PLAIN, prefix="", compress=True, members=()):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz" if compress else "w") as tar:
        for name, text in files.items():
            member = tarfile.TarInfo(prefix + name)
            member.size = len(text.encode())
            tar.addfile(member, io.BytesIO(text.encode()))
        for member in members:
            tar.addfile(member)
    return buffer.getvalue()


# -- registries
# -------------------------------------------------------------------------------------------------


@pytest.fixture
def registry(tmp_path):
    """Writes registry.json beside a folder `tasks/one` and a repository `repo` that has it too,
    later changed; gives a function of changes.
    """
    write_task(tmp_path / "tasks" / "one")
    write_task(tmp_path / "repo" / "tasks" / "two")
    git(tmp_path / "repo", "init", "-q")
    first = commit(tmp_path / "repo", "first")
    write_task(tmp_path / "repo" / "tasks" / "two", **{"instruction.md": "Another one.\n"})
    commit(tmp_path / "repo", "second")
    entries = [
        {"name": "one", "path": "tasks/one"},
        {
            "name": "two",
            "git_url": f"file://{tmp_path}/repo",
            "git_commit_id": first,
            "path": "tasks/two",
        },
    ]

    def write(change=lambda sets: None):
        sets = [
            {"name": "mine", "version": "1.0", "description": "", "tasks": copy.deepcopy(entries)},
            {"name": "mine", "version": "2.0", "tasks": [entries[0]]},
        ]
        change(sets)
        (tmp_path / "registry.json").write_text(json.dumps(sets, indent=1))
        return str(tmp_path / "registry.json")

    return write


def test_a_registry_gives_tasks_of_folders_and_of_commits(registry):
    one, two = load_files(registry() + ":mine@1.0")
    assert (one.name, two.name) == ("one", "two") and two.steps[
        0
    ].instruction == "Make /app/out.txt.\n"  # as it was at that commit
    assert [task.name for task in load_files(registry() + ":mine@2.0")] == ["one"]
    assert [task.name for task in load_tasks(registry() + ":mine@1.0")] == ["one", "two"]


def test_a_digest_pins_the_files_of_a_task(registry, tmp_path):
    digest = task_digest(read_folder(tmp_path / "tasks" / "one"))
    path = registry(lambda sets: sets[0]["tasks"][0].update(digest=digest)) + ":mine@1.0"
    assert len(load_files(path)) == 2
    (tmp_path / "tasks" / "one" / "tests" / "test.sh").chmod(0o755)
    with pytest.raises(TaskError, match=f"{digest} is asked for"):
        load_files(path)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda task: task.update(git_commit_id="HEAD"), "'HEAD' is not a full commit id"),
        (lambda task: task.pop("git_commit_id"), "'' is not a full commit id"),
        (lambda task: task.update(git_commit_id="1" * 40), "ls-tree"),
        (lambda task: task.update(path="../etc"), "leaves the repository"),
        (lambda task: task.update(path="none"), "no files are below"),
        (
            lambda task: task.update(git_url="ext::sh -c touch% /tmp/x"),
            "neither an https, ssh, git or file URL",
        ),
        (lambda task: task.update(git_url="--upload-pack=x"), "neither an https"),
        (lambda task: task.update(git_url="file:///nowhere/at/all"), "no git repository"),
        (
            lambda task: task.update(git_url="https://example.invalid/x.git"),
            "nothing is fetched unasked; give --fetch",
        ),
        (lambda task: task.update(digest="md5:1"), "64 hexadecimal"),
        (lambda task: task.update(name=3), "name must be a text"),
        (lambda task: task.pop("path"), "path is missing"),
        (lambda task: task.update(name="one"), "'one' is there twice"),
        (lambda task: task.pop("git_url"), "git_commit_id without git_url"),
    ],
)
def test_a_malformed_entry_is_refused_with_file_and_line(registry, change, message):
    path = registry(lambda sets: change(sets[0]["tasks"][1]))
    with pytest.raises(TaskError, match=message) as caught:
        load_files(path + ":mine@1.0")
    assert str(caught.value).startswith(f"{path}:") and "task 2" in str(caught.value)
    faults = []
    assert [task.name for task in load_files(path + ":mine@1.0", faults)] == ["one"] and len(
        faults
    ) == 1


@pytest.mark.parametrize(
    "name, message",
    [
        ("", "is there 2 times"),
        (":mine", "mine@1.0, mine@2.0"),
        (":mine@3", "0 times"),
        (":other", "0 times"),
    ],
)
def test_a_data_set_is_named_by_name_and_version(registry, name, message):
    with pytest.raises(TaskError, match=message):
        load_files(registry() + name)


def test_a_fault_inside_a_task_of_a_repository_names_both(registry, tmp_path):
    (tmp_path / "repo" / "tasks" / "two" / "task.toml").write_text("version = \n")
    third = commit(tmp_path / "repo", "third")
    with pytest.raises(
        TaskError, match=r"registry.json:\d+: data set 'mine', task 2: task.toml:1: not TOML"
    ):
        load_files(
            registry(lambda sets: sets[0]["tasks"][1].update(git_commit_id=third)) + ":mine@1.0"
        )
    os.symlink("/etc/passwd", tmp_path / "repo" / "tasks" / "two" / "tests" / "link")
    with pytest.raises(TaskError, match="is a link"):
        fourth = commit(tmp_path / "repo", "fourth")
        load_files(
            registry(lambda sets: sets[0]["tasks"][1].update(git_commit_id=fourth)) + ":mine@1.0"
        )


def test_what_is_fetched_is_kept_and_read_at_its_commit(registry, tmp_path, monkeypatch):
    """The fetch itself, by git's own protocol; no network is needed for one from a file."""
    monkeypatch.setattr(datasets, "CACHE", tmp_path / "cache")
    monkeypatch.setattr("envs.tasks.git.PROTOCOLS", "file")
    monkeypatch.setattr(datasets, "_URL", datasets.re.compile(r"file-url:.*"))
    git(tmp_path / "repo", "config", "uploadpack.allowAnySHA1InWant", "true")
    monkeypatch.setattr(
        datasets,
        "fetch_commit",
        lambda target, url, sha: fetch_commit(target, url.replace("file-url:", "file://"), sha),
    )
    path = (
        registry(lambda sets: sets[0]["tasks"][1].update(git_url=f"file-url:{tmp_path}/repo"))
        + ":mine@1.0"
    )
    with pytest.raises(TaskError, match="give --fetch"):
        load_files(path)
    assert len(load_files(path, fetch=True)) == 2
    (tmp_path / "repo").rename(tmp_path / "gone")
    assert len(load_files(path)) == 2  # kept


# -- archives
# -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix, compress", [("", True), ("some/folder/", True), ("./", False)])
def test_an_archive_is_a_task_wherever_its_settings_lie(tmp_path, prefix, compress):
    row = {"task_id": "make-out", "archive": archive(prefix=prefix, compress=compress)}
    task = datasets._load_archive(_row(tmp_path, row), "task_id", "archive")
    assert task.name == "make-out" and task.steps[0].instruction == "Make /app/out.txt.\n"


def _row(folder, values):
    from envs.tasks.rows import Row

    return Row(pathlib.Path(folder, "x.parquet"), 3, 0, values)


def _member(name, kind=tarfile.REGTYPE, link=""):
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, link
    return member


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "cannot be read|neither task.toml"),
        (b"nonsense" * 100, "cannot be read"),
        (gzip.compress(b"nonsense" * 100), "cannot be read"),
        (archive()[:200], "cannot be read"),
        (b"\x1f\x8b" + b"x" * 20, "cannot be read"),
        (archive(members=[_member("../x")]), "outside"),
        (archive(members=[_member("/etc/x")]), "outside"),
        (archive(members=[_member("l", tarfile.SYMTYPE, "/etc/passwd")]), "not a regular file"),
        (archive(members=[_member("h", tarfile.LNKTYPE, "task.toml")]), "not a regular file"),
        (archive(members=[_member("d", tarfile.CHRTYPE)]), "not a regular file"),
        (archive(members=[_member("task.toml/x")]), "needs a folder"),
        (archive({"a": "b"}), "neither task.toml"),
        (gzip.compress(bytes(200 << 20), 1), "cannot be read|neither"),
        (archive({**PLAIN, "task.toml": "version = 3\n"}), "task.toml:1: version"),
        (archive({"task.toml": 'version = "1.0"\n'}), "instruction.md: missing"),
    ],
    ids=itertools.count(),  # an archive holds the time at which a worker made it
)
def test_a_hostile_or_malformed_archive_is_refused_with_its_row(tmp_path, content, message):
    with pytest.raises(TaskError, match=message) as caught:
        datasets._load_archive(
            _row(tmp_path, {"task_id": "x", "archive": content}), "task_id", "archive"
        )
    assert str(caught.value).startswith(f"{tmp_path}/x.parquet: row 3:")


def test_a_digest_beside_an_archive_is_checked(tmp_path):
    content = archive()
    assert (
        datasets._load_archive(
            _row(
                tmp_path,
                {
                    "task_id": "x",
                    "archive": content,
                    "tar_sha256": hashlib.sha256(content).hexdigest(),
                },
            ),
            "task_id",
            "archive",
        ).name
        == "x"
    )
    with pytest.raises(TaskError, match="tar_sha256"):
        datasets._load_archive(
            _row(tmp_path, {"task_id": "x", "archive": content, "tar_sha256": "0" * 64}),
            "task_id",
            "archive",
        )


WHOLE = archive(compress=False)


@settings(max_examples=100, deadline=None)
@given(st.binary(min_size=1, max_size=40), st.integers(0, len(WHOLE)), st.booleans())
def test_a_damaged_archive_gives_files_or_a_task_error(noise, place, compress):
    damaged = WHOLE[:place] + noise + WHOLE[place + len(noise) :]
    content = gzip.compress(damaged) if compress else damaged
    with contextlib.suppress(TaskError):
        unpack(content, lambda message: TaskError("x", 0, message))


# -- files
# -------------------------------------------------------------------------------------------------


def test_parquet_files_of_archives_and_of_instances(tmp_path):
    parquet, pyarrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    parquet.write_table(
        pyarrow.table(
            {"path": ["a/one", "a/two"], "task_binary": [archive(), archive(prefix="t/")]}
        ),
        tmp_path / "tasks.parquet",
    )
    assert [task.name for task in load_tasks(str(tmp_path / "tasks.parquet"))] == ["one", "two"]
    made = make(tmp_path)
    parquet.write_table(
        pyarrow.table({key: [value] for key, value in made.row.items()}), tmp_path / "swe.parquet"
    )
    (task,) = load_files(str(tmp_path / "swe.parquet"))
    (tmp_path / "swe.jsonl").write_text(json.dumps(made.row))
    assert task.name == "owner__stats-1" and dataset_digest(
        load_tasks(str(tmp_path / "swe.parquet"))
    ) == dataset_digest(load_tasks(str(tmp_path / "swe.jsonl")))
    parquet.write_table(pyarrow.table({"a": [1], "b": ["x"]}), tmp_path / "other.parquet")
    content = (tmp_path / "tasks.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(content[:-20])
    (tmp_path / "flipped.parquet").write_bytes(content[:50] + bytes(80) + content[130:])
    for name, message in (
        ("other", "row 1: the fields a, b are neither"),
        ("cut", "not parquet"),
        ("flipped", "row|not parquet"),
    ):
        with pytest.raises(TaskError, match=message):
            load_files(str(tmp_path / f"{name}.parquet"))


def test_a_parquet_file_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    with pytest.raises(TaskError, match="pip install pyarrow"):
        load_files(str(tmp_path / "x.parquet"))


def test_rows_that_cannot_be_used_are_left_out_by_name(tmp_path):
    row = make(tmp_path).row
    django = {**row, "instance_id": "django__django-1", "FAIL_TO_PASS": ["test_zero (a.Tests)"]}
    lines = ["{", "[1]", json.dumps(django), json.dumps(row)]
    (tmp_path / "mixed.jsonl").write_text("\n".join(lines))
    faults = []
    (task,) = load_files(str(tmp_path / "mixed.jsonl"), faults)
    assert task.name == row["instance_id"]
    assert [fault.line for fault in faults] == [1, 2, 3]
    reasons = [fault.message for fault in faults]
    assert "not JSON" in reasons[0] and "is a list" in reasons[1] and "node id" in reasons[2]
    (tmp_path / "broken.jsonl").write_text("{\n[1]\n")
    with pytest.raises(TaskError, match=r"broken.jsonl:1: not JSON"):
        load_files(str(tmp_path / "broken.jsonl"), [])


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("x.jsonl", b'{"a": 1}\n{"a"\n', r"row 1: the fields a are neither"),
        ("x.jsonl", b'{"instance_id": "a", "base_commit": "b"}\n\n{\n', "x.jsonl:1: row 1"),
        ("x.jsonl", b"\n\n[1]\n", "x.jsonl:3: row 1 is a list"),
        ("x.jsonl", b"\xff\n", "x.jsonl:1: not UTF-8"),
        ("x.jsonl", b"", "no rows"),
        ("x.json", b'{"a":\n\n}', "x.json:3: not JSON"),
        ("x.json", b"3", "a list of objects"),
        ("x.json", b"[" * 100_000, "not JSON that can"),
        ("x.json", b"[1]", "row 1 is a int"),
        ("x.json", b"1" * 5000, "not JSON that can be read"),
        ("x.json", b'{"name": 1, "tasks": []}', "data set 1 must"),
        ("x.json", b'{"name": "n", "version": "1", "tasks": []}', "has no tasks"),
    ],
)
def test_a_malformed_file_is_refused_with_its_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TaskError, match=message):
        load_files(str(tmp_path / name))


@settings(max_examples=150, deadline=None)
@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.text(max_size=6)
        | st.sampled_from(["tasks", "name", "/", "file:///", "..", "0" * 40, "sha256:" + "0" * 64]),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(
                    [
                        "name",
                        "version",
                        "tasks",
                        "path",
                        "git_url",
                        "git_commit_id",
                        "digest",
                        "instance_id",
                        "base_commit",
                    ]
                ),
                inner,
                max_size=5,
            )
        ),
        max_leaves=12,
    )
)
def test_whatever_a_manifest_says_it_is_a_task_error_or_tasks(tmp_path_factory, value):
    file = tmp_path_factory.getbasetemp() / "fuzz.json"
    file.write_text(json.dumps(value))
    try:
        assert load_files(str(file)) == []
    except TaskError as error:
        assert str(file) in str(error)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=60))
def test_any_bytes_as_json_lines_are_rows_or_a_task_error(tmp_path_factory, content):
    file = tmp_path_factory.getbasetemp() / "fuzz.jsonl"
    file.write_bytes(content)
    try:
        list(read_rows(file))
    except TaskError as error:
        assert str(file) in str(error)


def test_a_task_of_a_folder_and_of_an_archive_is_one_task(tmp_path):
    folder = EXAMPLES / "word-report"
    files = {
        str(path.relative_to(folder)): path.read_text()
        for path in folder.rglob("*")
        if path.is_file()
    }
    task = datasets._load_archive(
        _row(tmp_path, {"task_id": "word-report", "archive": archive(files)}), "task_id", "archive"
    )
    assert (
        task.steps[0].instruction == load_task(folder).steps[0].instruction
        and task.environment.dockerfile_path
        == tmp_path / "x.parquet" / "row 3" / "environment" / "Dockerfile"
    )
