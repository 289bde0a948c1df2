"""A Harbor or Terminal-Bench 1 task as a GEM environment over a sandbox of any backend.

A turn works as in the terminal curriculum. The model sees the task's own paths (/app, /tests);
`paths.py` says where they are in the workspace. A turn without a tool call hands in the work: the
current step is graded, and then comes the next step's instruction, or the end with the reward of
all steps.
"""

from __future__ import annotations

import asyncio
import dataclasses
import pathlib
import random
import shlex
from collections.abc import Mapping
from typing import Any

from envs.gem import Info, StepResult
from envs.gem.episode import Script
from envs.rock import (
    CommandResult,
    Job,
    Sandbox,
    SandboxConfig,
    SandboxError,
    SandboxFileError,
)
from envs.rock.sync import run
from envs.tasks.harbor import toolchain
from envs.tasks.harbor.build_cache import start_built
from envs.tasks.harbor.containers import build_image, enter
from envs.tasks.harbor.environment import Built, execution, limit_notes, sandbox_for
from envs.tasks.harbor.errors import BuildError, TaskError, UnsupportedError
from envs.tasks.harbor.grade import READ_TIMEOUT_SECONDS, Grade, clean_up, grade
from envs.tasks.harbor.installs import needs_of
from envs.tasks.harbor.load import line_of, load_task
from envs.tasks.harbor.preflight import refuse_tests_that_fetch, refuse_tests_without_tools
from envs.tasks.harbor.reference import fault_of, find_reference, is_doubtful
from envs.tasks.harbor.separate import grade_apart
from envs.tasks.harbor.solution import (
    FINAL_TURN,
    SOLVE_TIMEOUT_SECONDS,
    is_one_command,
    reference_seconds,
    say_solution,
)
from envs.tasks.harbor.task import Files, HarborTask, Healthcheck, Step
from envs.tasks.terminal.shell import ShellEnv


class HarborEnv(ShellEnv):
    """An environment that plays one task folder, whatever the seed.

    The agent's time limit is for its commands in a step: how long a model thinks is bounded by
    tokens, because the load of its engine is not its doing.
    """

    def __init__(
        self,
        task: HarborTask | str | pathlib.Path,
        sandbox_config: SandboxConfig | None = None,
        *,
        images: Mapping[str, tuple[str, ...]] | None = None,
        build_egress: tuple[str, ...] | None = None,
        verifier_egress: tuple[str, ...] = (),
        seed: int = 0,
        max_turns: int = 40,
        command_timeout: float = 60.0,
        max_observation_chars: int = 4000,
        max_malformed: int = 3,
    ) -> None:
        """Make the environment of a task.

        Args:
          task: the task, or the path to its folder.
          sandbox_config: isolation, backend and grants; see `sandbox_for` for its limits.
          images: see `build`.
          build_egress: the hosts that build steps may reach, in the form of SandboxConfig.egress;
            () for none. None: in containers the whole network, as in Harbor, elsewhere what the
            task may reach. The agent never reaches more than the task grants.
          verifier_egress: hosts that the tests may reach besides, to install what they need
            themselves. They run in a copy of the agent's sandbox then.
          seed: ignored; GEM's vectors pass one.
          max_turns: the turns of each step.
          command_timeout: seconds for one command.
          max_observation_chars: the length of an observation.
          max_malformed: the episode ends after so many malformed calls in a row.
        """
        self.task = task if isinstance(task, HarborTask) else load_task(task)
        super().__init__(max_turns, command_timeout, max_observation_chars, max_malformed)
        self._sandbox_config = sandbox_for(self.task, sandbox_config)
        self._settings = {
            "sandbox_config": sandbox_config,
            "images": images,
            "build_egress": build_egress,
            "verifier_egress": verifier_egress,
            "seed": seed,
            "max_turns": max_turns,
            "command_timeout": command_timeout,
            "max_observation_chars": max_observation_chars,
            "max_malformed": max_malformed,
        }
        self._images = images
        self._build_egress = build_egress
        self._verifier_egress = verifier_egress
        self.built: Built | None = None
        self._is_reference = False

    @property
    def name(self) -> str:
        """Return the task's name."""
        return self.task.name

    @property
    def grading_seconds(self) -> float:
        """Return the time that grading may take, with a reference solution to compare with."""
        seconds = self._step.verifier_timeout + 3 * READ_TIMEOUT_SECONDS
        return seconds + reference_seconds(self.task)

    def folder(self, kind: str) -> str:
        """Return a folder of the running episode as a path in its workspace; see `ShellEnv`."""
        if self.built is None:
            raise SandboxError(f"there is no running episode of {self.name}; call reset()")
        return self.built.paths.place("/root" if kind == "home" else self.built.workdir)

    def reset(self, seed: int | None = None) -> tuple[str, Info]:
        """Start an episode; the synchronous form of `areset`."""
        return run(self.areset(seed), self.task.environment.build_timeout + 120.0)

    def spawn(self, same_state: bool = False, **kwargs: Any) -> HarborEnv:
        """Return a new environment of the same task and settings.

        Raises:
          NotImplementedError: same_state, because a running episode cannot be copied yet.
        """
        if same_state:
            raise NotImplementedError(
                "a running episode cannot be copied; spawn(same_state=False) and reset"
            )
        return HarborEnv(**{"task": self.task, **self._settings, **kwargs})

    # -- Episode
    # ---------------------------------------------------------------------------------------------

    async def areset(self, seed: int | None = None) -> tuple[str, Info]:
        """Build the task's environment in a fresh sandbox and return the first instruction.

        Raises:
          SandboxError: no sandbox could be started.
          TaskError: the environment cannot be built (UnsupportedError, BuildError); names file and
            line.
        """
        await self.aclose()
        config = dataclasses.replace(self._sandbox_config, label=self.task.name)
        self._step_index = 0
        self._grades = []
        try:
            await self._start(config)
            await self._healthy(self.task.environment.healthcheck)
            instruction = await self._enter_step()
        except BaseException:
            await self.aclose()
            raise
        self._begin()
        self._worked_before_step = 0.0
        return instruction, {
            "task": self.task.name,
            "family": self.task.family,
            "seed": seed,
            "tools": self.tools,
            "notes": [
                *self.built.notes,
                *self.task.notes,
                *limit_notes(self.task, self._sandbox_config),
            ],
        }

    async def _start(self, config: SandboxConfig) -> None:
        """Start the sandbox and build the task's environment in it."""
        if config.backend == "docker":
            if not self._real_installs:
                refuse_tests_that_fetch(self.task)
            image = await build_image(self.task, config, self._build_egress)
            self._sandbox = Sandbox(dataclasses.replace(config, image=image))
            await self._sandbox.start()
            self.built = await enter(self._sandbox, self.task)
            self.built.notes += await refuse_tests_without_tools(
                self._sandbox, self.task, self.built, self._real_installs
            )
        else:
            self._sandbox, self.built = await start_built(
                self.task, config, self._images, self._build_egress, self._verifier_egress
            )

    def demonstration(self, rng: random.Random, error_rate: float = 0.0) -> Script:
        """Return the reference solution as turns: each step's script as one command, then its end.

        It makes no mistakes.

        Raises:
          NotImplementedError: the task has no solution in that form, see `is_one_command`.
        """
        if not is_one_command(self.task):
            raise NotImplementedError(f"the solution of {self.name} is no single command a step")
        return say_solution(self.task)

    async def asolve(self) -> StepResult:
        """Play the reference solution to the end, as the oracle.

        Raises:
          TaskError: the task has no reference solution.
        """
        while True:
            await self._run_solution(self._step)
            result = await self.astep(FINAL_TURN)
            _, _, terminated, truncated, _ = result
            if terminated or truncated:
                return result

    @property
    def _step(self) -> Step:
        return self.task.steps[self._step_index if self._sandbox else 0]

    async def _enter_step(self) -> str:
        """Write the step's files, run and remove its setup.sh, and return its instruction."""
        step = self._step
        if step.setup:
            await self._write(self.built.workdir, self.built.paths.scripts(step.setup))
            if "setup.sh" in step.setup:
                await self._run_setup(step)
        await self._healthy(step.healthcheck)
        self._worked_before_step = self._seconds_worked
        return step.instruction

    async def _write(self, folder: str, files: Files) -> None:
        """Write files below one of the task's folders."""
        place = self.built.paths.place(folder)
        await self._sandbox.write_files(
            {f"{place}/{path}": content for path, content in files.items()}
        )

    async def _run_setup(self, step: Step) -> None:
        command = f"chmod +x setup.sh && {execution('./setup.sh', step.setup['setup.sh'][0])}"
        result = await self._sandbox.execute(
            self.built.command(f"{command} && rm -f setup.sh"),
            timeout=self.task.environment.build_timeout,
            env=self.built.inner_env(),
        )
        if result.exit_code != 0:
            raise BuildError(
                self.task.path / "steps" / step.name / "workdir" / "setup.sh",
                0,
                f"ended with exit {result.exit_code}: {result.stderr[-300:]}",
            )

    async def _healthy(self, check: Healthcheck | None) -> None:
        """Repeat a health check until it succeeds. Raises BuildError when it does not."""
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
        timeout = self._command_timeout
        if limit:
            timeout = min(timeout, max(limit - self._seconds_of_step(), 0.1))
        result = await self._sandbox.execute(
            self.built.command(command), timeout=timeout, env=self.built.inner_env()
        )
        return dataclasses.replace(
            result,
            stdout=self.built.paths.outward(result.stdout),
            stderr=self.built.paths.outward(result.stderr),
        )

    async def _spawn(self, command: str, env: Mapping[str, str], timeout: float) -> Job:
        whole = {**self.built.inner_env(), **env}
        return await self._sandbox.spawn(self.built.command(command), timeout=timeout, env=whole)

    def _seconds_of_step(self) -> float:
        """Return how long commands of this step have run."""
        return self._seconds_worked - self._worked_before_step

    async def _observe(self, observation: str, info: Info) -> StepResult:
        limit = self._step.agent_timeout
        if limit and self._seconds_of_step() >= limit:
            return await self._grade(info, observation, cut="timeout")
        return await super()._observe(observation, info)

    # -- Grading
    # ---------------------------------------------------------------------------------------------

    async def _verify(self, info: Info, observation: str = "", cut: str = "") -> StepResult:
        graded = await self._grade_step()
        if cut:
            return await self._finish(graded, info, cut, observation)
        is_last = self._step_index + 1 == len(self.task.steps)
        if is_last or graded.fault or not reaches(graded, self._step.min_reward):
            return await self._finish(graded, info, "failure")
        await clean_up(self._sandbox)
        self._step_index += 1
        self._turns = 0
        try:
            instruction = await self._enter_step()
        except (BuildError, SandboxFileError) as error:
            # The agent shares the sandbox in which this ran and could have filled it.
            return await self._finish(graded, info, "failure", note=str(error))
        info.update(
            step=self._step.name,
            step_rewards=[one.reward for one in self._grades],
            test_output=graded.output,
        )
        return instruction, 0.0, False, False, info

    async def _grade_step(self) -> Grade:
        await self._sandbox.kill_all()
        for command in self._step.collect:
            await self._sandbox.execute(
                self.built.command(command),
                timeout=self._step.verifier_timeout,
                env=self.built.inner_env(),
            )
        if self._step.verifier_environment is None:
            graded = await self._grade_shared()
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
        if is_doubtful(graded) and not self._is_reference:
            graded = await self._compared(graded)
        self._grades.append(graded)
        return graded

    async def _compared(self, graded: Grade) -> Grade:
        """Return a doubtful grade, with its fault where it is not the agent's."""
        settings = {name: self._settings[name] for name in self._settings if name != "seed"}
        reference = await find_reference(
            self.task,
            repr(settings),
            self._real_installs or self._step.verifier_environment is not None,
            self._play_reference,
        )
        fault = fault_of(graded, reference, self._step, self._step_index)
        return dataclasses.replace(graded, fault=fault)

    async def _play_reference(self) -> tuple[list[Grade], bool]:
        """Return the grades of the reference solution in an environment that no agent has touched.

        Where there is none, or none that could be run here, they are those of doing nothing.

        Raises:
          SandboxError: a fault of the machine, also where the environment could not be built again.
        """
        has_solution = all(step.solve_script is not None for step in self.task.steps)
        for is_solution in (True, False) if has_solution else (False,):
            env = self.spawn()
            env._is_reference = True
            try:
                await env.areset()
                await (env.asolve() if is_solution else env.astep(FINAL_TURN))
                return env._grades, is_solution
            except UnsupportedError as error:
                if not is_solution:
                    raise SandboxError(f"an untouched environment: {error}") from error
            except TaskError as error:
                raise SandboxError(f"an untouched environment: {error}") from error
            finally:
                await env.aclose()
        raise AssertionError("the untouched environment was graded, or an error was raised")

    @property
    def _real_installs(self) -> bool:
        return bool(self._sandbox_config.egress or self._verifier_egress)

    async def _grade_shared(self) -> Grade:
        """Run the tests on the agent's files, in its sandbox or in a copy with more network."""
        if not self._verifier_egress:
            return await grade(self._sandbox, self._step, self.built, self._real_installs)
        egress = (*self._sandbox_config.egress, *self._verifier_egress)
        snapshot = await self._sandbox.snapshot()
        try:
            config = dataclasses.replace(self._sandbox.config, egress=egress)
            async with Sandbox(config, snapshot) as copy:
                return await grade(copy, self._step, self.built, self._real_installs)
        finally:
            await snapshot.delete()

    async def _finish(
        self, graded: Grade, info: Info, ending: str, observation: str = "", note: str = ""
    ) -> StepResult:
        """End the episode; a "failure" with the full reward is a success."""
        rewards = [one.reward for one in self._grades]
        reward = combine(rewards, len(self.task.steps), self.task.reward_strategy)
        info.update(step_rewards=rewards, test_output=graded.output)
        if graded.fault:
            info["permanent"] = True  # another attempt would end in the same way
            return await self._end("infra_verifier", info, observation, note=graded.fault)
        return await self._end(
            "success" if ending == "failure" and reward == 1.0 else ending,
            info,
            observation,
            reward,
            truncated=ending.startswith("truncated"),
            note=note or graded.note,
        )

    async def _run_solution(self, step: Step) -> None:
        if step.solve_script is None:
            raise TaskError(
                self.task.path,
                0,
                f"step {step.name!r} of {self.name} has no reference solution that could be run",
            )
        content = step.solution[step.solve_script][0]
        await self._refuse_solution_without_tools(step, content.decode(errors="replace"))
        paths = self.built.paths
        files = paths.scripts(step.solution, everything=True)
        files[step.solve_script] = (files[step.solve_script][0], 0o755)
        files[".shims.tar"] = (toolchain.shims(self._real_installs), 0o644)
        await self._write("/solution", files)
        place = paths.place("/solution")
        first = b"" if step.parser == "pytest" else content  # as for the tests, see grade.py
        own = {name: paths.inward(value) for name, value in step.solution_env.items()}
        result = await self._sandbox.execute(
            self._with_shims(place)
            + self.built.command(execution(f"/solution/{step.solve_script}", first)),
            timeout=step.agent_timeout or SOLVE_TIMEOUT_SECONDS,
            env={**self.built.inner_env(), **own},
        )
        await self._sandbox.execute(f"rm -rf {shlex.quote(place)}")
        self.solution_result = result

    def _with_shims(self, place: str) -> str:
        """Return shell text that puts the stand-ins of toolchain.py before all programs."""
        folder = shlex.quote(f"{place}/.shims")
        archive = shlex.quote(f"{place}/.shims.tar")
        root = shlex.quote(self.built.paths.place("/root"))
        laid = toolchain.lay(folder, archive, root, '"$PATH"')
        return f"{laid}export ROCK_PATH ROCK_ROOT ROCK_PYTHON PATH={folder}:$PATH\n"

    async def _refuse_solution_without_tools(self, step: Step, script: str) -> None:
        needs = needs_of(script)
        if self._real_installs:
            needs = [need for need in needs if need.kind == "system"]
        path = self.built.inner_env()["PATH"]
        missing, _ = await toolchain.find_missing(
            self._sandbox, needs, by_verifier=False, path=path
        )
        if missing is not None:
            is_container = self._sandbox_config.backend == "docker"
            raise UnsupportedError(
                self.task.path / "solution" / step.solve_script,
                missing.need.line,
                toolchain.explain(missing, "the solution", "", is_container),
            )


def reaches(graded: Grade, least: float | Mapping[str, float] | None) -> bool:
    """Return whether a step's reward lets the next step begin."""
    if least is None:
        return True
    if isinstance(least, Mapping):
        return all(graded.rewards.get(key, 0.0) >= limit for key, limit in least.items())
    return graded.reward >= least


def combine(rewards: list[float], steps: int, strategy: str) -> float:
    """Combine the rewards of the steps into the episode's reward.

    A step that was not reached counts 0, so giving up early never pays.
    """
    filled = rewards + [0.0] * (steps - len(rewards))
    return filled[-1] if strategy == "final" else sum(filled) / steps
