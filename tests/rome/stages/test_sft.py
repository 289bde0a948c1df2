"""What SFT learns from: demonstrations that a row can hold."""

import asyncio
import types

import pytest

from rome.data.trajectory import Chunk, Trajectory, load_trajectory, save_trajectory
from rome.rollout import demonstrations
from rome.rollout.demonstrations import collect_demonstrations
from rome.stages.config import load_config
from rome.stages.sft import SFTStage
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
    assert stage._leave_out_long([short, long, full, many]) == [short, full]
    assert len(notes) == 1 and notes[0].startswith("2 of 4 demonstrations are left out")
    assert stage._leave_out_long([short]) == [short] and len(notes) == 1


def test_rows_that_hold_no_demonstration_are_an_error_with_the_size_that_is_needed():
    stage, _ = stage_of(row_length=8)
    with pytest.raises(ConfigError, match=r"none of the 2 .* shortest has 25 tokens.*row_length"):
        stage._leave_out_long([demonstration(25), demonstration(30)])


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
