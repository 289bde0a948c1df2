"""A config runs with own code and its keys; wrong code is one line before anything starts."""

import pathlib

import numpy as np
import pytest

from rome import own_code
from rome.data.costs import rewards_differ
from rome.data.trajectory import load_trajectory, save_trajectory
from rome.losses import PUBLISHED, LossConfig, build_loss
from rome.stages.config import check_config, key_class, key_rules, load_config
from rome.stages.dry_run import episodes, tiny_step, try_loss, try_own_code
from rome.stages.own_code import own_advantage, own_filter, own_loss, own_reward
from rome.stages.schema import fill_own_keys, kind_of
from rome.stages.settings import loss_config
from rome.train.workdir import ConfigError, claim_workdir, default_workdir

OWN = "tests.rome.stages.own"


def config_of(changes=(), **roles):
    config = load_config("experiments/ipa.py", "tiny")
    config.unlock()
    for role, name in roles.items():
        config[role] = name if name in ("grpo", "ipa", "centred") else f"{OWN}:{name}"
    for key, value in dict(changes).items():
        block, _, last = key.rpartition(".")
        target = config
        for part in block.split("."):
            target = target[part]
        target[last] = value
    return config


def test_a_config_of_own_code_is_accepted_and_builds_what_it_names():
    config = config_of(
        {"own.loss.ceiling": 1.5, "own.reward.cost": 0.25},
        loss="Clipped",
        advantage="below_the_best",
        reward="ShortIsGood",
        filter="first_half",
    )
    check_config(config)
    try_own_code(config)
    assert own_loss(config).ceiling == 1.5
    assert own_advantage(config)(episodes(), [1.0, 0.5]) == [0.0, -0.5]
    assert own_reward(config)(episodes()[0]) == 1.0 - 0.25 * 2
    given = episodes()
    assert own_filter(config)(given) == given[:2]


def test_the_keys_of_own_code_are_checked_and_part_of_the_runs_identity():
    plain, same, other = (
        config_of(changes, loss="Clipped")
        for changes in ({}, {"own.loss.ceiling": 1.2}, {"own.loss.ceiling": 1.5})
    )
    for config in (plain, same, other):
        check_config(config)
    assert key_class("own.loss.ceiling") == "identity"
    names = [default_workdir(config, key_rules(config)) for config in (plain, same, other)]
    assert names[0] == names[1] != names[2]
    for key, value, message in [
        ("own.loss.ceilling", 2.0, "'ceilling' is unknown. Did you mean 'ceiling'"),
        ("own.reward.cost", 2.0, "own.reward.'cost' is unknown"),
        ("own.loss.ceiling", "high", "is a str. Give a number"),
        ("own.loss.ceiling", 0.5, "Clipped: ceiling=0.5 must be 1 or more"),
    ]:
        with pytest.raises(ConfigError, match=message):
            wrong = config_of({key: value}, loss="Clipped")
            check_config(wrong)
            try_own_code(wrong)


def test_a_workdir_takes_a_key_left_out_for_its_default(tmp_path):
    plain, same, other = (
        config_of(changes, loss="Clipped")
        for changes in ({}, {"own.loss.ceiling": 1.2}, {"own.loss.ceiling": 1.5})
    )
    for config in (plain, same, other):
        fill_own_keys(config)
    claim_workdir(tmp_path, same, key_rules(same))
    (tmp_path / "metrics.jsonl").touch()
    assert claim_workdir(tmp_path, plain, key_rules(plain)) == []
    with pytest.raises(ConfigError, match=r"own.loss.ceiling .1.2 there, 1.5 now"):
        claim_workdir(tmp_path, other, key_rules(other))


def test_own_losses_have_switches_and_advantages_where_their_spec_says_so():
    assert own_advantage(config_of(loss="Clipped")) == "normalised"
    assert own_advantage(config_of(loss="clipped")) == "centred"
    assert own_advantage(config_of(loss="grpo", advantage="centred")) == "centred"
    assert loss_config(config_of(loss="Clipped")).token_constant == 160
    for changes, message in [
        ({"clip_high": 0.3}, "clip_high=0.3 is not read by loss="),
        ({"group_size": 1}, "compares the episodes of a group"),
    ]:
        config = config_of(loss="Clipped")
        config.update(changes)
        with pytest.raises(ConfigError, match=message):
            check_config(config)
    with pytest.raises(ConfigError, match="advantage='centred' is not read by loss=ipa"):
        check_config(config_of(advantage="centred"))


def test_an_own_likelihood_is_a_loss_of_sft():
    config = load_config("experiments/sft.py", "tiny")
    config.loss = f"{OWN}:likelihood"
    check_config(config)
    try_own_code(config)
    assert kind_of(config.loss) == "sft" and loss_config(config) == LossConfig()


@pytest.mark.parametrize(
    "role, name, message",
    [
        ("loss", "mean_over_the_batch", "its value is .* where its rows are added up"),
        ("loss", "mean_as_a_metric", "its metric 'mean_logp' is .* where its rows are added up"),
        ("loss", "not_a_number", "value is nan on a tiny step"),
        ("loss", "gradient_not_a_number", "its gradient is not finite"),
        ("loss", "a_value_for_each_token", r"value has the shape \(2, 12\)"),
        ("loss", "no_metrics", "it returned a .*Tracer. Return the value and a dictionary"),
        ("loss", "metric_of_the_learner", "the metric 'entropy' is the learner's own"),
        ("loss", "reads_what_is_not_there", "failed on a tiny step: AttributeError: .*'rewards'"),
        ("loss", "too_few", "cannot be called with .logp_BT, batch, config, denominators"),
        ("advantage", "one_for_all", "returned 1 values for a group of 3 episodes"),
        ("reward", "infinite", "it returned inf"),
        ("reward", "fails", r"failed for an episode of example/0: AttributeError.*own.py, line"),
        ("filter", "others", "returned 1 episodes, 0 of them of the 3"),
        ("filter", "absent", "defines no 'absent'"),
    ],
)
def test_wrong_own_code_is_one_line_that_names_its_key(role, name, message):
    roles = {role: name} if role == "loss" else {"loss": "grpo", role: name}
    config = config_of(**roles)
    with pytest.raises(ConfigError, match=message) as caught:
        check_config(config)
        try_own_code(config)
    text = str(caught.value)
    assert text.count(f"config.{role}='{OWN}:{name}'") == 1 and "\n" not in text


@pytest.mark.long
@pytest.mark.parametrize("name", ["ipa", "gigpo", "examples/04_loss.py:clipped_reinforce_loss"])
def test_losses_of_papers_and_of_the_examples_pass_the_check_of_own_ones(name):
    try_loss(build_loss(name), LossConfig(**PUBLISHED.get(name, {})))


def test_the_tiny_step_has_two_rows_and_all_kinds_of_chunks():
    step = tiny_step()
    assert step.num_rows == 2 and set(step.kind_BC[step.valid_BC]) == {0, 1}
    assert set(np.sign(step.reward_BC[step.valid_BC])) == {-1.0, 1.0}


def test_groups_differ_by_the_reward_that_training_learns_from(tmp_path):
    alike = [episodes()[0], episodes()[0]]
    assert not rewards_differ(alike)
    alike[0].training_reward = 0.7
    assert rewards_differ(alike) and alike[0].succeeded and alike[0].reward == 1.0
    save_trajectory(alike[0], tmp_path / "one.json")
    assert load_trajectory(tmp_path / "one.json") == alike[0]


def test_a_file_beside_the_experiment_is_found_whatever_the_working_directory(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(own_code, "_folders", [])
    experiment = tmp_path / "lab" / "mine.py"
    experiment.parent.mkdir()
    experiment.write_text(
        "from experiments import ipa\n"
        "def get_config(preset='tiny'):\n"
        "    config = ipa.get_config(preset)\n"
        "    config.reward = 'rewards.py:half'\n"
        "    return config\n"
    )
    rewards = experiment.with_name("rewards.py")
    rewards.write_text("def half(episode):\n    return episode.reward / 2\n")
    monkeypatch.chdir("/")
    config = load_config(str(experiment), "tiny")
    check_config(config)
    assert own_reward(config)(episodes()[0]) == 0.5
    assert pathlib.Path(own_code.load("rewards.py:half").__code__.co_filename) == rewards
