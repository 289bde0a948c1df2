"""Trajectories survive their ATIF file unchanged."""

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rome.data.trajectory import (
    ENDINGS,
    KINDS,
    STATUSES,
    Chunk,
    Trajectory,
    from_atif,
    load_trajectory,
    save_trajectory,
    to_atif,
)

ids = st.lists(st.integers(0, 2**31 - 1), max_size=5)
finite = st.floats(allow_nan=False, allow_infinity=False)
text = st.text(max_size=20)
calls = st.none() | st.fixed_dictionaries(
    {
        "name": text,
        "arguments": st.dictionaries(text, text | st.integers() | st.booleans(), max_size=2),
    }
)


@st.composite
def chunks(draw):
    prompt_ids, action_ids = draw(ids), draw(ids)
    tokens = len(prompt_ids) + len(action_ids)
    with_routes = draw(st.booleans()) and tokens
    return Chunk(
        prompt_ids=prompt_ids,
        action_ids=action_ids,
        logprobs=draw(st.lists(finite, min_size=len(action_ids), max_size=len(action_ids))),
        versions=[(draw(st.integers(0, 9)), 0, len(action_ids))] if draw(st.booleans()) else [],
        text=draw(text),
        tool_call=draw(calls),
        observation=draw(text),
        status=draw(st.sampled_from(STATUSES)),
        kind=draw(st.sampled_from(KINDS)),
        exit_code=draw(st.none() | st.integers(0, 255)),
        cached_tokens=draw(st.integers(0, 99)),
        routes=(
            np.arange(tokens * 6)
            .astype(draw(st.sampled_from([np.uint8, np.uint16])))
            .reshape(tokens, 3, 2)
            if with_routes
            else None
        ),
    )


trajectories = st.builds(
    Trajectory,
    task=text,
    family=text,
    chunks=st.lists(chunks(), max_size=3),
    reward=finite,
    ending=st.sampled_from(ENDINGS),
    group=st.integers(0, 9),
    episode=st.integers(0, 9),
    seed=st.integers(0, 2**31),
    instruction=text,
    seconds=finite,
    note=text,
)


def comparable(trajectory):
    """All fields, floats bit for bit (0.0 and -0.0 differ), arrays as (dtype, values)."""
    fields = dataclasses.asdict(trajectory)
    for chunk in fields["chunks"]:
        chunk["logprobs"] = [float(p).hex() for p in chunk["logprobs"]]
        chunk["routes"] = (
            None if chunk["routes"] is None else (chunk["routes"].dtype, chunk["routes"].tolist())
        )
    return fields | {"reward": trajectory.reward.hex(), "seconds": trajectory.seconds.hex()}


@given(trajectories)
@settings(max_examples=80, deadline=None, derandomize=True)
def test_a_trajectory_comes_back_from_atif_as_it_was(trajectory):
    document = json.loads(json.dumps(to_atif(trajectory)))
    assert comparable(from_atif(document)) == comparable(trajectory)
    assert [step["step_id"] for step in document["steps"]] == list(
        range(1, len(trajectory.chunks) + 2)
    )


def example(**changes):
    return Trajectory(
        **{
            "task": "count/7",
            "family": "count",
            "chunks": [Chunk([1, 2], [3, 4], [-0.5, -1e-9], versions=[(3, 0, 1), (2, 1, 2)])],
            "reward": 1.0,
            "ending": "success",
        }
        | changes
    )


def test_a_file_is_replaced_whole(tmp_path):
    path = tmp_path / "a.json"
    save_trajectory(example(), path)
    save_trajectory(example(reward=0.0, ending="failure"), path)
    assert load_trajectory(path) == example(reward=0.0, ending="failure")
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize(
    "broken", [{}, {"steps": []}, {"steps": [{"source": "agent"}]}, {"steps": None}]
)
def test_a_foreign_document_is_refused_in_one_line(broken):
    with pytest.raises(ValueError, match="not a trajectory of this project"):
        from_atif(broken)


def test_only_the_policys_own_endings_are_trainable():
    assert {ending for ending in ENDINGS if example(ending=ending).trainable} == {
        "success",
        "failure",
        "truncated_turns",
        "truncated_tokens",
        "timeout",
        "malformed",
        "unsafe",
    }
    assert not example(chunks=[]).trainable


def test_the_oldest_version_is_the_one_that_staleness_counts_from():
    assert example().oldest_version == 2


@pytest.mark.parametrize("reward", [float("nan"), float("inf")])
def test_a_reward_that_is_no_number_is_refused(reward):
    with pytest.raises(ValueError, match="not finite"):
        example(reward=reward)


@pytest.mark.parametrize(
    ("field", "value"), [("logprobs", [-1.0]), ("status", "odd"), ("kind", "odd")]
)
def test_a_chunk_that_contradicts_itself_is_refused(field, value):
    with pytest.raises(ValueError, match=r"logprob|unknown"):
        Chunk(**{"prompt_ids": [1], "action_ids": [2, 3], "logprobs": [-1.0, -2.0], field: value})


@pytest.mark.parametrize(
    "routes",
    [np.zeros((2, 3, 2), np.uint8), np.zeros((3, 6), np.uint8), np.zeros((3, 3, 2), np.int32)],
)
def test_routes_that_do_not_belong_to_the_chunks_tokens_are_refused(routes):
    with pytest.raises(ValueError, match=r"chunk has 3 tokens but routes"):
        Chunk([1], [2, 3], [-1.0, -2.0], routes=routes)


def test_damaged_routes_in_a_file_are_named():
    chunk = Chunk([1], [2, 3], [-1.0, -2.0], routes=np.ones((3, 1, 1), np.uint8))
    document = to_atif(example(chunks=[chunk]))
    document["steps"][1]["extra"]["routes"]["shape"] = [9, 1, 1]
    with pytest.raises(ValueError, match="routes unpack to 3 bytes"):
        from_atif(document)


def test_an_unknown_ending_is_refused():
    with pytest.raises(ValueError, match="'won' of count/7 unknown"):
        example(ending="won")
