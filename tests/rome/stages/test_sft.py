"""What SFT learns from: demonstrations that a row can hold."""

import asyncio
import collections
import dataclasses
import types

import pytest

from rome.data.trajectory import Chunk, Trajectory, load_trajectory, save_trajectory
from rome.rollout import demonstrations
from rome.rollout.demonstrations import collect_demonstrations
from rome.stages.config import load_config
from rome.stages.sft import SFTStage
from rome.stages.tasks import tasks_of
from rome.train.workdir import ConfigError
from tests.rome.rollout.worlds import CHAT


def stage_of(**changes):
    """A stage as far as it looks at its demonstrations, and the notes that it shows."""
    stage = SFTStage.__new__(SFTStage)
    stage.config = load_config("experiments/sft.py", "smoke")
    stage.config.update(changes)
    notes = []
    stage.display = types.SimpleNamespace(note=notes.append)
    return stage, notes


def demonstration(tokens, turns=1):
    chunks = [Chunk([1], [2], [0.0])] * (turns - 1)
    chunks.append(Chunk([1] * (tokens - 2 * turns + 1), [2], [0.0]))
    return Trajectory("count/1", "count", chunks, 1.0, "success")


def test_demonstrations_that_no_row_holds_are_left_out_and_counted():
    stage, notes = stage_of(row_length=24, chunks_per_row=3)
    short, full = demonstration(10), demonstration(24, turns=3)
    long, many = demonstration(25), demonstration(20, turns=4)
    numbered = {3: short, 5: long, 6: full, 9: many}
    assert stage._leave_out_long(numbered) == {3: short, 6: full}
    assert len(notes) == 1 and notes[0].startswith("2 of 4 demonstrations are left out")
    assert stage._leave_out_long({1: short}) == {1: short} and len(notes) == 1


def test_rows_that_hold_no_demonstration_are_an_error_with_the_size_that_is_needed():
    stage, _ = stage_of(row_length=8)
    with pytest.raises(ConfigError, match=r"none of the 2 .* shortest has 25 tokens.*row_length"):
        stage._leave_out_long({0: demonstration(25), 1: demonstration(30)})


def with_tasks(stage, tmp_path):
    stage.workdir = tmp_path
    stage.players = types.SimpleNamespace(tasks=tasks_of(stage.config))
    return stage


def test_shares_stay_exact_whatever_the_filter_left_out_of_one(tmp_path):
    stage, _ = stage_of(
        demonstration_task="0.7*terminal + 0.15*problems:math + 0.15*problems:text",
        demonstrations=20,
    )
    with_tasks(stage, tmp_path)
    counts = collections.Counter(shown.share for shown in stage._shown)
    assert counts == {0: 14, 1: 3, 2: 3}
    few = {number: demonstration(9) for number in range(20) if stage._shown[number].share != 0}
    few |= {0: demonstration(10)}
    parts = stage._by_share(few)
    assert [(len(members), round(weight, 2)) for members, weight in parts] == [
        (1, 0.7),
        (3, 0.15),
        (3, 0.15),
    ]
    with pytest.raises(ConfigError, match="no demonstration of terminal#"):
        stage._by_share({number: one for number, one in few.items() if number})


def test_candidates_are_of_one_task_and_stages_show_other_tasks(tmp_path):
    stage, _ = stage_of(demonstrations=4, candidates=3)
    shown = with_tasks(stage, tmp_path)._shown
    assert [one.task for one in shown[:3]] == [shown[0].task] * 3 and len(shown) == 12
    other, _ = stage_of(demonstrations=4, experiment="sft_stage2")
    assert not {one.task for one in with_tasks(other, tmp_path)._shown} & {
        one.task for one in shown
    }


def test_what_the_selection_removed_is_written_and_reported(tmp_path):
    stage, notes = stage_of(select="filtered")
    with_tasks(stage, tmp_path)
    played = {number: demonstration(9) for number in range(3)}
    played[1] = dataclasses.replace(played[1], ending="truncated_turns")
    assert stage.report_more() == {}
    assert stage._select(played) == [0, 2]
    assert notes == ["filtered: 2 of 3 demonstrations are learned; removed: truncated 1"]
    assert stage.report_more()["selection"] == {
        "select": "filtered",
        "played": 3,
        "removed": {"truncated": 1},
        "kept": 2,
    }
    with pytest.raises(ConfigError, match="removed all 1 demonstrations"):
        stage._select({1: played[1]})


def test_a_damaged_file_of_decisions_is_refused_with_its_line(tmp_path):
    (tmp_path / "decisions.jsonl").write_text('{"id": "a"}\n')
    stage, _ = stage_of(select="preferred", feedback=str(tmp_path / "decisions.jsonl"))
    with pytest.raises(ConfigError, match=r"config.feedback: .*decisions.jsonl:1"):
        with_tasks(stage, tmp_path)._select({0: demonstration(9)})


@pytest.mark.parametrize("content", ["", "{", "[" * 100_000, "whole"], ids=range(4))
def test_a_demonstration_whose_file_was_cut_off_is_played_again(tmp_path, content, monkeypatch):
    path = tmp_path / "expert.json"
    if content == "whole":
        save_trajectory(demonstration(10), path)
    else:
        path.write_text(content)
    played = []

    async def play(make_env, task, *_):
        played.append(task)
        return demonstration(9)

    monkeypatch.setattr(demonstrations, "_demonstrate_until_played", play)
    collecting = collect_demonstrations(
        {0: "count/1"},
        lambda task: None,
        CHAT,
        error_rate=0.0,
        concurrency=1,
        record=lambda n: path,
    )
    found = asyncio.run(collecting)[0]
    assert played == ([] if content == "whole" else ["count/1"])
    assert load_trajectory(path) == found
