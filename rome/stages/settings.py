"""What a config asks for, as the objects that a stage is made of."""

from __future__ import annotations

import os
import pathlib
from typing import Any

import ml_collections

from envs.rock import SandboxConfig
from rome.agent.command import CommandAgent, CommandError
from rome.agent.iflow.episode import IFlowAgent, IFlowError
from rome.agent.proxy import Budget
from rome.losses import LossConfig, find_loss
from rome.model.config import ModelConfig
from rome.model.lora import Lora, find_targets
from rome.stages.schema import kind_of
from rome.train.workdir import ConfigError

TOKEN = "ROCK_TOKEN"  # environment variable with the token of a ROCK admin


def sandbox_config(config: ml_collections.ConfigDict) -> SandboxConfig:
    """Return the sandbox of an episode.

    The token of a ROCK admin is read from the environment, so that no file of a run holds it.

    Raises:
      ValueError: for options that contradict each other, or a missing token.
    """
    sandbox = config.sandbox
    tools = pathlib.Path(sandbox.verifier_tools).expanduser()
    token = os.environ.get(TOKEN, "") if sandbox.backend == "remote" else ""
    if sandbox.backend == "remote" and not token:
        raise ValueError(
            f"backend='remote' needs the admin's token in the environment variable {TOKEN}"
        )
    optional: dict[str, Any] = {}
    if sandbox.disk_mb:
        optional["disk_mb"] = sandbox.disk_mb
    if sandbox.verifier_tools and tools.is_dir():
        optional["verifier_tools"] = str(tools)
    return SandboxConfig(
        backend=sandbox.backend,
        image=sandbox.image or None,
        url=sandbox.url,
        token=token,
        isolation=sandbox.isolation,
        memory_mb=sandbox.memory_mb,
        pids=sandbox.pids,
        egress=tuple(sandbox.egress.split()),
        **optional,
    )


def command_agent(config: ml_collections.ConfigDict) -> CommandAgent | None:
    """Return the command that plays the policy's episodes; None where something else does.

    Raises:
      ConfigError: config.agent is unknown, or its command or files cannot be used.
    """
    agent = config.get("agent", "plain")  # sft and cpt have none
    if agent in ("plain", "iflow"):
        return None
    kind, colon, command = agent.partition(":")
    if kind != "command" or not colon:
        raise ConfigError(
            f"agent={agent!r} is unknown. Choose plain, iflow, or command:COMMAND, which runs in"
            " the sandbox of each task."
        )
    if config.rollout.resampling != "off":
        raise ConfigError(
            f"rollout.resampling={config.rollout.resampling} repeats the turns of an episode, and"
            " what a command does between them is not known. Set it to off, or agent=plain."
        )
    try:
        budget = Budget(calls=config.chunks_per_row)  # no trajectory is cut
        return CommandAgent(command, config.agent_files, config.agent_idle_seconds, budget)
    except CommandError as error:
        raise ConfigError(str(error)) from error


def iflow_agent(config: ml_collections.ConfigDict) -> IFlowAgent | None:
    """Return the iFlow agent that plays the policy's episodes; None where something else does.

    Raises:
      ConfigError: it cannot play with these settings.
    """
    if config.get("agent", "plain") != "iflow":
        return None
    if config.rollout.resampling != "off":
        raise ConfigError(
            f"rollout.resampling={config.rollout.resampling} begins in the middle of an episode,"
            " which agent=iflow does not. Set it to off, or agent=plain."
        )
    try:
        return IFlowAgent(
            tools=tuple(config.iflow.tools.split()),
            compaction=config.iflow.compaction,
            answers=config.chunks_per_row,  # no trajectory is cut
        )
    except IFlowError as error:
        raise ConfigError(str(error)) from error


def loss_config(config: ml_collections.ConfigDict) -> LossConfig:
    """Return the switches of the config's loss; 0 is replaced by the value of the loss' paper."""
    spec = find_loss(config.loss)
    if spec.likelihood:
        return LossConfig()
    switches = {name: config[name] or published for name, published in spec.published.items()}
    return LossConfig(
        norm=config.norm,
        mismatch_mask=config.mismatch_mask,
        lambda_rl=config.lambda_rl,
        lambda_il=imitation_weight(config),
        token_constant=config.max_context,
        **switches,
    )


def lora_of(config: ml_collections.ConfigDict, model_config: ModelConfig) -> Lora | None:
    """Return the adapters that a config trains on a model; None where it trains all weights.

    Raises:
      ConfigError: lora.targets names nothing that the model has.
    """
    lora = config.lora
    if not lora.rank:
        return None
    try:
        targets = find_targets(lora.targets, model_config)
    except ValueError as error:
        raise ConfigError(f"{error}.") from None
    return Lora(lora.rank, lora.alpha, targets)


def updates_of_step(config: ml_collections.ConfigDict) -> tuple[int, int]:
    """Return the minibatches and the epochs of a step; SFT and CPT make one update of each step."""
    if kind_of(config.loss) != "rl":
        return 1, 1
    return config.minibatches, config.epochs


def passes_of_step(config: ml_collections.ConfigDict, *, balances_experts: bool) -> dict[str, int]:
    """Return how often a step runs the learner's programs over each micro-batch.

    Args:
      config: of an experiment. Its micro-batches are taken to be of one version each, and several
        for each update.
      balances_experts: whether the loss has a balance term, which needs the step's counts.

    Returns:
      "score": forward passes, for pi_old or to count the choices of experts; "accumulate": forward
      and backward.
    """
    _, epochs = updates_of_step(config)
    scores = config.get("logp_old_from") == "trainer"  # and counts in the same pass
    counts = 0 if scores or not balances_experts else epochs
    return {"score": int(scores) + counts, "accumulate": epochs}


def profiled_steps(config: ml_collections.ConfigDict) -> tuple[int, int] | None:
    """Return the first and the last step that are profiled; None: none are.

    Raises:
      ConfigError: where profile_steps is not understood.
    """
    text = config.profile_steps
    if not text:
        return None
    first, colon, last = text.partition(":")
    if colon and first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last):
        return int(first), int(last)
    raise ConfigError(
        f"profile_steps={text!r} is no range of steps. Give the first and the last one, counted"
        " from 1, as in 3:5, or nothing."
    )


def imitation_weight(config: ml_collections.ConfigDict) -> float:
    """Return lambda_il of a policy loss; -1 is replaced by the value of the loss' paper."""
    return find_loss(config.loss).lambda_il if config.lambda_il == -1 else config.lambda_il


def split_urls(text: str) -> list[str]:
    """Return the URLs of a comma-separated list."""
    return [part.strip() for part in text.split(",") if part.strip()]
