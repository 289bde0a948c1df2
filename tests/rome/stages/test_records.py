"""SFT on trajectories that the config names: refused early, learned, and resumed."""

import json
import types

import numpy as np
import pytest

from rome.data.trajectory import Chunk, Trajectory
from rome.stages.config import ConfigError, check_config, load_config
from rome.stages.experiment import isolation_of, run_stages
from rome.stages.records import score_held_out_records
from rome.train.report import EvalResult, TrajectoryEval, evaluation_of, read_report
from rome.train.step import Learner
from rome.train.team import Team


def write_talk(path, count=60):
    lines = []
    for number in range(count):
        said = f"the next one is {number + 1}"
        messages = [
            {"role": "user", "content": f"count on from {number}"},
            {"role": "assistant", "content": said},
        ]
        lines.append(json.dumps({"messages": messages}))
    path.write_text("\n".join(lines))
    return path


def config_of(data, **changes):
    config = load_config("experiments/sft.py", "smoke")
    config.trajectories = str(data)
    config.eval_tasks = 0
    config.update(changes)
    return config


def test_a_run_without_tasks_needs_no_sandbox_and_no_engine(tmp_path):
    config = config_of(tmp_path)
    check_config(config)
    assert isolation_of(config, lambda: False) == "no sandbox"


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"trajectories": "0.5*a + b"}, "config.trajectories: .* some of its parts only"),
        ({"trajectories": ""}, "eval_tasks=0 plays no task"),
        ({"until_success": 0.5}, "eval_tasks=0 plays none. Set until_success to 0"),
        ({"held_out_share": 1.0}, "held_out_share=1.0 must be below 1"),
        ({"held_out_share": 0.0}, "held_out_share=0.0 must be above 0"),
    ],
)
def test_a_config_that_cannot_run_is_refused(tmp_path, changes, complaint):
    with pytest.raises(ConfigError, match=complaint):
        check_config(config_of(tmp_path, **changes))


@pytest.mark.parametrize(
    ("content", "complaint"),
    [(None, "no file or folder"), ('{"messages": []}', "begins with nobody"), ("{", "not JSON")],
)
def test_trajectories_of_which_nothing_is_left_end_the_run_before_it_begins(
    tmp_path, content, complaint
):
    path = tmp_path / "x.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=f"config.trajectories: .*{complaint}"):
        run_stages(config_of(path), tmp_path / "run", "no sandbox", Team())
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_evaluations_are_told_apart_by_what_was_evaluated():
    scored = {"bits_per_token": 2.5, "tokens": 7}
    task = {"task": "t/1", "family": "t", "difficulty": "", "source": "terminal", "success": 1}
    task |= {"unseen_family": False}
    alone = evaluation_of("sft", 3, scored)
    both = evaluation_of("sft", 3, {"tasks": [task]} | scored)
    assert alone == TrajectoryEval("sft", 3, 2.5, 7) and "2.500 bits a token" in alone.summary()
    assert isinstance(both, EvalResult) and both.success == 1.0 and both.bits_per_token == 2.5
    assert "2.500 bits a token" in both.summary()


class Interrupted(Exception):
    pass


class Watched:
    """Notes the rows of each update, and can interrupt one."""

    def __init__(self, monkeypatch):
        self.rows = []
        self.fails_at = -1
        update = Learner.update

        def watched(learner, state, microbatches, *counts):
            if len(self.rows) == self.fails_at:
                raise Interrupted
            self.rows.append(np.concatenate([batch.tokens_BT for batch in microbatches]))
            return update(learner, state, microbatches, *counts)

        monkeypatch.setattr(Learner, "update", watched)


def test_held_out_records_without_a_turn_to_learn_are_named():
    harm = Chunk([1], [2], [0.0], kind="imitation", events=["tests"])
    library = types.SimpleNamespace(held_out=[Trajectory("t", "f", [harm], 1.0, "success")])
    config = types.SimpleNamespace(
        trajectories="DIR",
        eval_trajectories=4,
        row_length=8,
        chunks_per_row=4,
        rows_per_microbatch=1,
    )
    learner = types.SimpleNamespace(
        score=lambda params, batches: [np.zeros(one.tokens_BT.shape) for one in batches]
    )
    with pytest.raises(ConfigError, match="none of the turns of the 1 held-out records of DIR"):
        score_held_out_records(learner, types.SimpleNamespace(params=None), library, config)


@pytest.mark.slow
def test_sft_on_messages_lowers_the_held_out_bits_and_goes_on_where_it_was_killed(
    tmp_path, monkeypatch
):
    data = write_talk(tmp_path / "talk.jsonl")
    watched = Watched(monkeypatch)
    assert run_stages(config_of(data, steps=12), tmp_path / "whole", "no sandbox", Team())
    first, last = read_report(tmp_path / "whole")["evals"]
    assert isinstance(first, TrajectoryEval) and first.tokens == last.tokens > 0
    assert last.bits_per_token < first.bits_per_token / 2
    whole, watched.rows = watched.rows, []
    for watched.fails_at in (5, 9):
        with pytest.raises(Interrupted):
            run_stages(config_of(data, steps=12), tmp_path / "killed", "no sandbox", Team())
    watched.fails_at = -1
    assert run_stages(config_of(data, steps=12), tmp_path / "killed", "no sandbox", Team())
    assert len(watched.rows) == 12
    assert all(np.array_equal(one, other) for one, other in zip(whole, watched.rows, strict=True))
    assert read_report(tmp_path / "killed")["evals"][-1] == last


@pytest.mark.slow
def test_other_records_than_those_of_the_checkpoint_are_refused(tmp_path, monkeypatch):
    data = write_talk(tmp_path / "talk.jsonl")
    watched = Watched(monkeypatch)
    watched.fails_at = 1
    config = config_of(data, steps=3)
    with pytest.raises(Interrupted):
        run_stages(config, tmp_path / "run", "no sandbox", Team())
    write_talk(data, 61)
    with pytest.raises(ConfigError, match="are not what the checkpoint of step 1 was trained on"):
        run_stages(config, tmp_path / "run", "no sandbox", Team())
