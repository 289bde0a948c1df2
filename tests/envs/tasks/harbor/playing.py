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
