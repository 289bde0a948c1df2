"""Tasks played in real sandboxes: the oracle earns 1, and doing nothing or cheating earns 0."""

import asyncio
import copy
import dataclasses
import json
import shutil
import subprocess

import pytest

from envs.gem import make
from envs.tasks.harbor import (
    EXAMPLES,
    BuildError,
    HarborEnv,
    TaskError,
    load_task,
)
from envs.tasks.harbor.context import resolve
from envs.tasks.harbor.task import LINK
from tests.envs.tasks.harbor.conftest import CONFIG, TB1, write
from tests.envs.tasks.harbor.playing import bash, observe, oracle, play, with_links

NAMES = sorted(folder.name for folder in EXAMPLES.iterdir())


# -- the examples
# -------------------------------------------------------------------------------------------------


CHEAT = (
    "mkdir -p /logs/verifier /tests /app/tests; echo 1 | tee /logs/verifier/reward.txt"
    " /app/reward.txt; echo '{\"reward\": 1}' > /logs/verifier/reward.json; echo 'echo 1 >"
    " /logs/verifier/reward.txt' > /tests/test.sh;cd /app; for m in unittest json pathlib"
    " subprocess sqlite3 tarfile sitecustomize usercustomize conftest; do echo 'import os;"
    " os._exit(0)' > $m.py; done; for n in python3 cmp git env rm; do printf '#!/bin/sh\\nexit"
    " 0\\n' > $n; chmod +x $n; done;export PATH=/app:$PATH; (while :; do echo 1 >"
    " /logs/verifier/reward.txt; sleep 0.01; done) > /dev/null 2>&1 & setsid sh -c 'while :; do"
    " echo 1 > /logs/verifier/reward.txt; sleep 0.01; done' > /dev/null 2>&1 & echo"
)


@pytest.fixture(scope="module")
def played():
    """Example -> what its oracle, a no-op and a cheat got."""

    async def all_of_them():
        gate = asyncio.Semaphore(4)

        async def limited(coroutine):
            async with gate:
                return await coroutine

        return await asyncio.gather(
            *(
                limited(one)
                for name in NAMES
                for one in (
                    oracle(EXAMPLES / name),
                    play(EXAMPLES / name),
                    play(EXAMPLES / name, CHEAT),
                )
            )
        )

    results = iter(asyncio.run(all_of_them()))
    return {name: [next(results) for _ in range(3)] for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_the_reference_solution_earns_1(played, name):
    assert played[name][0] == (1.0, "success")


@pytest.mark.parametrize("name", NAMES)
def test_doing_nothing_and_tampering_with_the_grader_earn_0(played, name):
    for reward, info in played[name][1:]:
        assert (reward, info["ending"]) == (0.0, "failure"), info


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_reference_solution_earns_1_again_and_again_and_in_the_landlock_tier(run, name):
    weak = dataclasses.replace(CONFIG, tier="landlock")
    assert [
        run(oracle(EXAMPLES / name, config)) for config in (CONFIG, CONFIG, CONFIG, weak, weak)
    ] == [(1.0, "success")] * 5
    assert run(play(EXAMPLES / name, config=weak))[0] == 0.0


# -- what agent and task see
# -------------------------------------------------------------------------------------------------


def test_the_agent_works_among_the_tasks_files_under_the_tasks_paths(harbor):
    folder = harbor(
        {
            "environment/Dockerfile": (
                "FROM python:3.12\nARG WHERE=/srv/data\nENV GREETING='hello you'"
                " TOOLS=/opt/tools\nENV PATH=$TOOLS:$PATH\nWORKDIR $WHERE\nWORKDIR inner\nCOPY"
                ' a*.txt sub/ ./\nCOPY --chmod=700 b.txt c\nADD b.txt /opt/tools/\nRUN ["sh", "-c",'
                ' "echo made > made.txt"]\nSHELL ["/bin/bash", "-c"]\nRUN echo {1..3} > seen.txt &&'
                " \\\n    printf '#!/bin/sh\\necho tool\\n' > $TOOLS/tool && chmod +x"
                " /opt/tools/tool\n"
            ),
            "environment/a1.txt": "1\n",
            "environment/a2.txt": "2\n",
            "environment/b.txt": "b\n",
            "environment/sub/deep/x.sh": "echo /app /opt/tools\n",
            "environment/sub/data.csv": "/app,/opt\n",
        }
    )
    seen = observe(
        folder,
        "pwd; ls",
        "stat -c %a c; cat made.txt seen.txt",
        "echo $GREETING; tool; cat /opt/tools/b.txt",
        "bash deep/x.sh; cat data.csv",
        "ls /tests /solution /logs/verifier; cat /srv/data/none",
        "cd /app || echo no; echo $HOME",
    )
    assert seen[0] == "/srv/data/inner\na1.txt\na2.txt\nc\ndata.csv\ndeep\nmade.txt\nseen.txt"
    assert seen[1] == "700\nmade\n1 2 3" and seen[2] == "hello you\ntool\nb"
    assert (
        seen[3] == "/app /opt/tools\n/app,/opt"
    )  # code has its paths rewritten, data has not: it already says what it says
    assert (
        "test.sh" not in seen[4]
        and "solve.sh" not in seen[4]
        and "/srv/data/none: No such file" in seen[4]
        and "/workspace" not in seen[4]
    )
    assert seen[5].startswith("no\n/root\n") and "cd: /app: No such file" in seen[5]


def test_an_archive_is_unpacked_by_add_and_a_docker_ignored_file_is_not_there(harbor, tmp_path):
    import io
    import tarfile

    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        entry = tarfile.TarInfo("inner/x.txt")
        entry.size = 1
        archive.addfile(entry, io.BytesIO(b"x"))
    folder = harbor(
        {
            "environment/Dockerfile": (
                "FROM debian\nWORKDIR /app\nADD pack.tgz /app/un/\nCOPY . .\n"
            ),
            "environment/pack.tgz": buffer.getvalue(),
            "environment/secret.txt": "s",
            "environment/.dockerignore": "# no\nsecret*\nDockerfile\n",
        }
    )
    assert observe(folder, "cat un/inner/x.txt; ls")[0] == "xpack.tgz\nun"


def test_a_health_check_a_settings_file_and_env_hold_in_the_world(harbor):
    folder = harbor(
        {
            "task.toml": (
                '[environment]\nworkdir = "/work"\n[environment.env]\nWHERE ='
                ' "/work/x"\n[environment.healthcheck]\ncommand = "test -d /work && test -n'
                ' $WHERE"\ninterval_sec = 0.01\n'
            )
        }
    )
    assert observe(folder, "pwd; echo $WHERE")[0] == "/work\n/work/x"
    with pytest.raises(BuildError, match=r"task.toml:2: the health check failed 2 times"):
        observe(
            harbor(
                {
                    "task.toml": (
                        '[environment.healthcheck]\ncommand = "false"\ninterval_sec = 0.01\nretries'
                        " = 1\n"
                    )
                },
                name="sick",
            )
        )


# -- Terminal-Bench 1
# -------------------------------------------------------------------------------------------------


RUNNER = """\
#!/bin/bash
# Stands in for `pytest -rA`, which this machine may lack: the parser reads the same lines.
python3 - <<'END'
import os, sys
sys.path.insert(0, os.environ["TEST_DIR"])
import test_outputs
lines = []
for name in sorted(vars(test_outputs)):
    if name.startswith("test_"):
        try:
            getattr(test_outputs, name)()
            lines.append(f"PASSED tests/test_outputs.py::{name}")
        except Exception as error:
            lines.append(f"FAILED tests/test_outputs.py::{name} - {error}")
print(27 * "=", "short test summary info", 28 * "=")
print(*lines, sep="\\n")
sys.exit(any(line.startswith("FAILED") for line in lines))
END
"""
TB1_TESTS = (
    "import pathlib\n\n\ndef test_there():\n    assert"
    " pathlib.Path('/app/out.txt').exists()\n\n\ndef test_data():\n    assert"
    " pathlib.Path('/app/data.txt').read_text() == 'd\\n'\n"
)


def test_a_terminal_bench_1_task_is_played_and_passes_when_all_its_tests_do(tmp_path, run):
    folder = write(
        tmp_path / "tb", {**TB1, "run-tests.sh": RUNNER, "tests/test_outputs.py": TB1_TESTS}
    )
    assert run(oracle(folder)) == (1.0, "success")
    assert run(play(folder))[0] == 0.0
    assert run(play(folder, "echo x > out.txt; echo other > data.txt"))[0] == 0.0
    (note,) = load_task(
        write(
            tmp_path / "same",
            {**TB1, "task.yaml": TB1["task.yaml"].replace("shell: false", "shell: true")},
        )
    ).notes
    assert "run_tests_in_same_shell" in note and load_task(folder).notes == []
    reward, info = run(
        play(write(tmp_path / "silent", {**TB1, "run-tests.sh": "echo PASSED test_x\n"}), "true")
    )
    assert reward == 0.0 and "summary is not in the output" in info["note"]


def test_a_reference_solution_that_is_not_there_is_said(harbor, run):
    with pytest.raises(TaskError, match="no reference solution"):
        run(oracle(harbor({"solution/solve.sh": None})))


# -- GEM
# -------------------------------------------------------------------------------------------------


def test_examples_are_registered_and_the_environment_is_a_gem_one():
    env = make("harbor/word-report", sandbox_config=CONFIG)
    observation, info = env.reset(seed=3)
    assert (
        observation.startswith("The folder /app/letters")
        and info["task"] == "word-report"
        and info["tools"]
    )
    copy.deepcopy((observation, info))
    json.dumps(info)
    assert env.step(bash("ls"))[0] == "letters"
    other = env.spawn()
    assert other.reset(3)[0] == observation
    other.close()
    env.close()
    env.close()
    with pytest.raises(RuntimeError, match=r"word-report.*reset"):
        env.step("done")
    with pytest.raises(NotImplementedError):
        env.spawn(same_state=True)


def test_a_task_can_be_given_as_a_record(run):
    assert run(play(load_task(EXAMPLES / "log-triage")))[0] == 0.0


def test_a_copied_repository_keeps_the_empty_folders_that_it_needs(harbor, run):
    """`git gc` packs all refs and leaves .git/refs empty, and git wants it there."""
    if not shutil.which("git"):
        pytest.skip("no git here")
    check = (
        "cd /app/repo && test -d logs && test -d /app/kept/none"
        ' && [ "$(GIT_CONFIG_NOSYSTEM=1 git -c safe.directory=* log --format=%s)" = first ]'
    )
    folder = harbor(
        {
            "environment/Dockerfile": "FROM ubuntu:24.04\nWORKDIR /app\nCOPY repo ./repo\n"
            "COPY empty /app/kept/\n",
            "tests/test.sh": "#!/bin/bash\nmkdir -p /logs/verifier\n"
            f"if {check}; then echo 1; else echo 0; fi > /logs/verifier/reward.txt\n",
        }
    )
    repository = folder / "environment/repo"
    (repository / "logs").mkdir(parents=True)
    (folder / "environment/empty/none").mkdir(parents=True)
    make = (
        "git init -q . && git config user.name n && git config user.email e@x && echo 1 > f &&"
        " git add f && git commit -qm first && git gc -q && rm -rf .git/hooks"
    )
    subprocess.run(make, shell=True, cwd=repository, check=True)
    assert run(play(folder, "true"))[0] == 1.0


def test_a_copied_folder_keeps_its_links(harbor, run):
    assert run(play(with_links(harbor, "ubuntu:24.04"), "true"))[0] == 1.0


@pytest.mark.parametrize(
    ("path", "leads"),
    [
        ("a/x", "b/x"),
        ("c/x", "b/x"),
        ("out/passwd", "etc/passwd"),
        ("root/b/x", "b/x"),
        ("loop/x", "loop/x"),
        ("b/x", "b/x"),
        ("", ""),
    ],
)
def test_links_of_a_context_lead_nowhere_else(path, leads):
    links = {"a": b"b", "c": b"./a/../a", "out": b"../../etc", "root": b"/", "loop": b"loop"}
    files = {"b/x": (b"", 0o644)} | {name: (target, LINK) for name, target in links.items()}
    assert resolve(files, path) == leads


def test_limits_that_the_sandbox_does_not_give_are_said(harbor, run):
    settings = 'version = "1.0"\n[environment]\nstorage_mb = 10240\nmemory_mb = 512\n'

    async def notes():
        env = HarborEnv(harbor({"task.toml": settings}), CONFIG)
        try:
            return (await env.areset())[1]["notes"]
        finally:
            await env.aclose()

    said = [note for note in run(notes()) if "_mb" in note]
    assert said == ["environment.storage_mb = 10240, and the sandbox has 256"]
