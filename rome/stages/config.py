"""Configs before anything starts: every key is known, every combination possible, every run has a
folder of its own.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import json
import math
import os
import pathlib
from typing import Any, get_args

import ml_collections

from envs.rock import SandboxConfig
from envs.rock.config import BACKENDS
from rome.losses import ADVANTAGES, LIKELIHOODS, LOSSES, PUBLISHED, LossConfig, unbounded_weight
from rome.model.config import PRESETS, REMATS
from rome.rollout.anchors import Resampling
from rome.rollout.scheduler import StaleSamples

SANDBOX_KEYS = {
    "isolation": str,
    "memory_mb": int,
    "pids": int,
    "disk_mb": int,
    "command_timeout": float,
    "egress": str,
    "backend": str,
    "image": str,
    "url": str,
}
LEARNER_KEYS = {
    "remat": str,
    "attention": str,
    "experts": str,
    "exchange": str,
    "capacity_factor": float,
    "router_z_loss_coef": float,
    "offload_moments": bool,
}
MESH_KEYS = {"replica": int, "fsdp": int, "expert": int, "sequence": int, "tensor": int}
COMMON_KEYS = {
    "experiment": str,
    "preset": str,
    "seed": int,
    "init_from": str,
    "model": str,
    "tokenizer": str,
    "loss": str,
    "steps": int,
    "updates_per_step": int,
    "row_length": int,
    "chunks_per_row": int,
    "rows_per_microbatch": int,
    "learning_rate": float,
    "warmup_updates": int,
    "decay": bool,
    "weight_decay": float,
    "clip": float,
    "eval_every": int,
    "checkpoint_every": int,
    "checkpoints_kept": int,
    "learner": LEARNER_KEYS,
    "mesh": MESH_KEYS,
}
AGENT_KEYS = COMMON_KEYS | {
    "max_context": int,
    "max_new_tokens": int,
    "max_turns": int,
    "temperature": float,
    "concurrency": int,
    "episode_seconds": float,
    "eval_tasks": int,
    "eval_temperature": float,
    "engines": str,
    "embedded_engines": int,
    "mirrors": str,
    "engine_slots": int,
    "sandbox": SANDBOX_KEYS,
}
CPT_KEYS = COMMON_KEYS | {"rows": int, "text": str, "held_out_share": float, "eval_documents": int}
SFT_KEYS = AGENT_KEYS | {
    "rows": int,
    "expert_episodes": int,
    "expert_error_rate": float,
    "until_success": float,
}
RL_KEYS = AGENT_KEYS | {
    "gamma": float,
    "mismatch_threshold": float,
    "mismatch_low": float,
    "mismatch_mask": str,
    "lambda_rl": float,
    "lambda_il": float,
    "norm": str,
    "failure_reward": float,
    "negative_weight": float,
    "negative_tokens": int,
    "denial_penalty": float,
    "clip_low": float,
    "clip_high": float,
    "dual_clip": float,
    "anchor": str,
    "old": str,
    "routing_replay": str,
    "groups": int,
    "group_size": int,
    "filter_groups": bool,
    "replace_equal": bool,
    "async_ratio": int,
    "late": str,
    "whole_groups": bool,
    "redundancy": int,
    "redundant_groups": int,
    "keep_redundant": bool,
    "lend_engines": int,
    "resampling": str,
    "resample_share": float,
    "alarm_kl": float,
}
KEYS = {"cpt": CPT_KEYS, "sft": SFT_KEYS}  # of a loss; the others are RL's
# Switches that some losses read; 0 stands for the value of the loss' paper (PUBLISHED, where the
# first is called mismatch_limit).
OF_SOME_LOSSES = ("mismatch_threshold", "mismatch_low", "clip_low", "clip_high", "dual_clip")
# What the experiment that a run starts from takes over from it: the model, the machine, the seed.
INHERITED = (
    "seed",
    "model",
    "tokenizer",
    "engines",
    "embedded_engines",
    "mirrors",
    "engine_slots",
    "sandbox",
    "mesh",
)
CHOICES = {
    "loss": tuple(LOSSES),
    "mismatch_mask": ("chunk", "token"),
    "norm": ("tokens", "chunks", "trajectories"),
    "anchor": ("history", "observation"),
    "old": ("trainer", "rollout"),
    "routing_replay": ("off", "rollout", "recompute"),
    "isolation": ("required", "best_available"),
    "backend": BACKENDS,
    "model": tuple(PRESETS),
    "remat": REMATS,
    "late": get_args(StaleSamples),
    "resampling": get_args(Resampling),
}
MAY_BE_ZERO = {
    "seed",
    "warmup_updates",
    "weight_decay",
    "eval_every",
    "expert_error_rate",
    "until_success",
    "lambda_rl",
    "lambda_il",
    "failure_reward",
    "negative_weight",
    "negative_tokens",
    "denial_penalty",
    "temperature",
    "eval_temperature",
    "capacity_factor",
    "router_z_loss_coef",
    "async_ratio",
    "redundancy",
    "redundant_groups",
    "lend_engines",
    *OF_SOME_LOSSES,
}
TOKEN = "ROCK_TOKEN"  # of a ROCK admin, in the environment


class ConfigError(ValueError):
    """A config that cannot run: says which key, which value and what to do."""


def load_config(path: str, preset: str) -> ml_collections.ConfigDict:
    """`get_config(preset)` of an experiment file."""
    file = pathlib.Path(path)
    if not file.is_file():
        raise ConfigError(
            f"there is no experiment file {path}; experiments/ holds"
            f" {', '.join(sorted(p.name for p in pathlib.Path('experiments').glob('*.py') if p.name != '__init__.py'))}"
        )
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(preset)


def init_config(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """The config of the experiment that `config` starts from: its file at the same preset, for the
    same model, machine and seed.
    """
    start = load_config(config.init_from, config.preset)
    for key in INHERITED:
        if key in start and key in config:
            start[key] = config[key]
    return start


def check_config(config: ml_collections.ConfigDict) -> None:
    """Raises ConfigError for a key that nobody reads, a missing one, a wrong type or an impossible
    combination.
    """
    _check_keys(config.to_dict(), KEYS.get(config.get("loss"), RL_KEYS), "")
    if config.loss in LIKELIHOODS and config.rows % config.rows_per_microbatch:
        raise ConfigError(
            f"rows={config.rows} is not a multiple of"
            f" rows_per_microbatch={config.rows_per_microbatch}. Change one of them."
        )
    if config.loss == "cpt":
        if config.row_length < 2 or config.held_out_share >= 1:
            raise ConfigError(
                f"row_length={config.row_length} must be 2 or more,"
                f" held_out_share={config.held_out_share} below 1. Change them."
            )
        if config.init_from.endswith(".py"):
            raise ConfigError(
                f"init_from={config.init_from!r}: CPT is the first stage and runs no other before"
                " it. Name a Hugging Face directory (a run leaves one in final/), or nothing."
            )
        return
    try:
        sandbox_config(config)
    except ValueError as error:
        raise ConfigError(f"config.sandbox: {error}.") from None
    if config.max_context > config.row_length:
        raise ConfigError(
            f"max_context={config.max_context} is longer than a row of"
            f" row_length={config.row_length} tokens, and no trajectory is cut. Raise row_length."
        )
    if config.max_new_tokens >= config.max_context:
        raise ConfigError(
            f"max_new_tokens={config.max_new_tokens} leaves no room for a prompt in"
            f" max_context={config.max_context}. Lower it."
        )
    if config.max_turns > config.chunks_per_row:
        raise ConfigError(
            f"max_turns={config.max_turns} is more than chunks_per_row={config.chunks_per_row}"
            " holds. Raise chunks_per_row."
        )
    urls, mirrors = (
        [part for part in config[key].split(",") if part.strip()] for key in ("engines", "mirrors")
    )
    if mirrors and len(mirrors) != len(urls):
        raise ConfigError(
            f"mirrors names {len(mirrors)} URLs and engines {len(urls)}: each engine's host has a"
            " mirror of its own, or none has."
        )
    if config.loss == "sft" and config.until_success:
        if config.until_success > 1 or not config.eval_every or config.decay:
            raise ConfigError(
                f"until_success={config.until_success} ends the stage at an evaluation, at a step"
                " that is not known before. It is a share; it needs eval_every above 0 and"
                " decay=False."
            )
    if config.loss != "sft":
        _check_rl(config)
        if config.async_ratio and config.lend_engines >= (
            count := len(urls) or config.embedded_engines
        ):
            raise ConfigError(
                f"lend_engines={config.lend_engines} of {count} engines leaves none to go on"
                f" sampling while async_ratio={config.async_ratio}. Lower it, or set async_ratio=0."
            )


def _check_rl(config: ml_collections.ConfigDict) -> None:
    if config.loss in ADVANTAGES and config.group_size < 2:
        raise ConfigError(
            f"loss={config.loss} compares the episodes of a group, and"
            f" group_size={config.group_size}. Set it to 2 or more."
        )
    for key, name in zip(OF_SOME_LOSSES, _switches(config)):
        if config[key] and name not in PUBLISHED[config.loss]:
            readers = ", ".join(loss for loss, values in PUBLISHED.items() if name in values)
            raise ConfigError(
                f"{key}={config[key]} is not read by loss={config.loss}. Set it to 0; {readers}"
                " read it."
            )
    try:
        loss_config(config)
    except ValueError as error:
        raise ConfigError(f"loss={config.loss}: {error}.") from None
    if config.async_ratio and (reason := unbounded_weight(config.loss, config.dual_clip)):
        raise ConfigError(
            f"async_ratio={config.async_ratio} trains on samples of older weights, but {reason},"
            " with async_ratio=0."
        )
    _check_rollouts(config)
    if config.temperature == 0:
        raise ConfigError(
            "temperature=0 gives a group of equal episodes and no gradient. Set it above 0."
        )
    if config.routing_replay == "recompute" and config.old == "rollout":
        raise ConfigError(
            "routing_replay=recompute records routes while logp_old is scored, and old=rollout"
            " scores nothing. Set old=trainer, or routing_replay=rollout."
        )


def _check_rollouts(config: ml_collections.ConfigDict) -> None:
    if config.whole_groups is False and (
        needs := next(
            (key for key in ("filter_groups", "replace_equal", "redundancy") if config[key]), None
        )
    ):
        raise ConfigError(
            "whole_groups=False takes episodes without the others of their group, and"
            f" {needs}={config[needs]!r} looks at groups. Turn one of them off."
        )
    if config.whole_groups is False and config.loss in ADVANTAGES:
        raise ConfigError(
            "whole_groups=False takes episodes without the others of their group, which"
            f" loss={config.loss} compares them with. Choose ipa, token_level or topr."
        )
    if config.resampling != "off" and not config.lambda_il:
        raise ConfigError(
            f"resampling={config.resampling} begins inside what an expert showed, and lambda_il=0"
            " shows nothing. Set it above 0."
        )
    if config.resampling != "off" and config.replace_equal:
        raise ConfigError(
            "replace_equal=True replaces the groups without a success, from which"
            f" resampling={config.resampling} takes its tasks. Turn one of them off."
        )
    if config.resampling == "parallel" and config.loss in ADVANTAGES:
        raise ConfigError(
            "resampling=parallel begins the episodes of a group at different places, and"
            f" loss={config.loss} compares them as equals. Choose rollback, or loss=ipa."
        )
    if config.resample_share > 1:
        raise ConfigError(
            f"resample_share={config.resample_share} is a share of the groups. Set it between 0"
            " and 1."
        )


def sandbox_config(config: ml_collections.ConfigDict) -> SandboxConfig:
    """What an episode's sandbox is.

    The token of a ROCK admin comes from the environment, so that it is in no file of a run.
    ValueError for what makes no sense.
    """
    sandbox, token = config.sandbox, ""
    if sandbox.backend == "remote" and not (token := os.environ.get(TOKEN, "")):
        raise ValueError(
            f"backend='remote' needs the admin's token in the environment variable {TOKEN}"
        )
    return SandboxConfig(
        backend=sandbox.backend,
        image=sandbox.image or None,
        url=sandbox.url,
        token=token,
        isolation=sandbox.isolation,
        memory_mb=sandbox.memory_mb,
        pids=sandbox.pids,
        disk_mb=sandbox.disk_mb,
        egress=tuple(sandbox.egress.split()),
    )


def loss_config(config: ml_collections.ConfigDict) -> LossConfig:
    """The switches of the config's loss: what is 0 in OF_SOME_LOSSES has the value of the loss'
    paper.
    """
    if config.loss in LIKELIHOODS:
        return LossConfig()
    given, published = _switches(config), PUBLISHED[config.loss]
    own = {name: given[name] or published[name] for name in published}
    return LossConfig(
        norm=config.norm,
        mismatch_mask=config.mismatch_mask,
        lambda_rl=config.lambda_rl,
        lambda_il=config.lambda_il,
        token_constant=config.max_context,
        **own,
    )


def _switches(config: ml_collections.ConfigDict) -> dict[str, float]:
    """OF_SOME_LOSSES by their names in LossConfig."""
    return {
        "mismatch_limit": config.mismatch_threshold,
        "mismatch_low": config.mismatch_low,
        "clip_low": config.clip_low,
        "clip_high": config.clip_high,
        "dual_clip": config.dual_clip,
    }


def _check_keys(values: dict[str, Any], schema: dict[str, Any], prefix: str) -> None:
    for key in values:
        if key not in schema:
            near = difflib.get_close_matches(key, schema, 1)
            raise ConfigError(
                f"config key {prefix}{key!r} is read by"
                f" nobody{f'; did you mean {near[0]!r}?' if near else '. Remove it.'}"
            )
    for key, kind in schema.items():
        if key not in values:
            raise ConfigError(
                f"config key {prefix}{key!r} is missing. Add it; experiments/ipa.py shows a value."
            )
        value = values[key]
        if isinstance(kind, dict):
            _check_keys(value, kind, f"{prefix}{key}.")
        elif (kind is float and isinstance(value, bool)) or not isinstance(
            value, (int, float) if kind is float else kind
        ):
            raise ConfigError(
                f"config.{prefix}{key}={value!r} is a {type(value).__name__}; it takes a"
                f" {kind.__name__}."
            )
        elif key in CHOICES and value not in CHOICES[key]:
            raise ConfigError(
                f"config.{prefix}{key}={value!r} is unknown. Choose one of"
                f" {', '.join(CHOICES[key])}."
            )
        elif kind in (int, float) and kind is not bool and not isinstance(value, bool):
            if (
                not math.isfinite(value)
                or (value <= 0 and key not in MAY_BE_ZERO)
                or (value < 0 and key != "failure_reward")
            ):
                raise ConfigError(
                    f"config.{prefix}{key}={value!r} must be"
                    f" {'at least 0' if key in MAY_BE_ZERO else 'above 0'}."
                )


def default_workdir(config: ml_collections.ConfigDict) -> pathlib.Path:
    """runs/EXPERIMENT-PRESET-HASH: another config never meets the files of this one."""
    digest = hashlib.sha256(_canonical(config).encode()).hexdigest()[:8]
    return pathlib.Path("runs") / f"{config.experiment}-{config.preset}-{digest}"


def claim_workdir(workdir: pathlib.Path, config: ml_collections.ConfigDict) -> None:
    """Writes the config into a new workdir, or compares it with the one there.

    Raises ConfigError naming what differs.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    path = workdir / "config.json"
    text = _canonical(config)
    if not path.exists():
        if any(workdir.glob("metrics.jsonl")):
            raise ConfigError(
                f"{workdir} holds a run without a config.json. Give another --workdir."
            )
        path.write_text(text)
        return
    theirs, ours = json.loads(path.read_text()), json.loads(text)
    different = [
        f"{key} ({theirs.get(key)!r} there, {ours.get(key)!r} now)"
        for key in sorted(theirs.keys() | ours.keys())
        if theirs.get(key) != ours.get(key)
    ]
    if different:
        raise ConfigError(
            f"{workdir} belongs to another config: {'; '.join(different)[:300]}. Give another"
            " --workdir, or none."
        )


def _canonical(config: ml_collections.ConfigDict) -> str:
    return json.dumps(config.to_dict(), sort_keys=True, indent=1)
