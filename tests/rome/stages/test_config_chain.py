"""The experiments that an experiment starts from, checked together before the first one starts."""

import pytest

from rome.stages.config import check_chain, check_config, init_config, load_config
from rome.train.workdir import ConfigError, experiment_before


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


def chain_of(config) -> list:
    chain = [config]
    while experiment_before(chain[-1].init_from):
        chain.append(init_config(chain[-1]))
    return chain


@pytest.mark.parametrize("preset", ["tiny", "smoke", "qwen3_30b_a3b"])
def test_the_whole_pipeline_is_a_chain_that_is_checked_before_its_first_stage(preset):
    config = load_config("experiments/rome.py", preset)
    config.seed, config.eval_tasks = 5, 3
    check_chain(config)
    chain = chain_of(config)
    assert [(one.experiment, one.loss) for one in chain] == [
        ("rome", "ipa"),
        ("sft_stage2", "sft"),
        ("sft_stage1", "sft"),
        *[(one.experiment, "cpt") for one in chain[3:]],
    ]
    assert len(chain) > 3 and {one.seed for one in chain} == {5}
    played = [(one.eval_tasks, one.eval_task, one.task) for one in chain[:3]]
    assert len(set(played)) == 1  # one held-out evaluation
    assert len({one.experiment for one in chain}) == len(chain)


@pytest.mark.parametrize("size", ["tiny", "smoke", "qwen3_30b_a3b"])
def test_the_second_stage_of_pre_training_starts_from_the_first(size):
    last = load_config("experiments/sft.py", f"stage1_{size}")
    last.seed, last.init_from = 5, f"experiments/cpt.py:stage2-{size}"
    check_chain(last)
    chain = chain_of(last)
    assert [one.experiment for one in chain] == ["sft_stage1", "cpt_stage2", "cpt_stage1"]
    assert {one.seed for one in chain} == {5}
    for one, stage in zip(chain[1:], ("stage2", "stage1"), strict=True):
        alone = load_config("experiments/cpt.py", f"{stage}-{size}")
        assert (one.row_length, one.chunks_per_row) == (alone.row_length, alone.chunks_per_row)


def test_a_fault_in_any_stage_is_found_before_the_first_one_starts(tmp_path):
    (tmp_path / "last.py").write_text(
        "from experiments import sft\n"
        "def get_config(preset='tiny'):\n"
        "    config = sft.get_config(preset)\n"
        "    config.masks = 'looops'\n"
        "    return config\n"
    )
    config = load_config("experiments/ipa.py", "smoke")
    config.init_from = f"{tmp_path}/last.py:tiny"
    check_config(config)
    with pytest.raises(ConfigError, match="masks='looops': 'looops' is no mask"):
        check_chain(config)


def test_a_chain_without_a_beginning_is_refused(tmp_path):
    (tmp_path / "circle.py").write_text(
        "from experiments import sft\n"
        "def get_config(preset='tiny'):\n"
        "    config = sft.get_config('tiny')\n"
        f"    config.init_from = '{tmp_path}/circle.py:' + ('two' if preset == 'one' else 'one')\n"
        "    return config\n"
    )
    config = load_config("experiments/ipa.py", "smoke")
    config.init_from = f"{tmp_path}/circle.py:one"
    with pytest.raises(ConfigError, match="starts from itself"):
        check_chain(config)


def test_stages_of_one_name_are_refused_because_a_report_tells_them_apart_by_it(tmp_path):
    config = load_config("experiments/ipa.py", "smoke")
    config.init_from = "experiments/ipa.py:tiny"  # a second round of reinforcement learning
    with pytest.raises(ConfigError, match="experiment='ipa' names two stages of the chain ipa"):
        check_chain(config)
    config.experiment = "ipa_again"
    check_chain(config)


@pytest.mark.parametrize(
    "text, found",
    [
        ("experiments/sft.py", ("experiments/sft.py", "")),
        ("experiments/sft.py:stage1_smoke", ("experiments/sft.py", "stage1_smoke")),
        ("runs/a.python/final", None),
        ("Qwen3-30B-A3B", None),
        ("", None),
    ],
)
def test_the_experiment_before_is_told_from_a_directory(text, found):
    assert experiment_before(text) == found
