"""Agents that play a task folder in a real sandbox."""

import asyncio

from envs.gem import format_tool_call
from envs.tasks.harbor import (
    HarborEnv,
)
from tests.envs.tasks.harbor.conftest import CONFIG


def bash(command):
    return format_tool_call("bash", {"command": command})


async def play(task, *commands, images=None, config=CONFIG, **settings):
    """(reward, info) of an agent that sends these commands and hands in."""
    env = HarborEnv(task, config, images=images, **settings)
    try:
        await env.areset()
        result = None
        for command in commands:
            result = await env.astep(bash(command))
            if result[2] or result[3]:
                return result[1], result[4]
        result = await env.astep("done")
        return result[1], result[4]
    finally:
        await env.aclose()


async def oracle(task, config=CONFIG):
    env = HarborEnv(task, config)
    try:
        await env.areset()
        result = await env.asolve()
        return result[1], result[4]["ending"]
    finally:
        await env.aclose()


def observe(task, *commands):
    """What the commands show."""

    async def episode():
        env = HarborEnv(task, CONFIG)
        try:
            await env.areset()
            return [(await env.astep(bash(command)))[0] for command in commands]
        finally:
            await env.aclose()

    return asyncio.run(episode())


def with_links(harbor, base, files=None, dockerfile=""):
    """A task whose Dockerfile copies links, and whose tests look at what became of them."""
    check = (
        'cd /app/tree && [ "$(readlink bin/tool)" = ../lib/tool ] && [ "$(bin/tool)" = ran ]'
        ' && [ "$(readlink gone)" = /app/tree/none ] && [ "$(readlink far)" = ../../etc/passwd ]'
        " && [ -f /app/one -a ! -L /app/one ] && [ -f /app/through/tool ]"
    )
    folder = harbor(
        {
            "environment/Dockerfile": f"FROM {base}\n{dockerfile}WORKDIR /app\n"
            "COPY tree ./tree\nCOPY tree/bin/tool /app/one\nCOPY current/ /app/through/\n",
            "environment/tree/lib/tool": "#!/bin/sh\necho ran\n",
            "tests/test.sh": "#!/bin/bash\nmkdir -p /logs/verifier\n"
            f"if {check}; then echo 1; else echo 0; fi > /logs/verifier/reward.txt\n",
            **(files or {}),
        }
    )
    environment = folder / "environment"
    (environment / "tree/lib/tool").chmod(0o755)
    (environment / "tree/bin").mkdir()
    (environment / "tree/bin/tool").symlink_to("../lib/tool")
    (environment / "tree/gone").symlink_to("/app/tree/none")
    (environment / "tree/far").symlink_to("../../etc/passwd")
    (environment / "current").symlink_to("tree/lib")
    return folder
