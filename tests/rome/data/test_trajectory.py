"""Trajectories survive their ATIF file unchanged."""

import dataclasses
import json
import pathlib
import tempfile
from unittest import mock

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
    routes_path,
    save_trajectory,
    to_atif,
)
from tests.rome.data.trees import ancestors, shapes

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


@st.composite
def trees(draw):
    made = [draw(chunks()) for _ in range(draw(st.integers(0, 4)))]
    if made and draw(st.booleans()):
        for chunk, (parent, edge) in zip(made, draw(shapes(4)), strict=False):
            chunk.parent, chunk.edge = parent, edge
    return made


trajectories = st.builds(
    Trajectory,
    task=text,
    family=text,
    chunks=trees(),
    reward=finite,
    ending=st.sampled_from(ENDINGS),
    group=st.integers(0, 9),
    episode=st.integers(0, 9),
    seed=st.integers(0, 2**31),
    instruction=text,
    seconds=finite,
    note=text,
    model=text,
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
def test_a_trajectory_comes_back_from_its_files_as_it_was(trajectory):
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "a.json")
        with mock.patch("os.fsync"):
            save_trajectory(trajectory, path)
        assert comparable(load_trajectory(path)) == comparable(trajectory)
        has_routes = any(chunk.routes is not None for chunk in trajectory.chunks)
        assert routes_path(path).exists() == has_routes
        routes_path(path).unlink(missing_ok=True)
        without = load_trajectory(path, routes=False)
    chunks = [dataclasses.replace(chunk, routes=None) for chunk in trajectory.chunks]
    assert comparable(without) == comparable(dataclasses.replace(trajectory, chunks=chunks))


@given(trajectories)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_every_field_of_atif_means_what_it_means_there(trajectory):
    steps = check_atif(to_atif(trajectory))
    for number, (step, chunk) in enumerate(zip(steps[1:], trajectory.chunks, strict=True)):
        path = [trajectory.chunks[place] for place in ancestors(trajectory, number)]
        read = [token for one in path for token in (*one.prompt_ids, *one.action_ids)]
        is_branch = (chunk.parent, chunk.edge) != (-1, "continuation")
        assert ("parent" in step["extra"]) == ("edge" in step["extra"]) == is_branch
        assert step["llm_call_count"] == bool(chunk.versions)
        assert step.get("is_copied_context", False) == (chunk.kind == "context")
        if chunk.tool_call is not None:
            [call] = step["tool_calls"]
            assert call["function_name"] == chunk.tool_call["name"]
            assert call["arguments"] == chunk.tool_call["arguments"]
        if chunk.versions:
            assert step["metrics"]["prompt_tokens"] == len(read) - len(chunk.action_ids)
            assert step["metrics"]["completion_token_ids"] == chunk.action_ids


def check_atif(document):
    """The rules of ATIF-v1.7 for the fields that we write, from its specification."""
    known = {"schema_version", "session_id", "agent", "steps", "final_metrics", "extra"}
    assert set(document) == known and document["schema_version"] == "ATIF-v1.7"
    assert {"name", "version"} <= set(document["agent"]) <= {"name", "version", "model_name"}
    steps = document["steps"]
    assert [step["step_id"] for step in steps] == list(range(1, len(steps) + 1))
    totals = dict.fromkeys(("prompt_tokens", "completion_tokens", "cached_tokens"), 0)
    for step in steps:
        assert isinstance(step["message"], str)
        ids = {call["tool_call_id"] for call in step.get("tool_calls", [])}
        assert all(isinstance(call["arguments"], dict) for call in step.get("tool_calls", []))
        for result in step.get("observation", {"results": []})["results"]:
            assert result.get("source_call_id") in {None, *ids}
        metrics = step.get("metrics", {})
        if metrics:
            assert step["source"] == "agent" and step["llm_call_count"] == 1
            assert "prompt_token_ids" not in metrics  # the whole prompt or none
            assert metrics["completion_tokens"] == len(metrics["completion_token_ids"])
        for name in totals:
            totals[name] += metrics.get(name, 0)
    expected = {f"total_{name}": total for name, total in totals.items()}
    assert document["final_metrics"] == expected | {"total_steps": len(steps)}
    return steps


@pytest.mark.live
def test_harbors_own_models_accept_and_read_a_trajectory():
    models = pytest.importorskip(
        "harbor.models.trajectories", reason="needs harbor, tests/requirements-live.txt"
    )

    @given(trajectories)
    @settings(max_examples=40, deadline=None, derandomize=True)
    def accept(trajectory):
        document = json.loads(json.dumps(to_atif(trajectory)))
        read = models.Trajectory.model_validate(document)
        for exclude_none in (False, True):
            again = json.loads(json.dumps(read.to_json_dict(exclude_none)))
            assert comparable(from_atif(again)) == comparable(from_atif(document))

    accept()


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


def with_routes(value):
    routes = np.full((3, 1, 1), value, np.uint8)
    return example(chunks=[Chunk([1], [2, 3], [-1.0, -2.0], routes=routes)])


def test_routes_that_are_not_those_of_the_file_are_refused(tmp_path):
    path = tmp_path / "a.json"
    save_trajectory(with_routes(1), path)
    before = path.read_bytes()
    save_trajectory(with_routes(2), path)
    path.write_bytes(before)  # as a kill leaves it that comes between the two files
    with pytest.raises(ValueError, match=r"a\.npz, are damaged, or those of another"):
        load_trajectory(path)
    routes_path(path).unlink()
    with pytest.raises(ValueError, match=r"a\.npz, are gone"):
        load_trajectory(path)


def test_a_kill_while_routes_are_written_leaves_no_trajectory(tmp_path, monkeypatch):
    def fail(source, target):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError):
        save_trajectory(with_routes(1), tmp_path / "a.json")
    assert not list(tmp_path.iterdir())


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


def test_an_unknown_ending_is_refused():
    with pytest.raises(ValueError, match="'won' of count/7 unknown"):
        example(ending="won")
