"""Arguments that no sandbox can serve are refused by name, and end nothing."""

import asyncio
import math

import pytest

from envs.rock import Sandbox, SandboxConfig, SandboxFileError, probe

SECONDS = [math.inf, -math.inf, math.nan, 0, -1, 1e9, 30 * 24 * 3600.0]
SURROGATE = "\ud800"  # no name of a file: neither UTF-8 nor an undecodable byte
CALLS = [
    lambda sandbox, value: sandbox.execute("true", timeout=value),
    lambda sandbox, value: sandbox.spawn("true", timeout=value),
    lambda sandbox, value: sandbox.verify("true", timeout=value),
    lambda sandbox, value: run_in_session(sandbox, value),
]


@pytest.fixture(params=["namespaces", "landlock"])
def config(request):
    if (report := probe(tier=request.param)).tier is None:
        pytest.skip(f"no {request.param} tier here: {report.missing[0].reason}")
    return SandboxConfig(isolation="best_available", tier=request.param)


async def run_in_session(sandbox: Sandbox, timeout: float):
    async with await sandbox.create_session() as session:
        return await session.run("true", timeout=timeout)


def inside(config: SandboxConfig, work):
    """Run `work(sandbox)` and then a command, which must still be possible."""

    async def run():
        async with Sandbox(config) as sandbox:
            await work(sandbox)
            return (await sandbox.execute("echo alive")).stdout

    assert asyncio.run(asyncio.wait_for(run(), 180)) == "alive\n"


@pytest.mark.parametrize("call", CALLS, ids=["execute", "spawn", "verify", "session"])
def test_a_time_limit_that_is_none_is_refused_by_name(config, call):
    async def work(sandbox):
        for value in SECONDS:
            with pytest.raises(ValueError, match=f"timeout is {value}"):
                await call(sandbox, value)

    inside(config, work)


@pytest.mark.parametrize("name", ["timeout", "start_timeout"])
@pytest.mark.parametrize("value", SECONDS)
def test_a_config_with_such_a_time_limit_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        SandboxConfig(**{name: value})


def test_the_longest_time_limit_is_served(config):
    inside(config, lambda sandbox: sandbox.execute("true", timeout=7 * 24 * 3600.0))


@pytest.mark.parametrize("path", [SURROGATE, f"a/{SURROGATE}b", "\udfff"])
def test_a_path_that_no_file_can_have_is_refused_by_name(config, path):
    async def work(sandbox):
        for call in (
            sandbox.read_file(path),
            sandbox.write_file(path, b"x"),
            sandbox.list_files(path),
        ):
            with pytest.raises(SandboxFileError, match="surrogate"):
                await call

    inside(config, work)


@pytest.mark.parametrize("path", ["x" * 300_000, "d/" * 3000 + "f", "\u00e9" * 2500])
def test_a_path_that_is_too_long_is_an_error_of_the_file(config, path):
    async def work(sandbox):
        with pytest.raises(SandboxFileError):
            await sandbox.write_file(path, b"x")

    inside(config, work)


def test_a_path_of_undecodable_bytes_is_a_path_like_any_other(config):
    async def work(sandbox):
        await sandbox.write_file("\udcff", b"x")
        assert await sandbox.read_file("\udcff") == b"x"

    inside(config, work)


@pytest.mark.parametrize("env", [{"A": SURROGATE}, {SURROGATE: "1"}, {"A": "x" * 300_000}])
def test_variables_that_cannot_be_passed_are_refused_by_name(config, env):
    async def work(sandbox):
        with pytest.raises(ValueError, match="environment"):
            await sandbox.execute("true", env=env)

    inside(config, work)
    with pytest.raises(ValueError, match="environment"):
        SandboxConfig(env=env)


def test_many_variables_that_are_too_large_together_are_refused(config):
    env = {f"V{number}": "\u00e9" * 1000 for number in range(100)}
    inside(config, lambda sandbox: sandbox.execute("true", env=dict(list(env.items())[:10])))
    with pytest.raises(ValueError, match="environment"):
        SandboxConfig(env=env)


@pytest.mark.parametrize("name", [SURROGATE, "a" * 300])
def test_a_verifiers_file_that_cannot_be_made_is_refused_by_name(config, name):
    async def work(sandbox):
        with pytest.raises(ValueError, match="verifier files"):
            await sandbox.verify("true", files={name: b""})

    inside(config, work)
