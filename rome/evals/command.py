"""Anybody's agent, evaluated: a command in the sandbox of each task (`rome.agent.command`)."""

from __future__ import annotations

import dataclasses
import math

from envs.rock import SandboxConfig
from envs.sources import Task
from rome.agent.command import CommandAgent, CommandEpisode
from rome.agent.dialogue import Dialogue
from rome.agent.endpoint import ChatEndpoint, EndpointError
from rome.agent.forward import ForwardedDialogue
from rome.agent.loop import Limits
from rome.data.trajectory import Trajectory
from rome.evals.agents import Outcome, StartedEnv, play_in_environment
from rome.model.tokenizer import Chat


async def play_command(
    dialogue: Dialogue,
    command: CommandAgent,
    limits: Limits,
    config: SandboxConfig,
    task: Task,
    attempt: int,
    seed: int,
) -> Outcome:
    """Play one attempt at a task with a command whose calls `dialogue` answers.

    Args:
      dialogue: new, of this attempt.
      command: plays.
      limits: of the agent's own work.
      config: of the sandbox.
      task: is played.
      attempt: recorded in the transcript.
      seed: recorded in the transcript.
    """
    playing = CommandEpisode(dialogue, limits, command, seed=seed)
    config = dataclasses.replace(config, doors=playing.doors)

    async def play_episode(started: StartedEnv) -> Outcome:
        trajectory = await playing.play(started, shell=started.env, episode=attempt)
        outcome = outcome_of(started, trajectory)
        fault = playing.fault
        is_permanent = isinstance(fault, EndpointError) and fault.permanent
        return dataclasses.replace(outcome, permanent=outcome.permanent or is_permanent)

    return await play_in_environment(task, config, play_episode, math.inf)


def outcome_of(started: StartedEnv, trajectory: Trajectory) -> Outcome:
    """Return the outcome of an attempt whose record is a trajectory."""
    trajectory.task, trajectory.family = started.task.name, started.task.family
    tokens = {
        "prompt": sum(len(chunk.prompt_ids) for chunk in trajectory.chunks),
        "completion": trajectory.num_action_tokens,
    }
    outcome = started.outcome(trajectory.reward, trajectory.ending, trajectory.note)
    turns = len(trajectory.chunks)
    return dataclasses.replace(outcome, tokens=tokens, turns=turns, transcript=trajectory)


@dataclasses.dataclass
class ForwardedCommand:
    """A command whose calls an outside model answers.

    Attributes:
      endpoint: closed by `close`.
      chat: writes the record.
      command: plays.
      limits: of the agent's own work; tokens are the endpoint's affair.
      config: of the sandboxes.
      temperature: of sampling; not sent if None.
      max_tokens: of one answer; not sent if None.
      name: recorded with each attempt.
    """

    endpoint: ChatEndpoint
    chat: Chat
    command: CommandAgent
    limits: Limits
    config: SandboxConfig
    temperature: float | None = None
    max_tokens: int | None = None
    name: str = "command"

    async def play(self, task: Task, attempt: int, seed: int) -> Outcome:
        """Play one attempt; the tokens of its outcome are those that the endpoint bills."""
        dialogue = ForwardedDialogue(
            self.endpoint, self.chat, temperature=self.temperature, max_tokens=self.max_tokens
        )
        outcome = await play_command(
            dialogue, self.command, self.limits, self.config, task, attempt, seed
        )
        tokens = {name: dialogue.usage[name] for name in ("prompt", "completion")}
        return dataclasses.replace(outcome, tokens=tokens)

    async def close(self) -> None:
        """Close the connections to the endpoint."""
        await self.endpoint.close()
