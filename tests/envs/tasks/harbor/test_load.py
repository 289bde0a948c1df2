"""Task folders: every schema version is read, unknown keys are accepted, and what is malformed is
refused with file and line.
"""

import os
import shutil

import pytest

from envs.tasks.harbor import EXAMPLES, TaskError, load_dataset, load_task
from tests.envs.tasks.harbor.conftest import TB1, write

LATEST = """\
schema_version = "1.4"
artifacts = ["/app/out.txt", {source = "/app/x", destination = "x"}]
brand_new = 1

[task]
name = "org/full"
keywords = ["a"]

[metadata]
difficulty = "hard"
category = "software"
tags = ["a", "b"]
anything = {goes = [1, 2]}

[agent]
timeout_sec = 12.5
user = "agent"

[verifier]
timeout_sec = 34
env = {MODEL = "${MODEL:-small}", TOKEN = "${TOKEN}"}

[environment]
docker_image = "python:3.12"
cpus = 2
memory_mb = 2048
storage_mb = 10240
gpus = 0
network_mode = "allowlist"
allowed_hosts = ["pypi.org"]
workdir = "/srv/work"
new_key = true

[environment.env]
A = "1"

[environment.healthcheck]
command = "true"
interval_sec = 0.5

[[environment.mcp_servers]]
name = "tool"
transport = "sse"
"""


def has_solution(task):
    return all(step.solve_script for step in task.steps)


def test_the_newest_schema(harbor):
    task = load_task(harbor({"task.toml": LATEST}), environ={"TOKEN": "t0"})
    environment, (step,) = task.environment, task.steps
    assert (
        task.name,
        task.schema_version,
        task.format,
        task.difficulty,
        task.category,
        task.tags,
    ) == ("org/full", "1.4", "harbor", "hard", "software", ("a", "b"))
    assert (
        environment.docker_image,
        environment.cpus,
        environment.memory_mb,
        environment.storage_mb,
    ) == ("python:3.12", 2.0, 2048, 10240)
    assert (
        environment.network_mode,
        environment.allowed_hosts,
        environment.workdir,
        environment.env,
    ) == ("allowlist", ("pypi.org",), "/srv/work", {"A": "1"})
    assert (
        environment.healthcheck.command == "true"
        and environment.healthcheck.interval == 0.5
        and environment.healthcheck.retries == 3
    )
    assert environment.mcp_servers[0]["name"] == "tool" and len(task.artifacts) == 2
    assert (step.agent_timeout, step.verifier_timeout, step.verifier_env) == (
        12.5,
        34.0,
        {"MODEL": "small", "TOKEN": "t0"},
    )
    assert set(task.unknown_keys) == {"brand_new", "environment.new_key", "agent.user"}
    assert task.notes == ["agent.user: commands run as the one user of the sandbox"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        'version = "1.0"\n',
        'schema_version = "1.1"\n',
        'schema_version = "1.2"\n',
        'schema_version = "1.3"\n',
        'schema_version = "1.4"\n',
    ],
)
def test_a_task_without_environment_or_any_settings_is_accepted(harbor, text):
    task = load_task(harbor({"task.toml": text, "environment/Dockerfile": None}))
    assert (
        task.environment.dockerfile is None
        and task.environment.network_mode == "public"
        and has_solution(task)
    )
    assert (
        task.name == "task"
        and task.steps[0].instruction == "Make /app/out.txt.\n"
        and task.steps[0].agent_timeout is None
    )


def test_the_older_spellings_mean_the_same(harbor):
    environment = load_task(
        harbor(
            {
                "task.toml": (
                    '[environment]\nmemory = "2G"\nstorage = "512M"\nallow_internet = false\n'
                )
            }
        )
    ).environment
    assert (environment.memory_mb, environment.storage_mb, environment.network_mode) == (
        2048,
        512,
        "no-network",
    )


def test_a_canary_before_the_instruction_is_not_shown(harbor):
    assert (
        load_task(harbor({"instruction.md": "<!-- some canary GUID 1 -->\n# canary 2\nDo it.\n"}))
        .steps[0]
        .instruction
        == "Do it.\n"
    )


STEPS = {
    "task.toml": (
        'multi_step_reward_strategy = "final"\n[agent]\ntimeout_sec = 9\n[[steps]]\nname ='
        ' "one"\nmin_reward = 0.5\n[[steps]]\nname = "two"\n[steps.agent]\ntimeout_sec ='
        " 3\n[steps.min_reward]\nspeed = 0.25\n"
    ),
    "instruction.md": None,
    "solution/solve.sh": None,
    "tests/helper.py": "X = 1\n",
    "steps/one/instruction.md": "First.",
    "steps/one/solution/solve.sh": "true\n",
    "steps/one/workdir/setup.sh": "true\n",
    "steps/two/instruction.md": "Second.",
    "steps/two/tests/test.sh": "echo second\n",
}


def test_steps_share_the_tasks_tests_and_settings_and_override_them(harbor):
    task = load_task(harbor(STEPS))
    one, two = task.steps
    assert task.reward_strategy == "final" and not has_solution(task)
    assert (one.name, one.instruction, one.agent_timeout, one.min_reward, one.solve_script) == (
        "one",
        "First.\n",
        9.0,
        0.5,
        "solve.sh",
    )
    assert (two.agent_timeout, two.min_reward, two.solve_script) == (3.0, {"speed": 0.25}, None)
    assert set(one.setup) == {"setup.sh"} and set(one.tests) == {"test.sh", "helper.py"}
    assert (
        two.tests["test.sh"][0] == b"echo second\n"
        and two.tests["helper.py"] == one.tests["helper.py"]
    )


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("a = \n", 1, "not TOML"),
        ('version = "1.0"\n[agent\n', 2, "not TOML"),
        ('\n\nversion = "7"\n', 3, "'7' is not a known schema version"),
        ("version = 1.0\n", 1, "not a known schema version"),
        ('[agent]\ntimeout_sec = "long"\n', 2, "'long' is not a finite number"),
        ("[agent]\n\ntimeout_sec = -3\n", 3, "must be above 0"),
        ("[verifier]\ntimeout_sec = nan\n", 2, "not a finite number"),
        ("[environment]\ncpus = inf\n", 2, "not a finite number"),
        ("[environment]\nmemory_mb = 1.5\n", 2, "not a whole number"),
        ('[environment]\nmemory = "lots"\n', 2, "not a size"),
        (
            '[environment]\nnetwork_mode = "open"\n',
            2,
            "'open' is not one of public, no-network, allowlist",
        ),
        ('[environment]\nallow_internet = "yes"\n', 2, "is not a bool"),
        ('[environment]\nworkdir = "app"\n', 2, "not an absolute path"),
        ("[environment]\nenv = {A = [1]}\n", 2, "[1] is not a text"),
        ('[environment.env]\nA = "${NOT_SET}"\n', 2, "--task_env NOT_SET=VALUE"),
        ("[environment]\n[environment.healthcheck]\nretries = 2\n", 2, "needs a command"),
        ("environment = 3\n", 1, "is not a dict"),
        ("steps = [1]\n", 1, "must be a table"),
        ("[[steps]]\n", 1, "needs a name"),
        ('[[steps]]\nname = "../../etc"\n', 2, "needs a name of letters"),
        ('multi_step_reward_strategy = "max"\n', 1, "neither"),
        ('[verifier]\nenvironment_mode = "other"\n', 2, "neither"),
    ],
)
def test_a_malformed_settings_file_is_refused_with_file_and_line(harbor, text, line, says):
    folder = harbor({"task.toml": text})
    with pytest.raises(TaskError) as caught:
        load_task(folder)
    assert (caught.value.file, caught.value.line) == (folder / "task.toml", line), caught.value
    assert says in str(caught.value) and str(caught.value).startswith(
        f"{folder / 'task.toml'}:{line}: "
    )


@pytest.mark.parametrize(
    ("files", "file", "says"),
    [
        ({"instruction.md": None}, "instruction.md", "missing"),
        ({"instruction.md": " \n"}, "instruction.md", "empty"),
        ({"instruction.md": b"a\n\xff"}, "instruction.md", "UTF-8"),
        ({"tests/test.sh": None}, "tests/test.sh", "missing"),
        ({"task.toml": b"\xff"}, "task.toml", "UTF-8"),
        ({"task.toml": None}, "", "neither task.toml"),
        (
            {"environment/docker-compose.yaml": "services: ["},
            "environment/docker-compose.yaml",
            "not YAML",
        ),
        (
            {"environment/docker-compose.yaml": "x: 1"},
            "environment/docker-compose.yaml",
            "no services",
        ),
        ({**STEPS, "steps/two/instruction.md": None}, "steps/two/instruction.md", "missing"),
        ({**STEPS, "tests/test.sh": None}, "steps/one/tests/test.sh", "missing"),
    ],
)
def test_a_missing_or_broken_file_is_named(harbor, files, file, says):
    folder = harbor(files)
    with pytest.raises(TaskError, match=says) as caught:
        load_task(folder)
    assert caught.value.file == folder / file


@pytest.mark.parametrize(
    "place",
    [
        "tests/link",
        "solution/link",
        "environment/Dockerfile",
        "environment/.dockerignore",
        "instruction.md",
        "task.toml",
    ],
)
def test_a_link_out_of_the_task_is_refused(harbor, place):
    """A task folder comes from strangers: a link in it could bring a file of this machine into a
    sandbox.
    """
    folder = harbor()
    (folder / place).unlink(missing_ok=True)
    (folder / place).symlink_to("/etc/passwd")
    with pytest.raises(TaskError, match=r"symbolic link|not a regular file"):
        load_task(folder)


def test_a_pipe_does_not_make_the_loader_wait(harbor):
    folder = harbor()
    os.mkfifo(folder / "environment" / "pipe")
    with pytest.raises(TaskError, match="not a regular file"):
        load_task(folder)


# -- Terminal-Bench 1
# -------------------------------------------------------------------------------------------------


def test_a_terminal_bench_1_task_becomes_the_same_record(tmp_path):
    task = load_task(write(tmp_path / "tb", TB1))
    (step,) = task.steps
    assert (
        task.format,
        task.name,
        task.difficulty,
        task.category,
        task.tags,
        task.unknown_keys,
    ) == ("terminal-bench-1", "tb", "easy", "files", ("a",), ())
    assert (
        step.parser,
        step.test_script,
        step.solve_script,
        step.agent_timeout,
        step.verifier_timeout,
    ) == ("pytest", "run-tests.sh", "solution.sh", 120.0, 30.0)
    assert (
        set(step.tests) == {"run-tests.sh", "test_outputs.py"}
        and task.environment.compose_path is None
    )
    assert set(task.environment.context) == {
        "Dockerfile",
        "data.txt",
    }  # neither the solution nor the tests are in the build context


def test_the_older_descriptions_and_a_solution_of_commands(tmp_path):
    files = {
        **TB1,
        "task.yaml": (
            "descriptions:\n  - key: hard\n    description: no\n  - key: base\n    description: Do"
            " it.\n"
        ),
        "solution.yaml": "- command: echo a\n  min_timeout_sec: 1\n- command: |\n    echo b\n",
    }
    del files["solution.sh"]
    task = load_task(write(tmp_path / "tb", files))
    assert (
        task.steps[0].instruction == "Do it.\n"
        and task.steps[0].solution["solution.sh"][0] == b"echo a\necho b\n\n"
    )
    keys = load_task(
        write(
            tmp_path / "keys",
            {
                **files,
                "solution.yaml": "- command: vim\n- command: 'ihello'\n  append_enter: false\n",
            },
        )
    )
    assert not has_solution(keys)


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("instruction: [\n", 2, "not YAML"),
        ("instruction: x\nmax_agent_timeout_sec: soon\n", 2, "not a finite number"),
        ("instruction: x\n\nparser_name: jest\n", 3, "'jest' is not known"),
        ("- a\n", 1, "a mapping of settings is needed"),
        ("difficulty: easy\n", 1, "missing or empty"),
        ("instruction: x\ntags: [1]\n", 2, "1 is not a text"),
        ("instruction: !!python/object/apply:os.system ['true']\n", 1, "not YAML"),
        (
            (
                "a: &a [x, x]\nb: &b [*a, *a, *a, *a]\nc: &c [*b, *b, *b, *b]\nd: &d [*c, *c, *c,"
                " *c]\ninstruction: *d\n"
            ),
            5,
            "is not a str",
        ),
    ],
)
def test_a_malformed_task_yaml_is_refused_with_file_and_line(tmp_path, text, line, says):
    folder = write(tmp_path / "tb", {**TB1, "task.yaml": text})
    with pytest.raises(TaskError) as caught:
        load_task(folder)
    assert (
        caught.value.file == folder / "task.yaml"
        and caught.value.line == line
        and says in str(caught.value)
    ), caught.value


def test_several_services_are_seen(tmp_path):
    folder = write(
        tmp_path / "tb", {**TB1, "docker-compose.yaml": "services:\n  client: {}\n  database: {}\n"}
    )
    assert load_task(folder).environment.compose_path == folder / "docker-compose.yaml"


# -- datasets
# -------------------------------------------------------------------------------------------------


def test_a_dataset_is_a_folder_and_the_examples_are_one():
    tasks = load_dataset(EXAMPLES)
    names = sorted(task.name.rpartition("/")[2] for task in tasks)  # some are ORG/NAME
    assert len(tasks) >= 10 and names == sorted(folder.name for folder in EXAMPLES.iterdir())
    assert all(
        has_solution(task)
        and not task.unknown_keys
        and task.difficulty in ("easy", "medium", "hard")
        for task in tasks
    )
    assert {task.category for task in tasks} == {
        "files",
        "text",
        "data",
        "debugging",
        "system",
        "software",
    }


def test_a_malformed_task_in_a_dataset_is_raised_or_collected(tmp_path, harbor):
    write(tmp_path / "deep" / "er" / "tb", TB1)
    harbor({"task.toml": "a = "}, name="broken")
    harbor(name="good")
    with pytest.raises(TaskError, match=r"broken/task.toml:1"):
        load_dataset(tmp_path)
    faults: list[TaskError] = []
    assert [task.name for task in load_dataset(tmp_path, skip_malformed=faults)] == ["good", "tb"]
    assert len(faults) == 1 and faults[0].line == 1


def test_two_tasks_of_one_name_and_an_empty_folder_are_refused(tmp_path, harbor):
    with pytest.raises(TaskError, match=r"no task.toml and no task.yaml"):
        load_dataset(tmp_path)
    folder = harbor()
    shutil.copytree(folder, tmp_path / "other" / "task")
    with pytest.raises(TaskError, match="'task' is also in"):
        load_dataset(tmp_path)
