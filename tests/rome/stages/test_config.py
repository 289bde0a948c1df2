"""Configs: every key is read, wrong ones are refused in one line before anything starts."""

import re

import pytest

from rome.losses import PUBLISHED
from rome.stages.config import (
    CHOICES,
    LOSS_SWITCHES,
    MAY_BE_MINUS_ONE,
    MAY_BE_NEGATIVE,
    MAY_BE_ZERO,
    check_chain,
    check_config,
    init_config,
    load_config,
)
from rome.stages.schema import schema_of_kind
from rome.stages.settings import TOKEN, loss_config, sandbox_config
from rome.stages.tasks import tasks_of
from rome.train.workdir import ConfigError, flatten
from tests.paths import ROOT
from tests.rome.evals.tasks import write_task

PRESETS = ("tiny", "smoke", "qwen3_30b_a3b", "qwen3_235b_a22b")


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", ["ipa", "sft", "cpt", "rome"])
def test_shipped_configs_are_accepted(name, preset):
    check_config(load_config(f"experiments/{name}.py", preset))


@pytest.mark.parametrize("preset", ["games", "mixture", "small"])
def test_presets_of_tasks_are_accepted_with_the_sft_that_they_start_from(preset):
    config = load_config("experiments/ipa.py", preset)
    check_chain(config)
    start = init_config(config)
    assert (start.experiment, start.preset) == ("sft", preset)
    assert (start.task, start.max_context) == (config.task, config.max_context)


@pytest.mark.parametrize("preset", ["stage1", "stage2", "stage1-qwen3_30b_a3b", "stage2-smoke"])
def test_the_stages_of_pre_training_are_accepted(preset):
    config = load_config("experiments/cpt.py", preset)
    check_config(config)
    assert ("corpus/stage2" in config.text) == preset.startswith("stage2")
    assert (config.final_weight_decay == 0.01) == preset.startswith("stage2")
    if preset.endswith("a3b"):  # the paper's batch of 32M tokens, and 500B tokens in all
        assert config.rows * config.row_length == 32 << 20
        assert abs(config.steps * config.rows * config.row_length - 500e9) < 32 << 20


KEYS = sorted({key for kind in ("cpt", "sft", "rl") for key in flatten(schema_of_kind(kind))})


@pytest.mark.parametrize("key", KEYS)
def test_every_config_key_is_read_by_the_stages(key):
    block, _, name = key.rpartition(".")
    pattern = rf"\b{block or 'config'}\.{name}\b"
    if block == "mesh" or key in LOSS_SWITCHES:  # read as a whole
        pattern = r"\bconfig\.mesh\.to_dict\b" if block else r"\bconfig\[name\]"
    paths = [ROOT / "launch/train.py", *(ROOT / "rome/stages").glob("*.py")]
    source = "".join(path.read_text() for path in paths)
    assert re.search(pattern, source), f"config.{key} is read nowhere"


def test_the_tables_of_choices_and_ranges_name_keys_that_exist():
    assert {*CHOICES, *MAY_BE_ZERO, *MAY_BE_NEGATIVE, *MAY_BE_MINUS_ONE} <= set(KEYS)


def change_config(config, change):
    """Set values by dotted name, also of keys that the config does not have."""
    config.unlock()
    for key, value in change.items():
        *blocks, name = key.split(".")
        target = config
        for block in blocks:
            target = target[block]
        with target.ignore_type():
            target[name] = value
    return config


@pytest.mark.parametrize(
    "change, message",
    [
        ({"gama": 0.9}, "'gama' is unknown. Did you mean 'gamma'?"),
        ({"loss": "ppo"}, "loss='ppo' is unknown"),
        (
            {"engine.pause": "freeze"},
            "engine.pause='freeze' is unknown. Choose one of abort, retract, in_place",
        ),
        (
            {"engine.device": "tpu"},
            "engine.device='tpu' is unknown. Choose one of auto, cpu, share",
        ),
        (
            {"rollout.stale_samples": "never"},
            "rollout.stale_samples='never' is unknown. Choose one of wait, keep, drop",
        ),
        (
            {"rollout.whole_groups": False},
            (
                "rollout.whole_groups=False takes episodes without the others of their group, and"
                " rollout.filter_groups=True"
            ),
        ),
        (
            {"rollout.whole_groups": False, "rollout.filter_groups": False, "loss": "grpo"},
            "which loss=grpo compares them with",
        ),
        (
            {"rollout.resampling": "parallel", "lambda_il": 0.0},
            "loss=ipa with lambda_il=0 plays none",
        ),
        ({"rollout.resampling": "rollback", "loss": "grpo"}, "loss=grpo with lambda_il=-1 plays"),
        ({"lambda_il": -0.5}, "lambda_il=-0.5 must be at least 0"),
        ({"minibatches": 33}, "minibatches=33 splits whole groups, and a step has groups=32"),
        ({"minibatches": 0}, "minibatches=0 must be above 0"),
        ({"updates_per_step": 2}, "updates_per_step' is unknown"),
        ({"learner.attention": "cudnn"}, "learner.attention='cudnn' is unknown. Choose one of"),
        ({"learner.exchange": "rings"}, "learner.exchange='rings' is unknown. Choose one of"),
        ({"profile_steps": "3"}, "profile_steps='3' is no range of steps"),
        ({"profile_steps": "5:3"}, "profile_steps='5:3' is no range of steps"),
        ({"profile_steps": "0:3"}, "profile_steps='0:3' is no range of steps"),
        ({"profile_steps": "a:3"}, "profile_steps='a:3' is no range of steps"),
        ({"rollout.resampling": "parallel", "loss": "grpo"}, "loss=grpo compares them as equals"),
        (
            {"rollout.resampling": "rollback", "rollout.replace_equal": True},
            "rollout.replace_equal=True replaces the groups without a success",
        ),
        (
            {"rollout.resampling": "parallel", "rollout.resample_share": 1.5},
            "rollout.resample_share=1.5 is a share",
        ),
        (
            {"rollout.async_ratio": 1, "rollout.lend_engines": 1},
            "rollout.lend_engines=1 of 1 engines leaves none",
        ),
        ({"engine.mirrors": "http://a:1"}, "engine.mirrors names 1 URLs and engine.urls 0"),
        ({"steps": 0}, "steps=0 must be above 0"),
        ({"steps": 1.5}, "steps=1.5 is a float. Give an integer"),
        ({"steps": True}, "steps=True is a bool. Give an integer"),
        ({"rollout": 3}, "config.rollout=3 is not a block of keys"),
        ({"rollout.async_ration": 1}, "rollout.'async_ration' is unknown. Did you mean"),
        ({"sandbox.isolation": "none"}, "sandbox.isolation='none' is unknown"),
        ({"mesh.fsdp": 0}, "mesh.fsdp=0 must be above 0"),
        ({"learning_rate": float("nan")}, "learning_rate=nan"),
        ({"max_context": 4096}, "max_context=4096 is longer than a row"),
        ({"loss": "grpo", "group_size": 1}, "group_size=1"),
        (
            {"loss": "gigpo", "group_size": 1},
            "loss=gigpo compares the episodes of a group, and group_size=1",
        ),
        (
            {"clip_high": 0.3},
            "clip_high=0.3 is not read by loss=ipa. Set it to 0; it is read by grpo, dr_grpo",
        ),
        (
            {"loss": "topr", "mismatch_limit": 5.0},
            "mismatch_limit=5.0 is not read by loss=topr. Set it to 0; it is read by ipa, token",
        ),
        (
            {"safety_cost": "egress:1 theft:1"},
            "safety_cost='egress:1 theft:1': there is no kind 'theft' of harm. Use some of secret_",
        ),
        (
            {"safety_cost": "egress"},
            "safety_cost='egress': 'egress' is no cost of a kind of event; write each kind at most",
        ),
        (
            {"edge_credit": "subagent:0.5 return:1"},
            "edge_credit='subagent:0.5 return:1': 'return:1' is no credit of an edge; write each",
        ),
        (
            {"loss": "dapo", "dual_clip": 1.1},
            "loss=dapo: dual_clip 1.1 is within the clip range that ends at 1.28",
        ),
        (
            {"gigpo_state": "screen"},
            "gigpo_state='screen' is unknown. Choose one of history, observation",
        ),
        ({"temperature": 0.0}, "temperature=0"),
        ({"agent": "iflow2"}, "agent='iflow2' is unknown. Choose plain, iflow, or command:"),
        (
            {"agent": "iflow", "rollout.resampling": "rollback"},
            "rollout.resampling=rollback begins in the middle of an episode",
        ),
        ({"agent": "iflow", "iflow.tools": "shell"}, "the agent has no tool 'shell' in training"),
        ({"agent": "iflow", "iflow.compaction": 80.0}, "compaction=80.0 is no share"),
        ({"max_turns": 99}, "max_turns=99"),
        ({"task": "nowhere"}, "config.task='nowhere': dataset 'nowhere' is neither a folder"),
        ({"eval_task": "worlds:x"}, "config.eval_task='worlds:x': worlds has nothing named 'x'"),
        ({"task": "worlds:shop"}, "chunks_per_row=16 is less than the 50 turns of shop/easy/0"),
        (
            {"task": "games:frozen_lake", "max_turns": 8},
            "config.task='games:frozen_lake': max_turns",
        ),
        ({"task": "tests.envs.sources.own:Endless"}, "does not say how many turns"),
        (
            {"routing_replay": "on"},
            "routing_replay='on' is unknown. Choose one of off, rollout, recompute",
        ),
        (
            {"routing_replay": "recompute", "logp_old_from": "rollout"},
            "Set logp_old_from=trainer, or routing_replay=rollout",
        ),
    ],
)
def test_a_wrong_config_is_refused_with_the_value_and_the_remedy(change, message):
    config = change_config(load_config("experiments/ipa.py", "tiny"), change)
    with pytest.raises(ConfigError, match=re.escape(message)):
        check_config(config)


def test_an_egress_grant_that_nobody_understands_is_refused_before_anything_starts():
    config = load_config("experiments/ipa.py", "tiny")
    config.sandbox.egress = "pypi.org:443 files.pythonhosted.org"
    with pytest.raises(
        ConfigError, match=r"config\.sandbox: egress grant 'files\.pythonhosted\.org'"
    ):
        check_config(config)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"eval_tasks": 3}, "'eval_tasks' is unknown"),
        ({"temperature": 1.0}, "'temperature' is unknown"),
        ({"held_out_share": 0.0}, "held_out_share=0.0 must be above 0"),
        ({"held_out_share": 1.0}, "held_out_share=1.0 below 1"),
        ({"rows": 6}, "rows=6 is not a multiple of rows_per_microbatch=16"),
        ({"row_length": 1}, "row_length=1 must be 2 or more"),
        ({"init_from": "experiments/sft.py"}, "CPT comes first"),
        ({"init_from": "experiments/nowhere.py"}, "no experiment file experiments/nowhere.py"),
    ],
)
def test_a_wrong_cpt_config_is_refused_with_the_value_and_the_remedy(change, message):
    config = change_config(load_config("experiments/cpt.py", "tiny"), change)
    with pytest.raises(ConfigError, match=re.escape(message)):
        check_config(config)


@pytest.mark.parametrize(
    "loss, dual_clip, reason",
    [
        ("ipa", 0.0, None),
        ("token_level", 0.0, None),
        ("cispo", 0.0, None),
        ("topr", 0.0, None),
        ("gspo", 3.0, None),
        ("grpo", 3.0, None),
        ("icepop", 3.0, None),
        ("grpo", 0.0, "grpo has no upper bound for the ratio of a failure. Set dual_clip=3"),
        ("tis", 0.0, "tis has no upper bound"),
        ("rloo", 0.0, "as if it were fresh"),
    ],
)
def test_a_loss_whose_weights_know_no_bound_is_refused_where_samples_may_be_stale(
    loss, dual_clip, reason
):
    config = load_config("experiments/ipa.py", "tiny")
    config.loss, config.dual_clip, config.rollout.async_ratio = loss, dual_clip, 0
    check_config(config)
    config.rollout.async_ratio = 1
    if reason is None:
        check_config(config)
        return
    with pytest.raises(
        ConfigError, match=f"async_ratio=1 trains on samples of older weights, but .*{reason}"
    ):
        check_config(config)


def test_a_switch_of_zero_stands_for_the_value_of_the_loss_own_paper():
    config = load_config("experiments/ipa.py", "tiny")
    found = {}
    for loss in PUBLISHED:
        config.loss = loss
        check_config(config)
        found[loss] = loss_config(config)
    assert (
        found["ipa"].mismatch_limit,
        found["tis"].mismatch_limit,
        found["icepop"].mismatch_low,
    ) == (5.0, 2.0, 0.5)
    assert (
        (found["dapo"].clip_low, found["dapo"].clip_high) == (0.2, 0.28)
        and found["gspo"].clip_high == 4e-4
        and found["cispo"].clip_low == 1.0
    )
    assert found["dr_grpo"].token_constant == config.max_context
    assert {loss for loss, switches in found.items() if switches.lambda_il} == {"ipa"}
    config.loss, config.lambda_il = "grpo", 0.5
    assert loss_config(config).lambda_il == 0.5
    config.loss, config.clip_high = "dapo", 0.5
    assert (loss_config(config).clip_low, loss_config(config).clip_high) == (0.2, 0.5)


def test_one_mesh_axis_may_take_all_devices_that_are_left():
    config = load_config("experiments/ipa.py", "tiny")
    config.mesh.fsdp = -1
    check_config(config)


def test_a_missing_key_is_named():
    config = load_config("experiments/ipa.py", "tiny").unlock()
    del config["gamma"]
    with pytest.raises(ConfigError, match="'gamma' is missing"):
        check_config(config)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"masks": "errors looops"}, "masks='errors looops': 'looops' is no mask; known: errors"),
        ({"select": "best"}, "select='best' is unknown. Choose one of"),
        ({"candidates": 2}, "candidates=2 choose among the demonstrations of a task"),
        ({"candidates": 0}, "candidates=0 must be above 0"),
        ({"select": "preferred", "feedback": "nowhere.jsonl"}, "'nowhere.jsonl' is no file"),
        ({"select": "filtered", "trajectories": "D"}, "select='filtered' is about demonstrations"),
        ({"demonstration_task": "gamez"}, "config.demonstration_task='gamez'"),
    ],
)
def test_a_wrong_selection_is_refused_with_the_value_and_the_remedy(change, message):
    config = change_config(load_config("experiments/sft.py", "tiny"), change)
    with pytest.raises(ConfigError, match=re.escape(message)):
        check_config(config)


def test_the_sandboxes_backend_is_the_configs_and_the_admins_token_the_environments(monkeypatch):
    config = load_config("experiments/ipa.py", "tiny")
    config.sandbox.backend, config.sandbox.url = "remote", "http://10.0.0.5:8730"
    monkeypatch.delenv(TOKEN, raising=False)
    with pytest.raises(
        ConfigError,
        match=(
            r"config\.sandbox: backend='remote' needs the admin's token in the environment variable"
            " ROCK_TOKEN"
        ),
    ):
        check_config(config)
    monkeypatch.setenv(TOKEN, "the-secret-token")
    check_config(config)
    assert (
        sandbox := sandbox_config(config)
    ).token == "the-secret-token" and sandbox.url == "http://10.0.0.5:8730"
    assert "the-secret" not in str(config) and "the-secret" not in str(sandbox)
    config.sandbox.backend = "docker"
    with pytest.raises(ConfigError, match="url means nothing to backend='docker'"):
        check_config(config)
    config.sandbox.url, config.sandbox.image = "", "debian:12"
    check_config(config)
    assert sandbox_config(config).image == "debian:12"
    config.sandbox.backend = "podman"
    with pytest.raises(
        ConfigError, match=r"backend='podman' is unknown\. Choose one of embedded, docker, remote"
    ):
        check_config(config)


def with_task(preset="ipa", **changes):
    return change_config(load_config(f"experiments/{preset}.py", "tiny"), changes)


def test_a_folder_whose_tasks_all_fail_is_refused_with_the_first_reason(tmp_path):
    write_task(tmp_path, "bad", task_toml="version = \n")
    with pytest.raises(ConfigError, match=r"none of its 1 tasks can be used; .*task.toml:1"):
        check_config(with_task(task=str(tmp_path), chunks_per_row=40))


def test_a_set_that_leaves_nothing_to_evaluate_or_to_train_on_is_refused(tmp_path):
    write_task(tmp_path, "one")
    config = with_task(task=str(tmp_path), chunks_per_row=40)
    with pytest.raises(ConfigError, match="1 tasks fall into the part that"):
        check_config(config)
    config.eval_task = str(tmp_path)
    with pytest.raises(ConfigError, match="1 of its tasks are trained on, too, such as one"):
        check_config(config)
    config.eval_task = "terminal:count"
    check_config(config)


def test_sft_needs_demonstrators():
    with pytest.raises(ConfigError, match="has no demonstrators"):
        check_config(with_task("sft", task="tests.envs.sources.own:Countdown"))
    check_config(with_task("sft", task="tests.envs.sources.own:Shown"))
    check_config(with_task(task="tests.envs.sources.own:Countdown"))


@pytest.mark.parametrize("preset", ["tiny", "smoke", "sft", "sft_smoke"])
def test_the_safety_experiment_trains_and_evaluates_apart_and_can_run(preset):
    config = load_config("experiments/safety.py", preset)
    check_config(config)
    tasks = tasks_of(config)
    trained = {family.removeprefix("clean-") for family in tasks.train.families}
    tested = {task.family.removeprefix("clean-") for task in tasks.evaluation.evaluation(1)}
    assert tested and not trained & tested
    is_learned_from = preset.startswith("sft")
    assert ("harm" in config.masks) is False if is_learned_from else config.lambda_il == 0.0


@pytest.mark.parametrize("preset", ["tiny", "smoke"])
def test_the_safety_experiment_begins_with_suggestible_demonstrations(preset):
    config = load_config("experiments/safety.py", preset)
    check_chain(config)
    before = init_config(config)
    assert before.experiment == "safety_sft"
    assert "suggestible" in tasks_of(before).demonstrated.spec
    first = init_config(before)
    assert tasks_of(first).demonstrated.spec == "terminal" and not first.init_from


def test_the_safety_experiments_sft_takes_records_in_the_place_of_demonstrations(tmp_path):
    config = load_config("experiments/safety.py", "sft")
    config.trajectories = str(tmp_path)
    check_config(config)


@pytest.mark.parametrize(
    "experiment, values, named",
    [
        ("sft", {"temperature": 0.5}, "temperature=0.5 is not read here: SFT"),
        ("sft", {"lora.targets": "attention"}, "lora.targets='attention' is not read here: lora.r"),
        ("cpt", {"lora.alpha": 8.0}, "lora.alpha=8.0 is not read here"),
        ("ipa", {"loss": "grpo", "norm": "chunks"}, "norm='chunks' is not read here: loss=grpo"),
        ("ipa", {"loss": "token_level", "mismatch_mask": "token"}, "mismatch_mask='token' is not"),
        ("ipa", {"gigpo_state": "observation"}, "gigpo_state='observation' is not read here"),
        ("ipa", {"rollout.resample_share": 0.5}, "rollout.resample_share=0.5 is not read here"),
    ],
)
def test_a_key_that_is_set_and_that_nothing_reads_is_refused(experiment, values, named):
    config = load_config(f"experiments/{experiment}.py", "tiny")
    config.update_from_flattened_dict(values)
    with pytest.raises(ConfigError, match=named):
        check_config(config)


@pytest.mark.parametrize(
    "experiment, values",
    [
        ("sft", {"lora.rank": 4, "lora.targets": "attention", "lora.alpha": 8.0}),
        ("ipa", {"norm": "chunks", "mismatch_mask": "token"}),
        ("ipa", {"loss": "token_level", "norm": "trajectories"}),
        ("ipa", {"loss": "gigpo", "gigpo_state": "observation"}),
        ("ipa", {"loss": "grpo", "advantage": "steps", "gigpo_state": "observation"}),
        ("ipa", {"rollout.resampling": "parallel", "rollout.resample_share": 0.5}),
    ],
)
def test_a_key_that_something_reads_may_be_set(experiment, values):
    config = load_config(f"experiments/{experiment}.py", "tiny")
    config.update_from_flattened_dict(values)
    check_config(config)
