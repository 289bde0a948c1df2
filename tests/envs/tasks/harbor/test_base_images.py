"""Base images, build contexts and limits of published tasks, and how their scripts run."""

import dataclasses

import pytest

from envs.tasks.harbor import TaskError, load_task
from envs.tasks.harbor.environment import limit_notes, sandbox_for
from tests.envs.tasks.harbor.conftest import CONFIG, tb1
from tests.envs.tasks.harbor.playing import observe, oracle, play


def test_base_images_begin_in_their_own_folder_and_python_is_there(tmp_path, run):
    dockerfile = (
        "FROM ghcr.io/laude-institute/t-bench/python-3-13:20250620\nCOPY task-deps/data.csv ./\n"
        "RUN python -c 'print(40 + 2)' > answer\n"
    )
    folder = tb1(
        tmp_path / "task", "true\n", Dockerfile=dockerfile, **{"task-deps/data.csv": "1\n"}
    )
    shown = observe(load_task(folder), "cat /app/data.csv /app/answer; pwd; python -V")
    assert "1\n42\n/app\nPython 3" in shown[0], shown


def test_installs_that_are_there_already_are_done(harbor):
    dockerfile = (
        "FROM ghcr.io/laude-institute/t-bench/ubuntu-24-04:20250624\n"
        "RUN apt-get update && \\\n    apt-get install -y python3-pip git && \\\n"
        "    ln -s /usr/bin/python3 /usr/bin/python && \\\n    rm -rf /var/lib/apt/lists/*\n"
        "RUN pip3 install --break-system-packages pytest==8.4.1 && echo done > /app/done\n"
        "RUN curl -LsSf https://astral.sh/uv/install.sh | sh\nRUN /root/.local/bin/uv init\n"
    )
    shown = observe(
        harbor({"environment/Dockerfile": dockerfile}),
        "cat /app/done; python -V; ls -A /workspace; uv",
    )[0]
    assert shown.startswith("done\nPython 3") and ".rock-shims" not in shown, shown
    assert "uv: command not found" in shown


def test_a_build_copies_tests_only_where_it_names_them(tmp_path):
    everything = "FROM ubuntu\nWORKDIR /app\nCOPY . .\n"
    folder = tb1(tmp_path / "a", "true\n", Dockerfile=everything)
    assert "tests" not in observe(load_task(folder), "ls /app")[0]
    named = "FROM ubuntu\nWORKDIR /app\nCOPY tests/test_outputs.py run-tests.sh ./\n"
    folder = tb1(tmp_path / "b", "true\n", Dockerfile=named)
    shown = observe(load_task(folder), "ls /app")[0]
    assert "test_outputs.py" in shown and "run-tests.sh" in shown and "solution.sh" not in shown


def test_an_arg_before_from_and_the_arguments_of_the_platform_are_filled_in(harbor):
    dockerfile = (
        "ARG V=24.04\nARG W=w\nFROM ubuntu:$V\nARG V\nARG U\nARG TARGETOS\nARG X='a b'\nENV X2=$X\n"
        'RUN mkdir /app && echo "[$V][$W][${U-unset}][$TARGETOS][$X2]" > /app/seen\n'
    )
    shown = observe(harbor({"environment/Dockerfile": dockerfile}), "cat /app/seen")[0]
    assert "[24.04][][unset][linux][a b]" in shown


def test_a_stage_that_nothing_comes_from_is_left_out(harbor):
    dockerfile = "FROM nvidia/cuda:12\nRUN make\nFROM ubuntu\nWORKDIR /app\nRUN echo last > f\n"
    assert "last" in observe(harbor({"environment/Dockerfile": dockerfile}), "cat /app/f")[0]


def test_limits_of_a_task_are_kept_where_they_can_be_and_said_where_not(harbor):
    text = "[environment]\nmemory_mb = 2048\nstorage_mb = 10240\ncpus = 4\n"
    task = load_task(harbor({"task.toml": text}))
    config = sandbox_for(task, CONFIG)
    assert (config.memory_mb, config.disk_mb, config.cpus) == (2048, 1024, 4)
    assert limit_notes(task, config) == ["environment.storage_mb = 10240, and the sandbox has 1024"]
    given = sandbox_for(task, dataclasses.replace(CONFIG, memory_mb=512, disk_mb=300))
    assert (given.memory_mb, given.disk_mb, given.pids) == (512, 300, 256)
    longer = task.with_more_time(2)
    assert longer.steps[0].verifier_timeout == 2 * task.steps[0].verifier_timeout
    assert longer.environment.build_timeout == 2 * task.environment.build_timeout


def test_scripts_run_by_their_own_first_line(harbor, run):
    files = {
        "tests/test.sh": (
            "#!/usr/bin/env python3\nimport pathlib\n"
            "reward = int(pathlib.Path('/app/out.txt').exists())\n"
            "pathlib.Path('/logs/verifier/reward.txt').write_text(str(reward))\n"
        ),
        "solution/solve.sh": "#!/usr/bin/python3\nopen('/app/out.txt', 'w').write('x')\n",
    }
    folder = harbor(files)
    assert run(oracle(load_task(folder))) == (1.0, "success")
    assert run(play(load_task(folder)))[0] == 0.0


@pytest.mark.parametrize("name", ["tests/test.sh", "solution/solve.sh"])
def test_scripts_with_crlf_are_named_with_their_line(harbor, name):
    folder = harbor({name: "#!/bin/sh\ntrue\r\n"})
    with pytest.raises(TaskError, match="CRLF") as caught:
        load_task(folder)
    assert caught.value.line == 2 and caught.value.file == folder / name
