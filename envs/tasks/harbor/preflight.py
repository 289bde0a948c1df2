"""Refuses tasks whose tests need what their sandbox lacks, before anyone plays them."""

from __future__ import annotations

import pathlib

from envs.rock import Sandbox
from envs.tasks.harbor.environment import Built
from envs.tasks.harbor.errors import UnsupportedError
from envs.tasks.harbor.grade import path_of_tests
from envs.tasks.harbor.installs import Need, needs_of
from envs.tasks.harbor.task import HarborTask, Step
from envs.tasks.harbor.toolchain import DEFAULT_TOOLS, Missing, explain, find_missing


def refuse_tests_that_fetch(task: HarborTask) -> None:
    """Refuse tests that fetch from the network more than packages.

    Tests in an environment of their own are asked, too, unless it may reach hosts.

    Raises:
      UnsupportedError: names the line of the script.
    """
    for step in task.steps:
        own = step.verifier_environment
        if own and step.networks.get("verifier", (own.network_mode, own.allowed_hosts))[1]:
            continue
        for need in _needs(step):
            if need.kind == "network":
                message = explain(Missing(need), "the tests", "", is_container=False)
                raise UnsupportedError(_script(task, step), need.line, message)


async def refuse_tests_without_tools(
    sandbox: Sandbox, task: HarborTask, built: Built, real_installs: bool
) -> list[str]:
    """Refuse tests that name packages which they will not find.

    Args:
      sandbox: where they will run.
      task: theirs.
      built: its environment.
      real_installs: whether they reach what Python's installers fetch from.

    Returns:
      Notes about packages of another version than the tests ask for.

    Raises:
      UnsupportedError: says what is missing, with the line of the script and the remedy.
      SandboxError: a fault of the machine.
    """
    notes: list[str] = []
    for step in _shared_steps(task):
        needs = [need for need in _needs(step) if not real_installs or need.kind == "system"]
        missing, other_versions = await find_missing(
            sandbox, needs, by_verifier=True, path=path_of_tests(built)
        )
        if missing is not None:
            config = sandbox.config
            message = explain(
                missing,
                "the tests",
                config.verifier_tools or DEFAULT_TOOLS,
                is_container=config.backend == "docker",
            )
            raise UnsupportedError(_script(task, step), missing.need.line, message)
        notes += other_versions
    return notes


async def refuse_own_tests_without_tools(
    sandbox: Sandbox, task: HarborTask, step: Step, built: Built
) -> None:
    """Refuse tests in an environment of their own whose image lacks what they install.

    Raises:
      UnsupportedError: says what is missing.
      SandboxError: a fault of the machine.
    """
    needs = [] if sandbox.config.egress else _needs(step)
    missing, _ = await find_missing(sandbox, needs, by_verifier=False, path=path_of_tests(built))
    if missing is not None:
        message = explain(missing, "the tests", "", sandbox.config.backend == "docker")
        raise UnsupportedError(_script(task, step), missing.need.line, message)


def _shared_steps(task: HarborTask) -> list[Step]:
    """Return the steps whose tests run in the agent's sandbox; others bring their own image."""
    return [step for step in task.steps if step.verifier_environment is None]


def _needs(step: Step) -> list[Need]:
    text = step.tests[step.test_script][0].decode(errors="replace")
    return needs_of(text, {name: content for name, (content, _) in step.tests.items()})


def _script(task: HarborTask, step: Step) -> pathlib.Path:
    folder = task.path / "tests" if step.test_script == "test.sh" else task.path
    return folder / step.test_script
