"""Configs: every key is read, wrong ones are refused in one line before anything starts."""

import json
import re
import subprocess
import sys

import pytest

from rome.losses import PUBLISHED
from rome.stages.config import (
    CPT_KEYS,
    RL_KEYS,
    SFT_KEYS,
    TOKEN,
    ConfigError,
    check_config,
    claim_workdir,
    default_workdir,
    init_config,
    load_config,
    loss_config,
    sandbox_config,
)
from tests.paths import ROOT

PRESETS = ("tiny", "smoke", "qwen3_30b_a3b", "qwen3_235b_a22b")


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", ["ipa", "sft", "cpt"])
def test_shipped_configs_are_accepted(name, preset):
    check_config(load_config(f"experiments/{name}.py", preset))


def test_every_config_key_is_read_by_the_launcher():
    source = "".join(
        path.read_text()
        for path in (*(ROOT / "launch").glob("*.py"), *(ROOT / "rome/stages").glob("*.py"))
    )
    for key in SFT_KEYS | RL_KEYS | CPT_KEYS:
        assert re.search(rf"\bconfig\.{key}\b", source), f"config.{key} is read nowhere"
    for key in RL_KEYS["sandbox"]:
        assert re.search(rf"\bsandbox\.{key}\b", source), f"config.sandbox.{key} is read nowhere"


@pytest.mark.parametrize(
    "change, message",
    [
        ({"gama": 0.9}, "'gama' is read by nobody; did you mean 'gamma'"),
        ({"loss": "ppo"}, "loss='ppo' is unknown"),
        ({"late": "never"}, "late='never' is unknown. Choose one of wait, keep, drop"),
        (
            {"whole_groups": False},
            (
                "whole_groups=False takes episodes without the others of their group, and"
                " filter_groups=True"
            ),
        ),
        (
            {"whole_groups": False, "filter_groups": False, "loss": "grpo"},
            "which loss=grpo compares them with",
        ),
        ({"resampling": "parallel", "lambda_il": 0.0}, "lambda_il=0 shows nothing"),
        ({"resampling": "parallel", "loss": "grpo"}, "loss=grpo compares them as equals"),
        (
            {"resampling": "rollback", "replace_equal": True},
            "replace_equal=True replaces the groups without a success",
        ),
        ({"resample_share": 1.5}, "resample_share=1.5 is a share"),
        ({"async_ratio": 1, "lend_engines": 1}, "lend_engines=1 of 1 engines leaves none"),
        ({"mirrors": "http://a:1"}, "mirrors names 1 URLs and engines 0"),
        ({"steps": 0}, "steps=0 must be above 0"),
        ({"learning_rate": float("nan")}, "learning_rate=nan"),
        ({"max_context": 4096}, "max_context=4096 is longer than a row"),
        ({"loss": "grpo", "group_size": 1}, "group_size=1"),
        (
            {"loss": "gigpo", "group_size": 1},
            "loss=gigpo compares the episodes of a group, and group_size=1",
        ),
        ({"clip_high": 0.3}, "clip_high=0.3 is not read by loss=ipa. Set it to 0; grpo, dr_grpo"),
        (
            {"loss": "topr", "mismatch_threshold": 5.0},
            "mismatch_threshold=5.0 is not read by loss=topr. Set it to 0; ipa, token_level",
        ),
        (
            {"loss": "dapo", "dual_clip": 1.1},
            "loss=dapo: dual_clip 1.1 is within the clip range that ends at 1.28",
        ),
        ({"anchor": "screen"}, "anchor='screen' is unknown. Choose one of history, observation"),
        ({"temperature": 0.0}, "temperature=0"),
        ({"max_turns": 99}, "max_turns=99"),
        (
            {"routing_replay": "on"},
            "routing_replay='on' is unknown. Choose one of off, rollout, recompute",
        ),
        (
            {"routing_replay": "recompute", "old": "rollout"},
            "Set old=trainer, or routing_replay=rollout",
        ),
    ],
)
def test_a_wrong_config_is_refused_with_the_value_and_the_remedy(change, message):
    config = load_config("experiments/ipa.py", "tiny").unlock()
    for key, value in change.items():
        config[key] = value
    with pytest.raises(ConfigError, match=re.escape(message)):
        check_config(config)


def test_an_egress_grant_that_nobody_understands_is_refused_before_anything_starts():
    config = load_config("experiments/ipa.py", "tiny")
    config.sandbox.egress = "pypi.org:443 files.pythonhosted.org"
    with pytest.raises(ConfigError, match="config.sandbox: egress grant 'files.pythonhosted.org'"):
        check_config(config)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"eval_tasks": 3}, "'eval_tasks' is read by nobody"),
        ({"temperature": 1.0}, "'temperature' is read by nobody"),
        ({"held_out_share": 0.0}, "held_out_share=0.0 must be above 0"),
        ({"held_out_share": 1.0}, "held_out_share=1.0 below 1"),
        ({"rows": 6}, "rows=6 is not a multiple of rows_per_microbatch=16"),
        ({"row_length": 1}, "row_length=1 must be 2 or more"),
        ({"init_from": "experiments/sft.py"}, "CPT is the first stage"),
    ],
)
def test_a_wrong_cpt_config_is_refused_with_the_value_and_the_remedy(change, message):
    config = load_config("experiments/cpt.py", "tiny").unlock()
    for key, value in change.items():
        config[key] = value
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
    loss, dual_clip, reason, monkeypatch
):
    monkeypatch.setitem(RL_KEYS, "async_ratio", int)
    config = load_config("experiments/ipa.py", "tiny").unlock()
    config.loss, config.dual_clip, config.async_ratio = loss, dual_clip, 0
    check_config(config)
    config.async_ratio = 1
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
    config.loss, config.clip_high = "dapo", 0.5
    assert (loss_config(config).clip_low, loss_config(config).clip_high) == (0.2, 0.5)


def test_a_missing_key_is_named():
    config = load_config("experiments/ipa.py", "tiny").unlock()
    del config["gamma"]
    with pytest.raises(ConfigError, match="'gamma' is missing"):
        check_config(config)


def test_the_experiment_started_from_takes_over_seed_and_machine():
    config = load_config("experiments/ipa.py", "smoke")
    config.seed, config.sandbox.isolation = 7, "required"
    start = init_config(config)
    assert (start.experiment, start.preset, start.seed, start.sandbox.isolation) == (
        "sft",
        "smoke",
        7,
        "required",
    )


def test_default_workdirs_of_two_configs_differ():
    one, two = load_config("experiments/ipa.py", "tiny"), load_config("experiments/ipa.py", "tiny")
    assert default_workdir(one) == default_workdir(two)
    two.seed = 1
    assert default_workdir(one) != default_workdir(two)


def test_a_workdir_of_another_config_is_refused(tmp_path):
    config = load_config("experiments/ipa.py", "tiny")
    claim_workdir(tmp_path, config)
    claim_workdir(tmp_path, config)
    config.gamma = 0.5
    with pytest.raises(ConfigError, match=r"gamma \(0.95 there, 0.5 now\)"):
        claim_workdir(tmp_path, config)
    assert json.loads((tmp_path / "config.json").read_text())["gamma"] == 0.95


@pytest.mark.parametrize(
    "flag, message",
    [
        ("--config.gama=1", "gama"),
        ("--config.seed=x", "--config.seed=x"),
        ("--nope=1", "nope"),
        ("--config=experiments/none.py", "experiments/none.py"),
        ("--config=experiments/ipa.py:huge", "no preset 'huge'"),
    ],
)
def test_the_command_line_answers_nonsense_with_one_line(flag, message, tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "launch.train",
            "--config=experiments/ipa.py:smoke",
            f"--workdir={tmp_path / 'run'}",
            flag,
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode not in (0, 130)
    assert message in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert not (tmp_path / "run").exists()


def test_a_misspelt_flag_gets_one_clean_line():
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "launch.train",
            "--config=experiments/ipa.py",
            "--config.group_sise=3",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert (
        "'group_sise'" in done.stderr and '"group_size"' in done.stderr and "\\" not in done.stderr
    )


def test_the_sandboxes_backend_is_the_configs_and_the_admins_token_the_environments(monkeypatch):
    config = load_config("experiments/ipa.py", "tiny")
    config.sandbox.backend, config.sandbox.url = "remote", "http://10.0.0.5:8730"
    monkeypatch.delenv(TOKEN, raising=False)
    with pytest.raises(
        ConfigError,
        match=(
            "config.sandbox: backend='remote' needs the admin's token in the environment variable"
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
        ConfigError, match="backend='podman' is unknown. Choose one of embedded, docker, remote"
    ):
        check_config(config)
