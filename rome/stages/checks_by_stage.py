"""Checks of a config that only CPT and SFT need; rome.stages.config calls them."""

from __future__ import annotations

import pathlib

import ml_collections

from rome.data.mixture import parse_mixture
from rome.data.relevance import parse_masks
from rome.stages.schema import kind_of, load_config
from rome.train.workdir import ConfigError, experiment_before


def check_rows(config: ml_collections.ConfigDict) -> None:
    """Refuse rows that micro-batches do not divide.

    Raises:
      ConfigError: they do not.
    """
    if config.rows % config.rows_per_microbatch:
        raise ConfigError(
            f"rows={config.rows} is not a multiple of"
            f" rows_per_microbatch={config.rows_per_microbatch}. Change one of them."
        )


def check_cpt(config: ml_collections.ConfigDict) -> None:
    """Refuse what continual pre-training cannot run.

    Raises:
      ConfigError: it names the keys and what to set.
    """
    if config.row_length < 2 or config.held_out_share >= 1:
        raise ConfigError(
            f"row_length={config.row_length} must be 2 or more,"
            f" held_out_share={config.held_out_share} below 1. Change them."
        )
    try:
        parse_mixture(config.text or "stdlib")
    except ValueError as error:
        raise ConfigError(f"config.text: {error}") from None
    before = experiment_before(config.init_from)
    if (
        before is not None
        and kind_of(load_config(before[0], before[1] or config.preset).loss) != "cpt"
    ):
        raise ConfigError(
            f"init_from={config.init_from!r}: CPT comes first and runs no other kind of training"
            " before it. Name an experiment of experiments/cpt.py, a Hugging Face directory (a run"
            " leaves one in final/), or nothing."
        )


def check_sft(config: ml_collections.ConfigDict) -> None:
    """Refuse what supervised fine-tuning cannot run.

    Raises:
      ConfigError: it names the keys and what to set.
    """
    try:
        parse_masks(config.masks)
    except ValueError as error:
        raise ConfigError(f"config.masks={config.masks!r}: {error}.") from None
    for name in ("select", "demonstration_task", "feedback"):
        if config.trajectories and config[name]:
            raise ConfigError(
                f"{name}={config[name]!r} is about demonstrations, and trajectories="
                f"{config.trajectories!r} takes their place. Set one of them to ''; python -m"
                " launch.synth filters files of trajectories."
            )
    if config.select != "preferred" and (config.feedback or config.candidates > 1):
        raise ConfigError(
            f"feedback={config.feedback!r} and candidates={config.candidates} choose among the"
            f" demonstrations of a task, and select={config.select!r} does not. Set"
            " select=preferred."
        )
    if config.feedback and not pathlib.Path(config.feedback).is_file():
        raise ConfigError(
            f"feedback={config.feedback!r} is no file. Name the decisions.jsonl that the page"
            " review.html exports."
        )
    if config.trajectories:
        try:
            parse_mixture(config.trajectories)
        except ValueError as error:
            raise ConfigError(f"config.trajectories: {error}") from None
    if config.held_out_share >= 1:
        raise ConfigError(f"held_out_share={config.held_out_share} must be below 1. Lower it.")
    if not config.until_success:
        return
    if not config.eval_tasks:
        raise ConfigError(
            f"until_success={config.until_success} ends the stage by tasks that are solved, and"
            " eval_tasks=0 plays none. Set until_success to 0."
        )
    if config.until_success > 1 or not config.eval_every or config.decay:
        raise ConfigError(
            f"until_success={config.until_success} ends the stage at an evaluation, at a step that"
            " is not known in advance. It is a share; it needs eval_every above 0 and decay=False."
        )
