"""Identity, schedule and operation: which change of a config a workdir allows."""

import json
import pathlib

import pytest

from rome.stages.config import (
    KEY_CLASSES,
    key_rules,
    load_config,
)
from rome.stages.schema import schema_of_kind
from rome.train.workdir import (
    MODEL,
    ConfigError,
    claim_workdir,
    default_workdir,
    flatten,
    is_complete,
    mark_complete,
    read_changes,
)

PRESETS = ("tiny", "smoke", "qwen3_30b_a3b", "qwen3_235b_a22b")


def workdir_of(config) -> pathlib.Path:
    return default_workdir(config, key_rules(config))


def claim(workdir, config) -> list[dict]:
    return claim_workdir(workdir, config, key_rules(config))


# A value of its own for each class, as somebody would change it in a run that goes on.
OPERATION = {
    "engine.urls": "http://elsewhere:30000",
    "mesh.fsdp": 4,
    "concurrency": 7,
    "checkpoint_every": 3,
    "eval_every": 7,
    "alarm_kl": 0.5,
    "learner.remat": "full",
    "sandbox.url": "http://rock:8080",
}
SCHEDULE = {"steps": 500, "learning_rate": 1e-5, "skip_nonfinite_updates": True}
IDENTITY = {"seed": 1, "gamma": 0.5, "group_size": 8, "learner.capacity_factor": 1.5}


def changed(**values):
    config = load_config("experiments/ipa.py", "tiny")
    config.update_from_flattened_dict(values)
    return config


def test_every_key_with_a_class_is_a_key_of_an_experiment():
    keys = {key for kind in ("rl", "sft", "cpt") for key in flatten(dict(schema_of_kind(kind)))}
    blocks = {key.partition(".")[0] for key in keys}
    assert set(KEY_CLASSES) <= keys | blocks


def test_what_is_learnt_names_the_default_workdir_and_nothing_else_does():
    plain = workdir_of(changed())
    assert plain == workdir_of(changed())
    for key, value in (OPERATION | SCHEDULE).items():
        assert workdir_of(changed(**{key: value})) == plain, key
    others = {workdir_of(changed(**{key: value})) for key, value in IDENTITY.items()}
    assert len(others) == len(IDENTITY) and plain not in others


def test_a_key_that_is_new_in_the_code_renames_no_workdir():
    config = changed(seed=3)
    older = changed(seed=3)
    del older.gigpo_state
    assert default_workdir(older, key_rules(older)) == workdir_of(config)


@pytest.mark.parametrize("key", IDENTITY)
def test_a_workdir_of_another_config_is_refused(tmp_path, key):
    claim(tmp_path, changed())
    (tmp_path / "metrics.jsonl").touch()
    claim(tmp_path, changed())
    before = (tmp_path / "config.json").read_text()
    with pytest.raises(ConfigError, match=rf"{key} \(.* there, {IDENTITY[key]} now\)"):
        claim(tmp_path, changed(**OPERATION, **SCHEDULE, **{key: IDENTITY[key]}))
    assert (tmp_path / "config.json").read_text() == before and not read_changes(tmp_path)


@pytest.mark.parametrize("key", IDENTITY)
def test_a_workdir_in_which_nothing_was_made_takes_the_mended_config(tmp_path, key):
    claim(tmp_path, changed())
    (tmp_path / "trajectories").mkdir()  # what a stage makes before it looks at its limits
    (tmp_path / MODEL).write_text("{}")
    assert claim(tmp_path, changed(**{key: IDENTITY[key]})) == []
    assert not (tmp_path / MODEL).exists()
    (tmp_path / "trajectories" / "one.json").touch()
    with pytest.raises(ConfigError, match="belongs to another config"):
        claim(tmp_path, changed())


def test_a_run_goes_on_elsewhere_without_a_word_and_with_another_schedule_with_a_note(tmp_path):
    steps = changed().steps
    claim(tmp_path, changed())
    assert claim(tmp_path, changed(**OPERATION)) == []
    (tmp_path / "checkpoints" / "40").mkdir(parents=True)
    expected = [
        {"step": 40, "key": "learning_rate", "before": 5e-4, "after": 1e-5},
        {"step": 40, "key": "skip_nonfinite_updates", "before": False, "after": True},
        {"step": 40, "key": "steps", "before": steps, "after": 500},
    ]
    assert claim(tmp_path, changed(**SCHEDULE)) == expected
    assert claim(tmp_path, changed(**SCHEDULE)) == []
    assert read_changes(tmp_path) == expected
    back = {"step": 40, "key": "steps", "before": 500, "after": steps}
    assert claim(tmp_path, changed(**SCHEDULE | {"steps": steps})) == [back]
    assert read_changes(tmp_path) == [*expected, back]


@pytest.mark.parametrize("key", ["gigpo_state", "learner", "rollout.redundancy", "steps"])
def test_a_workdir_that_is_older_than_a_key_has_its_default(tmp_path, key):
    claim(tmp_path, changed())
    stored = json.loads((tmp_path / "config.json").read_text())
    block, _, name = key.rpartition(".")
    del (stored[block] if block else stored)[name]
    (tmp_path / "config.json").write_text(json.dumps(stored))
    assert claim(tmp_path, changed()) == []


def test_a_new_key_with_another_value_than_its_default_is_another_run(tmp_path):
    stored = changed().to_dict()
    del stored["gigpo_state"]
    (tmp_path / "config.json").write_text(json.dumps(stored))
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(ConfigError, match=r"gigpo_state .'history' there, 'observation' now"):
        claim(tmp_path, changed(gigpo_state="observation"))


@pytest.mark.parametrize("text", ["", "{", '{"seed": 0}{', "[" * 100_000])
def test_a_config_file_that_is_torn_is_named(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(ValueError, match=r"config.json is not JSON"):
        claim(tmp_path, changed())


def test_a_result_is_complete_until_more_steps_are_asked_for(tmp_path):
    (tmp_path / "final").mkdir()
    assert is_complete(tmp_path, changed())
    mark_complete(tmp_path, changed(steps=20))
    assert is_complete(tmp_path, changed(steps=20)) and is_complete(tmp_path, changed(steps=10))
    assert not is_complete(tmp_path, changed(steps=21))
    sft = load_config("experiments/sft.py", "tiny")
    mark_complete(tmp_path, sft)
    sft.until_success = 0.5
    assert not is_complete(tmp_path, sft)
