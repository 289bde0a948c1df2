"""Check configs before anything starts.

The default config of a shipped experiment is the schema of its kind of training: its keys and their
types (rome/stages/schema.py). To add a key, add it there with a default. The tables below hold only
what a default cannot say: choices, and which numbers may be 0 or negative.
"""

from __future__ import annotations

import difflib
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import ml_collections

from envs.rock.config import BACKENDS
from rome.data.costs import parse_costs
from rome.data.tree import parse_credit
from rome.engine.control import PauseMode
from rome.losses import PUBLISHED, find_loss, unbounded_weight
from rome.model.config import DTYPES, REMATS
from rome.model.ops.kernels import KNOWN, Kernels
from rome.rollout.anchors import Resampling
from rome.rollout.rules import StaleSamples
from rome.stages.checks_by_stage import check_cpt, check_rows, check_sft
from rome.stages.own_code import compares_episodes
from rome.stages.schema import kind_of, load_config, schema_of, with_own_defaults
from rome.stages.selection import SELECTIONS
from rome.stages.settings import (
    command_agent,
    iflow_agent,
    imitation_weight,
    lora_of,
    loss_config,
    profiled_steps,
    sandbox_config,
    split_urls,
)
from rome.stages.tasks import check_tasks
from rome.stages.unread import check_unread
from rome.stages.weights import model_of
from rome.train.devices import EngineDevice
from rome.train.workdir import (
    RANDOM,
    ConfigError,
    KeyClass,
    KeyRules,
    experiment_before,
    flatten,
    model_directory,
)

CHOICES: Mapping[str, Sequence[str]] = {
    "mismatch_mask": ("chunk", "token"),
    "norm": ("tokens", "chunks", "trajectories"),
    "gigpo_state": ("history", "observation"),
    "logp_old_from": ("trainer", "rollout"),
    "routing_replay": ("off", "rollout", "recompute"),
    "engine.device": get_args(EngineDevice),
    "engine.pause": get_args(PauseMode),
    "select": SELECTIONS,
    "lora.publish": ("merged", "adapter"),
    "rollout.stale_samples": get_args(StaleSamples),
    "rollout.resampling": get_args(Resampling),
    "sandbox.isolation": ("required", "best_available"),
    "sandbox.backend": BACKENDS,
    "learner.remat": REMATS,
    "learner.dtype": ("", *DTYPES),
    "learner.prefix_tree": ("auto", "on", "off"),
    # Known before an earlier stage is run, whose own config has other kernels.
    **{f"learner.{kind}": names for kind, names in zip(Kernels._fields, KNOWN, strict=True)},
}
# What a key is to the workdir of a run (rome.train.workdir.KeyRules). A block's name stands for all
# of its keys. A key that is not named here is part of the run's identity.
KEY_CLASSES: Mapping[str, KeyClass] = {
    "steps": "schedule",
    "until_success": "schedule",
    "learning_rate": "schedule",
    "warmup_updates": "schedule",
    "decay": "schedule",
    "weight_decay": "schedule",
    "clip": "schedule",
    "skip_nonfinite_updates": "schedule",
    "episode_seconds": "schedule",
    "start_seconds": "operation",
    "alarm_kl": "operation",
    "concurrency": "operation",
    "eval_every": "operation",
    "checkpoint_every": "operation",
    "checkpoints_kept": "operation",
    "keep_trajectories": "operation",
    "profile_steps": "operation",
    "rows_per_microbatch": "operation",
    "rollout.lend_engines": "operation",
    "engine": "operation",
    "mesh": "operation",
    "sandbox.backend": "operation",
    "sandbox.url": "operation",
    "sandbox.isolation": "operation",
    "sandbox.verifier_tools": "operation",
    "learner.remat": "operation",
    "learner.attention": "operation",
    "learner.experts": "operation",
    "learner.exchange": "operation",
    "learner.prefix_tree": "operation",
    "learner.offload_moments": "operation",
    "lora.publish": "operation",
}
# Switches that only some losses read. 0 means the value of the loss' own paper (PUBLISHED).
LOSS_SWITCHES = ("mismatch_limit", "mismatch_low", "clip_low", "clip_high", "dual_clip")
MAY_BE_ZERO = {
    "seed",
    "warmup_updates",
    "weight_decay",
    "final_weight_decay",
    "eval_every",
    "eval_tasks",
    "keep_trajectories",
    "demonstration_error_rate",
    "max_turns",
    "sandbox.command_timeout",
    "sandbox.disk_mb",
    "until_success",
    "lambda_rl",
    "lambda_il",
    "negative_weight",
    "negative_tokens",
    "safety_cost",
    "temperature",
    "eval_temperature",
    "lora.rank",
    "learner.capacity_factor",
    "learner.router_z_loss_coef",
    "learner.router_aux_loss_coef",
    "learner.yarn_factor",
    "engine.cache_tokens",
    "rollout.async_ratio",
    "rollout.redundancy",
    "iflow.compaction",
    "rollout.lend_engines",
    *LOSS_SWITCHES,
}
MAY_BE_NEGATIVE = {"failure_reward"}
MAY_BE_MINUS_ONE = {
    "lambda_il",
    "final_weight_decay",
    "learner.router_aux_loss_coef",
    *(f"mesh.{axis}" for axis in ("replica", "fsdp", "expert", "sequence", "tensor")),
}

TYPE_NAMES = {bool: "True or False", int: "an integer", float: "a number", str: "a text"}

# Keys that a stage hands on to the stage that it starts from: the model, the machine, the seed, the
# tasks and the sizes of their episodes. CPT has no episodes: its rows are its own.
OF_ROWS = ("row_length", "chunks_per_row")
INHERITED = (
    *("seed", "model", "tokenizer", "engine", "sandbox", "mesh"),
    *("task", "eval_task", "tell_tools", "max_turns", "max_context", "max_new_tokens"),
    "eval_temperature",
    *OF_ROWS,
)


def init_config(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Return the config of the experiment that `config` starts from.

    Its preset is the one that `init_from` names, or else that of `config`; the INHERITED keys have
    the values of `config`.

    Raises:
      ValueError: `init_from` names no experiment.
    """
    before = experiment_before(config.init_from)
    if before is None:
        raise ValueError(f"init_from={config.init_from!r} names no experiment, FILE.py[:PRESET]")
    file, preset = before
    start = load_config(file, preset or config.preset)
    own = OF_ROWS if kind_of(start.loss) == "cpt" else ()
    for key in INHERITED:
        if key in start and key in config and key not in own:
            start[key] = config[key]
    if "eval_tasks" in start and config.eval_tasks:  # 0: what follows plays no task itself
        start.eval_tasks = config.eval_tasks
    return start


def check_chain(config: ml_collections.ConfigDict) -> None:
    """Check a config and those of all stages before it, before the first of them starts.

    Raises:
      ConfigError: one of them cannot run, or the chain has no beginning.
    """
    seen: list[str] = []
    names: list[str] = []
    while True:
        check_config(config)
        names.append(config.experiment)
        if experiment_before(config.init_from) is None:
            break
        if config.init_from in seen:
            raise ConfigError(
                f"init_from={config.init_from!r} starts from itself, through {' <- '.join(seen)}."
                " Let the first stage start from a Hugging Face directory, or from nothing."
            )
        seen.append(config.init_from)
        config = init_config(config)
    repeated = [name for name in names if names.count(name) > 1]
    if repeated:
        raise ConfigError(
            f"experiment={repeated[0]!r} names two stages of the chain {' <- '.join(names)}, whose"
            " evaluations and curves the report tells apart by name. Set another config.experiment"
            " in one of their files."
        )


def check_config(config: ml_collections.ConfigDict) -> None:
    """Raise ConfigError for a config that cannot run, before anything is started.

    Refused are unknown and missing keys, wrong types and values, and impossible combinations.
    """
    schema = schema_of(config)
    _check_block(with_own_defaults(config.to_dict(), schema), schema, "")
    profiled_steps(config)
    _check_model(config)
    kind = kind_of(config.loss)
    if kind != "rl":
        check_rows(config)
    check_unread(config, schema)
    if kind == "cpt":
        check_cpt(config)
        return
    if not config.eval_tasks and not config.get("trajectories"):
        raise ConfigError(
            "eval_tasks=0 plays no task, which only SFT on `trajectories` can do without. Set"
            " eval_tasks to 1 or more."
        )
    _check_episodes(config)
    if kind == "sft":
        check_sft(config)
    else:
        _check_loss(config)
        _check_rollout(config)
        command_agent(config)
        iflow_agent(config)


def key_class(name: str) -> KeyClass:
    """Return the class of a key with a dotted name; see KEY_CLASSES."""
    block = name.partition(".")[0]
    return KEY_CLASSES.get(name, KEY_CLASSES.get(block, "identity"))


def key_rules(config: ml_collections.ConfigDict) -> KeyRules:
    """Return the classes and defaults of the keys of a config."""
    return KeyRules(key_class, flatten(dict(schema_of(config))))


# -- keys, types and ranges
# -------------------------------------------------------------------------------------------------


def _check_block(values: Mapping[str, Any], schema: Mapping[str, Any], prefix: str) -> None:
    for key in values:
        if key not in schema:
            near = difflib.get_close_matches(key, schema, 1)
            remedy = f"Did you mean {near[0]!r}?" if near else "Remove it."
            listed = "docs/configuration.md lists all keys; those of own code are its fields."
            raise ConfigError(f"config key {prefix}{key!r} is unknown. {remedy} {listed}")
    for key, default in schema.items():
        if key not in values:
            raise ConfigError(
                f"config key {prefix}{key!r} is missing. Add it; experiments/ipa.py shows a value."
            )
        name = f"{prefix}{key}"
        value = values[key]
        if isinstance(default, dict):
            if not isinstance(value, dict):
                raise ConfigError(
                    f"config.{name}={value!r} is not a block of keys. Set the keys"
                    f" {', '.join(f'{name}.{inner}' for inner in default)}."
                )
            _check_block(value, default, f"{name}.")
        else:
            _check_type(name, value, type(default))
            _check_value(name, value)


def _check_type(name: str, value: Any, expected: type) -> None:
    accepted = (int, float) if expected is float else expected
    is_wrong_bool = isinstance(value, bool) and expected is not bool
    if is_wrong_bool or not isinstance(value, accepted):
        raise ConfigError(
            f"config.{name}={value!r} is a {type(value).__name__}. Give {TYPE_NAMES[expected]}."
        )


def _check_value(name: str, value: Any) -> None:
    if name in CHOICES and value not in CHOICES[name]:
        raise ConfigError(
            f"config.{name}={value!r} is unknown. Choose one of {', '.join(CHOICES[name])}."
        )
    if isinstance(value, (bool, str)):
        return
    if not math.isfinite(value):
        raise ConfigError(f"config.{name}={value!r} is not finite. Give a number.")
    if value > 0 or name in MAY_BE_NEGATIVE or name.startswith("own."):  # checks itself
        return
    if (value == 0 and name in MAY_BE_ZERO) or (value == -1 and name in MAY_BE_MINUS_ONE):
        return
    bound = "at least 0" if name in MAY_BE_ZERO else "above 0"
    raise ConfigError(f"config.{name}={value!r} must be {bound}.")


# -- combinations
# -------------------------------------------------------------------------------------------------


def _check_model(config: ml_collections.ConfigDict) -> None:
    """Check that a model's directory is there and is not one of two, and that adapters fit it."""
    directory = model_directory(config)
    init_from = config.init_from
    if config.lora.publish == "adapter" and not config.lora.rank:
        raise ConfigError(
            "lora.publish=adapter sends adapters to the engines, and lora.rank=0 trains none. Set"
            " lora.rank, or lora.publish=merged."
        )
    if config.lora.rank:
        start = pathlib.Path(init_from) if init_from and pathlib.Path(init_from).is_dir() else None
        lora_of(config, model_of(config, start))
    if directory is None or init_from in ("", RANDOM) or experiment_before(init_from):
        return
    if pathlib.Path(init_from).resolve() != directory.resolve():
        raise ConfigError(
            f"init_from={init_from!r} and model={config.model!r} are two directories, and one has"
            " the weights and their model. Set --config.model alone."
        )


def _check_episodes(config: ml_collections.ConfigDict) -> None:
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
    check_tasks(config)
    urls = split_urls(config.engine.urls)
    mirrors = split_urls(config.engine.mirrors)
    if mirrors and len(mirrors) != len(urls):
        raise ConfigError(
            f"engine.mirrors names {len(mirrors)} URLs and engine.urls {len(urls)}. Give one"
            " mirror for each engine, or none."
        )


def _check_loss(config: ml_collections.ConfigDict) -> None:
    loss = config.loss
    if config.advantage and not compares_episodes(config):
        raise ConfigError(
            f"advantage={config.advantage!r} is not read by loss={loss}. Set it to '', or choose a"
            " loss that compares episodes, such as grpo."
        )
    if compares_episodes(config) and config.group_size < 2:
        raise ConfigError(
            f"loss={loss} compares the episodes of a group, and group_size={config.group_size}."
            " Set it to 2 or more."
        )
    if config.minibatches > config.groups:
        raise ConfigError(
            f"minibatches={config.minibatches} splits whole groups, and a step has"
            f" groups={config.groups}. Lower it."
        )
    for name in LOSS_SWITCHES:
        if config[name] and name not in find_loss(loss).published:
            readers = [other for other, values in PUBLISHED.items() if name in values]
            raise ConfigError(
                f"{name}={config[name]} is not read by loss={loss}. Set it to 0; it is read by"
                f" {', '.join(readers)}."
            )
    try:
        loss_config(config)
    except ValueError as error:
        raise ConfigError(f"loss={loss}: {error}.") from None
    try:
        parse_credit(config.edge_credit)
    except ValueError as error:
        raise ConfigError(f"edge_credit={config.edge_credit!r}: {error}.") from None
    _check_costs(config.safety_cost)
    reason = unbounded_weight(loss, config.dual_clip)
    if config.rollout.async_ratio and reason:
        raise ConfigError(
            f"rollout.async_ratio={config.rollout.async_ratio} trains on samples of older weights,"
            f" but {reason}, with rollout.async_ratio=0."
        )
    if config.temperature == 0:
        raise ConfigError(
            "temperature=0 gives a group of equal episodes and no gradient. Set it above 0."
        )
    if config.routing_replay == "recompute" and config.logp_old_from == "rollout":
        raise ConfigError(
            "routing_replay=recompute records routes while logp_old is scored, and"
            " logp_old_from=rollout scores nothing. Set logp_old_from=trainer, or"
            " routing_replay=rollout."
        )


def _check_costs(text: str) -> None:
    try:
        costs = parse_costs(text)
    except ValueError as error:
        raise ConfigError(f"safety_cost={text!r}: {error}.") from None
    if not costs:
        return
    from envs.safety import KINDS  # its tasks take a while to import

    if unknown := [kind for kind in costs if kind not in KINDS]:
        raise ConfigError(
            f"safety_cost={text!r}: there is no kind {unknown[0]!r} of harm. Use some of"
            f" {', '.join(KINDS)}."
        )


def _check_rollout(config: ml_collections.ConfigDict) -> None:
    rollout = config.rollout
    if not rollout.whole_groups:
        _check_single_episodes(config)
    if rollout.resampling != "off":
        _check_resampling(config)
    if rollout.resample_share > 1:
        raise ConfigError(
            f"rollout.resample_share={rollout.resample_share} is a share of the groups. Set it"
            " between 0 and 1."
        )
    engines = len(split_urls(config.engine.urls)) or config.engine.count
    if rollout.async_ratio and rollout.lend_engines >= engines:
        raise ConfigError(
            f"rollout.lend_engines={rollout.lend_engines} of {engines} engines leaves none to"
            f" sample while rollout.async_ratio={rollout.async_ratio}. Lower it, or set"
            " rollout.async_ratio=0."
        )


def _check_single_episodes(config: ml_collections.ConfigDict) -> None:
    for name in ("filter_groups", "replace_equal", "redundancy"):
        value = config.rollout[name]
        if value:
            raise ConfigError(
                "rollout.whole_groups=False takes episodes without the others of their group, and"
                f" rollout.{name}={value!r} looks at groups. Turn one of them off."
            )
    if compares_episodes(config):
        raise ConfigError(
            "rollout.whole_groups=False takes episodes without the others of their group, which"
            f" loss={config.loss} compares them with. Choose ipa, token_level or topr."
        )


def _check_resampling(config: ml_collections.ConfigDict) -> None:
    resampling = config.rollout.resampling
    if config.rollout.replace_equal:
        raise ConfigError(
            "rollout.replace_equal=True replaces the groups without a success, from which"
            f" rollout.resampling={resampling} takes its tasks. Turn one of them off."
        )
    if resampling == "parallel" and compares_episodes(config):
        raise ConfigError(
            "rollout.resampling=parallel starts the episodes of a group at different places, and"
            f" loss={config.loss} compares them as equals. Choose rollback, or loss=ipa."
        )
    if not imitation_weight(config):
        raise ConfigError(
            f"rollout.resampling={resampling} starts inside a demonstration, and loss={config.loss}"
            f" with lambda_il={config.lambda_il:g} plays none. Set lambda_il above 0."
        )
