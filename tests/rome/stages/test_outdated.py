"""A run that goes on with another schedule forgets what weights did that are gone."""

import json

import pytest

from rome.data.trajectory import Chunk, Trajectory, save_trajectory
from rome.stages.config import load_config
from rome.stages.experiment import open_workdir
from rome.train.report import outcomes_path, write_outcomes

SAVED = 4  # step of the newest checkpoint
AFTER = 6  # steps that were trained when the run was killed


def changed(**values):
    config = load_config("experiments/ipa.py", "smoke")
    config.update_from_flattened_dict({"groups": 1, "steps": 20, **values})
    return config


@pytest.fixture
def killed(tmp_path):
    """A workdir whose run was killed after step 6, two steps after its newest checkpoint."""
    open_workdir(tmp_path, changed())
    (tmp_path / "checkpoints" / str(SAVED)).mkdir(parents=True)
    (tmp_path / "trajectories").mkdir()
    with open(tmp_path / "steps.jsonl", "w") as journal:
        for step in range(AFTER):
            entry = {"step": step, "groups": [(step, 0)], "episodes": [[0]], "replaced": []}
            journal.write(json.dumps(entry) + "\n")
            save(tmp_path, step, version=step)
    for step in (0, SAVED, AFTER):
        write_outcomes(tmp_path, "ipa", step, {"tasks": []})
        outcomes_path(tmp_path, "ipa", step).with_suffix("").mkdir()
    return tmp_path


def save(workdir, wave, version):
    chunk = Chunk([1], [2, 3], [-0.5, -0.5], [(0, 0, 1), (version, 1, 2)])
    trajectory = Trajectory("t", "f", [chunk], 0.0, "failure", group=wave)
    save_trajectory(trajectory, workdir / "trajectories" / f"ipa_{wave:06d}_g000_e00.json")


def kept(workdir):
    lines = (workdir / "steps.jsonl").read_text().splitlines()
    journal = [json.loads(line)["step"] for line in lines]
    files = sorted(path.name for path in (workdir / "trajectories").iterdir())
    evaluated = sorted(path.name for path in (workdir / "evals").iterdir())
    return journal, [int(name.split("_")[1]) for name in files], evaluated


ALL = (
    [*range(AFTER)],
    [*range(AFTER)],
    [f"ipa_{step:06d}{kind}" for step in (0, SAVED, AFTER) for kind in ("", ".json")],
)
# The step after the checkpoint was played by the weights that it holds.
UP_TO_THE_CHECKPOINT = ([*range(SAVED + 1)], [*range(SAVED + 1)], ALL[2][:4])


@pytest.mark.parametrize(
    "change",
    [{"learning_rate": 1e-5}, {"clip": 0.1}, {"skip_nonfinite_updates": True}, {"steps": 40}],
)
def test_what_other_weights_played_is_neither_reported_nor_trained_on(killed, change):
    assert open_workdir(killed, changed(**change))["outdated_after"] == [SAVED]
    assert kept(killed) == UP_TO_THE_CHECKPOINT
    save(killed, SAVED + 1, version=SAVED + 1)  # the run goes on, and is killed again
    assert open_workdir(killed, changed(**change))["outdated_after"] == []
    assert SAVED + 1 in kept(killed)[1]


@pytest.mark.parametrize(
    "change", [{}, {"concurrency": 7}, {"episode_seconds": 9.0}, {"eval_every": 2}]
)
def test_what_the_same_weights_will_play_is_kept(killed, change):
    assert open_workdir(killed, changed(**change))["outdated_after"] == []
    assert kept(killed) == ALL


def test_more_steps_at_a_constant_rate_change_no_weights(tmp_path):
    open_workdir(tmp_path, changed(decay=False))
    write_outcomes(tmp_path, "ipa", 3, {"tasks": []})
    opened = open_workdir(tmp_path, changed(decay=False, steps=40))
    assert opened["changes"] and opened["outdated_after"] == []
    assert outcomes_path(tmp_path, "ipa", 3).exists()


def test_a_checkpoint_that_was_deleted_takes_what_an_older_schedule_did_with_it(killed):
    (killed / "checkpoints" / "2").mkdir()
    slower = changed(learning_rate=1e-5)
    open_workdir(killed, slower)
    (killed / "checkpoints" / str(SAVED)).rmdir()  # the run has diverged once more
    assert open_workdir(killed, slower)["outdated_after"] == [2]
    assert kept(killed) == ([0, 1, 2], [0, 1, 2], ["ipa_000000", "ipa_000000.json"])


def test_a_kill_while_it_is_deleted_leaves_it_to_the_next_start(killed, monkeypatch):
    def stop(path, step):
        raise KeyboardInterrupt

    slower = changed(learning_rate=1e-5)
    with monkeypatch.context() as patched:
        patched.setattr("rome.stages.outdated.drop_steps_after", stop)
        with pytest.raises(KeyboardInterrupt):
            open_workdir(killed, slower)
    assert open_workdir(killed, slower)["outdated_after"] == [SAVED]
    assert kept(killed) == UP_TO_THE_CHECKPOINT
