"""Later episodes of a task start from the build of the first one, without traces of an agent."""

import asyncio

import pytest

from envs.tasks.harbor import BuildError, HarborEnv, load_task
from envs.tasks.harbor import build_cache as module
from envs.tasks.harbor.build import build
from tests.envs.tasks.harbor.conftest import CONFIG
from tests.envs.tasks.harbor.playing import bash


@pytest.fixture
def builds(monkeypatch):
    """How often something was built."""
    names = []

    async def counted(sandbox, task, *arguments):
        names.append(task.name)
        return await build(sandbox, task, *arguments)

    monkeypatch.setattr(module, "build", counted)
    return names


async def episode(task, *commands):
    env = HarborEnv(task, CONFIG)
    try:
        await env.areset()
        if env._sandbox.tier != "namespaces":
            pytest.skip("only the namespaces tier keeps snapshots of builds")
        return [(await env.astep(bash(command)))[0] for command in commands]
    finally:
        await env.aclose()


def test_episodes_of_one_task_build_once_and_see_nothing_of_each_other(harbor, run, builds):
    task = load_task(
        harbor(
            {
                "environment/Dockerfile": (
                    "FROM ubuntu\nWORKDIR /app\nRUN echo made > made.txt; echo t > /tmp/t\nENV"
                    " A=b\n"
                )
            }
        )
    )

    async def several():
        together = await asyncio.gather(
            *(
                episode(
                    task,
                    f"echo {number} > mine.txt; cat made.txt *.txt /tmp/t; echo $A",
                    "rm made.txt; echo bad > /tmp/t; ls",
                )
                for number in range(4)
            )
        )
        return together, await episode(task, "ls; cat made.txt /tmp/t; pwd")

    together, after = run(several())
    assert [seen[0] for seen in together] == [f"made\nmade\n{number}\nt\nb" for number in range(4)]
    assert after == ["made.txt\nmade\nt\n/app"] and builds == [task.name]


def test_another_task_of_that_name_is_built_itself_and_a_failed_build_is_tried_again(
    harbor, run, builds
):
    one, two = load_task(harbor()), load_task(harbor())
    bad = load_task(harbor({"environment/Dockerfile": "FROM ubuntu\nRUN false\n"}, name="bad"))

    async def several():
        await episode(one, "true")
        await episode(two, "true")
        for _ in range(2):
            with pytest.raises(BuildError):
                await episode(bad, "true")

    run(several())
    assert builds == ["task", "task", "bad", "bad"]


def test_only_so_many_are_kept(harbor, run, builds, monkeypatch):
    monkeypatch.setattr(module, "MAX_KEPT", 2)
    tasks = [load_task(harbor(name=f"task{number}")) for number in range(3)]

    async def several():
        for task in (*tasks, tasks[2], tasks[0]):
            await episode(task, "true")
        return len(module._entries[asyncio.get_running_loop()])

    assert run(several()) == 2 and builds == ["task0", "task1", "task2", "task0"]
