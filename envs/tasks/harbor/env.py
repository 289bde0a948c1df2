"""A Harbor or Terminal-Bench 1 task as a GEM environment over a sandbox, embedded or of the Docker
backend.

A turn is what it is in the terminal curriculum.

The model sees the task's own paths (/app, /tests); `paths.py` says how they are kept below the
workspace. Handing in (a turn without a tool call) has the current step graded: then comes the next
step's instruction, or the end with the reward of all steps.
"""

from __future__ import annotations

import asyncio
import dataclasses
import pathlib
import shlex
import time
from collections.abc import Mapping
from typing import Any

from envs.gem import Info, StepResult
from envs.rock import CommandResult, Sandbox, SandboxConfig, SandboxFileError
from envs.rock.sync import run
from envs.tasks.harbor import offline
from envs.tasks.harbor.build import Built, egress_of
from envs.tasks.harbor.built import start_built
from envs.tasks.harbor.containers import build_image, enter
from envs.tasks.harbor.errors import BuildError, TaskError, UnsupportedError
from envs.tasks.harbor.grade import READ_TIMEOUT_SECONDS, Grade, clean_up, grade
from envs.tasks.harbor.load import line_of, load_task
from envs.tasks.harbor.separate import grade_apart
from envs.tasks.harbor.task import HarborTask, Healthcheck, Step
from envs.tasks.terminal.shell import ShellEnv

DEFAULT_MEMORY_MB = 1024
DEFAULT_DISK_MB = 256
SOLVE_TIMEOUT_SECONDS = 600.0  # for a reference solution where the agent's time is not limited
FINAL_TURN = "done"


class HarborEnv(ShellEnv):
    """Plays one task folder, whatever the seed.

    Its agent's time limit counts from reset, or from a step's instruction.
    """

    def __init__(
        self,
        task: HarborTask | str | pathlib.Path,
        sandbox_config: SandboxConfig | None = None,
        *,
        images: Mapping[str, tuple[str, ...]] | None = None,
        build_egress: tuple[str, ...] | None = None,
        seed: int = 0,
        max_turns: int = 40,
        command_timeout: float = 60.0,
        max_observation_chars: int = 4000,
        max_malformed: int = 3,
    ) -> None:
        """max_turns: of each step. images: see `build`. seed is taken because GEM's vectors give
        one.

        build_egress: what the steps of the build reach, as SandboxConfig.egress; () nothing. None:
        in containers all of the network, as in Harbor, and elsewhere what the task may. The agent
        and the tests never have more than the task grants.
        """
        self.task = task if isinstance(task, HarborTask) else load_task(task)
        super().__init__(max_turns, command_timeout, max_observation_chars, max_malformed)
        self._sandbox_config = sandbox_for(self.task, sandbox_config)
        self._settings = dict(
            sandbox_config=sandbox_config,
            images=images,
            build_egress=build_egress,
            seed=seed,
            max_turns=max_turns,
            command_timeout=command_timeout,
            max_observation_chars=max_observation_chars,
            max_malformed=max_malformed,
        )
        self._images = images
        self._build_egress = build_egress
        self.built: Built | None = None

    @property
    def name(self) -> str:
        return self.task.name

    @property
    def grading_seconds(self) -> float:
        builds = sum(
            step.verifier_environment.build_timeout
            for step in self.task.steps
            if step.verifier_environment
        )
        return (
            self._step.verifier_timeout
            + 3 * READ_TIMEOUT_SECONDS
            + sum(step.verifier_timeout for step in self.task.steps)
            + builds
        )

    def reset(self, seed: int | None = None) -> tuple[str, Info]:
        return run(self.areset(seed), self.task.environment.build_timeout + 120.0)

    def spawn(self, same_state: bool = False, **kwargs: Any) -> HarborEnv:
        """A new environment of the same task and settings.

        A running episode cannot be copied yet: same_state is refused.
        """
        if same_state:
            raise NotImplementedError(
                "a running episode cannot be copied; spawn(same_state=False) and reset"
            )
        return HarborEnv(**{"task": self.task, **self._settings, **kwargs})

    # -- the episode
    # ---------------------------------------------------------------------------------------------

    async def areset(self, seed: int | None = None) -> tuple[str, Info]:
        """Builds the task's environment in a fresh sandbox.

        Raises SandboxError, or a TaskError (UnsupportedError, BuildError) that names file and line.
        """
        await self.aclose()
        config = dataclasses.replace(self._sandbox_config, label=self.task.name)
        self._step_index = 0
        self._grades = []
        try:
            if config.backend == "docker":
                self._sandbox = Sandbox(
                    dataclasses.replace(
                        config, image=await build_image(self.task, config, self._build_egress)
                    )
                )
                await self._sandbox.start()
                self.built = await enter(self._sandbox, self.task)
            else:
                self._sandbox, self.built = await start_built(
                    self.task, config, self._images, self._build_egress
                )
            await self._healthy(self.task.environment.healthcheck)
            instruction = await self._enter_step()
        except BaseException:
            await self.aclose()
            raise
        self._begin()
        return instruction, {
            "task": self.task.name,
            "family": self.task.family,
            "seed": seed,
            "tools": self.tools,
            "notes": [*self.built.notes, *self.task.notes],
        }

    async def asolve(self) -> StepResult:
        """Plays the reference solution from here to the end, as the oracle.

        TaskError where the task has none.
        """
        while True:
            await self._run_solution(self._step)
            result = await self.astep(FINAL_TURN)
            if result[2] or result[3]:
                return result

    @property
    def _step(self) -> Step:
        return self.task.steps[self._step_index if self._sandbox else 0]

    async def _enter_step(self) -> str:
        """The step's files and its instruction.

        Its setup.sh runs in the working directory, and does not stay there.
        """
        step = self._step
        if step.setup:
            workdir = self.built.paths.place(self.built.workdir)
            await self._sandbox.write_files(
                {
                    f"{workdir}/{path}": content
                    for path, content in self.built.paths.scripts(step.setup).items()
                }
            )
            if "setup.sh" in step.setup:
                result = await self._sandbox.execute(
                    self.built.command("bash setup.sh && rm -f setup.sh"),
                    timeout=self.task.environment.build_timeout,
                    env=self.built.inner_env(),
                )
                if result.exit_code != 0:
                    raise BuildError(
                        self.task.path / "steps" / step.name / "workdir" / "setup.sh",
                        0,
                        f"ended with exit {result.exit_code}: {result.stderr[-300:]}",
                    )
        await self._healthy(step.healthcheck)
        self._step_began = time.monotonic()
        return step.instruction

    async def _healthy(self, check: Healthcheck | None) -> None:
        """Runs a health check until it succeeds. BuildError when it does not."""
        if check is None:
            return
        await asyncio.sleep(min(check.start_period, check.interval))
        for attempt in range(check.retries + 1):
            result = await self._sandbox.execute(
                self.built.command(check.command), timeout=check.timeout, env=self.built.inner_env()
            )
            if result.exit_code == 0:
                return
            if attempt < check.retries:
                await asyncio.sleep(check.interval)
        raise BuildError(
            self.task.path / "task.toml",
            line_of(self.task, "healthcheck", "command"),
            f"the health check failed {check.retries + 1} times: {check.command[:80]!r}",
        )

    async def _execute(self, command: str) -> CommandResult:
        limit = self._step.agent_timeout
        left = limit - (time.monotonic() - self._step_began) if limit else self._command_timeout
        result = await self._sandbox.execute(
            self.built.command(command),
            timeout=min(self._command_timeout, max(left, 0.1)),
            env=self.built.inner_env(),
        )
        return dataclasses.replace(
            result,
            stdout=self.built.paths.outward(result.stdout),
            stderr=self.built.paths.outward(result.stderr),
        )

    async def _observe(self, observation: str, info: Info) -> StepResult:
        limit = self._step.agent_timeout
        if limit and time.monotonic() - self._step_began >= limit:
            return await self._finish(await self._grade(), info, "timeout", observation)
        return await super()._observe(observation, info)

    async def _out_of_turns(self, observation: str, info: Info) -> StepResult:
        """What the agent did counts, though it did not hand it in."""
        return await self._finish(await self._grade(), info, "truncated_turns", observation)

    # -- grading
    # ---------------------------------------------------------------------------------------------

    async def _verify(self, info: Info) -> StepResult:
        graded = await self._grade()
        if self._step_index + 1 == len(self.task.steps) or not reaches(
            graded, self._step.min_reward
        ):
            return await self._finish(graded, info, "failure")
        await clean_up(self._sandbox)
        self._step_index += 1
        self._turns = 0
        try:
            instruction = await self._enter_step()
        except (
            BuildError,
            SandboxFileError,
        ) as error:  # the agent shares the world in which this ran, and could have filled it
            return await self._finish(graded, info, "failure", note=str(error))
        info.update(
            step=self._step.name,
            step_rewards=[one.reward for one in self._grades],
            test_output=graded.output,
        )
        return instruction, 0.0, False, False, info

    async def _grade(self) -> Grade:
        await self._sandbox.kill_all()
        for command in self._step.collect:
            await self._sandbox.execute(
                self.built.command(command),
                timeout=self._step.verifier_timeout,
                env=self.built.inner_env(),
            )
        if self._step.verifier_environment is None:
            graded = await grade(self._sandbox, self._step, self.built)
        else:
            given = self._settings["sandbox_config"]
            graded = await grade_apart(
                self._sandbox,
                self.task,
                self._step,
                self.built,
                lambda task: sandbox_for(task, given),
                self._images,
                self._build_egress,
            )
        self._grades.append(graded)
        return graded

    async def _finish(
        self, graded: Grade, info: Info, ending: str, observation: str = "", note: str = ""
    ) -> StepResult:
        """The episode's end. `ending` is what it is called unless the reward is 1."""
        rewards = [one.reward for one in self._grades]
        reward = combine(rewards, len(self.task.steps), self.task.reward_strategy)
        info.update(step_rewards=rewards, test_output=graded.output)
        return await self._end(
            "success" if reward == 1.0 else ending,
            info,
            observation,
            reward,
            truncated=ending == "truncated_turns",
            note=note or graded.note,
        )

    async def _run_solution(self, step: Step) -> None:
        if step.solve_script is None:
            raise TaskError(
                self.task.path,
                0,
                f"step {step.name!r} of {self.name} has no reference solution that could be run",
            )
        script = step.solution[step.solve_script][0].decode(errors="replace")
        if not self._sandbox_config.egress and (need := offline.network_need(script)):
            raise UnsupportedError(
                self.task.path / "solution" / step.solve_script,
                need[0],
                f"`{need[1]}` needs the network, and the embedded sandbox has none",
            )
        place = self.built.paths.place("/solution")
        await self._sandbox.write_files(
            {
                f"{place}/{path}": content
                for path, content in self.built.paths.scripts(
                    step.solution, everything=True
                ).items()
            }
        )
        env = {
            **self.built.inner_env(),
            **{name: self.built.paths.inward(value) for name, value in step.solution_env.items()},
        }
        result = await self._sandbox.execute(
            self.built.command(f"bash /solution/{shlex.quote(step.solve_script)}"),
            timeout=step.agent_timeout or SOLVE_TIMEOUT_SECONDS,
            env=env,
        )
        await self._sandbox.execute(f"rm -rf {shlex.quote(place)}")
        self.solution_result = result


def sandbox_for(task: HarborTask, config: SandboxConfig | None) -> SandboxConfig:
    """The limits that the task asks for, in a sandbox isolated as the config says; all of the
    config where it sets its own limits.
    """
    config = config or SandboxConfig()
    plain = SandboxConfig()
    config = dataclasses.replace(config, egress=egress_of(task, config.egress))
    if (config.memory_mb, config.disk_mb, config.pids) != (
        plain.memory_mb,
        plain.disk_mb,
        plain.pids,
    ):
        return config
    memory = max(task.environment.memory_mb or DEFAULT_MEMORY_MB, 128)
    disk = min(
        task.environment.storage_mb or DEFAULT_DISK_MB, DEFAULT_DISK_MB, memory // 2
    )  # files are kept in memory
    return dataclasses.replace(
        config,
        memory_mb=memory,
        disk_mb=disk,
        cpus=task.environment.cpus or config.cpus,
        pids=256,
        inodes=32_768,
    )


def reaches(graded: Grade, least: float | Mapping[str, float] | None) -> bool:
    """Whether a step's reward lets the next one begin."""
    if least is None:
        return True
    if isinstance(least, Mapping):
        return all(graded.rewards.get(key, 0.0) >= limit for key, limit in least.items())
    return graded.reward >= least


def combine(rewards: list[float], steps: int, strategy: str) -> float:
    """The episode's reward.

    A step that was not reached counts 0, so that giving up early never pays.
    """
    filled = rewards + [0.0] * (steps - len(rewards))
    return filled[-1] if strategy == "final" else sum(filled) / steps
