"""launch.train end to end on real processes: real engine, real sandboxes; killed, resumed,
repeated.
"""

import collections
import json
import pathlib
import shutil
import signal
import subprocess
import time

import pytest

from rome.data.trajectory import load_trajectory
from rome.version import VERSION
from tests.launch.runs import (
    SFT,
    TASKS,
    command,
    losses,
    metrics,
    refused,
    report,
    train,
    train_and_interrupt,
)
from tests.paths import ROOT
from tests.processes import user_environment

IPA = [
    "--config=experiments/ipa.py:smoke",
    f"--config.task={TASKS}",
    "--config.steps=3",
    "--config.groups=2",
    "--config.group_size=2",
    "--config.eval_tasks=1",
    "--config.eval_every=3",
    "--config.checkpoint_every=2",
]


@pytest.fixture(scope="module")
def sft(tmp_path_factory) -> pathlib.Path:
    workdir = tmp_path_factory.mktemp("sft") / "run"
    train(SFT, workdir)
    return workdir


def test_sft_leaves_what_programs_read(sft):
    document = report(sft)
    assert (
        document["experiment"] == "sft" and document["steps"] == 6 and document["wall_seconds"] > 0
    )
    assert document["isolation"] and document["version"].startswith(VERSION)
    assert [(entry["stage"], entry["step"]) for entry in document["evals"]] == [
        ("sft", 0),
        ("sft", 6),
    ]
    for entry in document["evals"]:
        assert 0 <= entry["low"] <= entry["success"] <= entry["high"] <= 1
        assert entry["n"] == sum(n for _, n in entry["by_family"].values()) >= 4
    assert [line["step"] for line in metrics(sft)] == list(range(1, 7)) and losses(sft)[
        -1
    ] < losses(sft)[0]
    assert (sft / "final" / "model.safetensors").exists() and list(sft.glob("*.png")) + list(
        sft.glob("*/*.png")
    )
    trajectory = json.loads(next((sft / "trajectories").glob("*.json")).read_text())
    assert (
        trajectory["schema_version"] == "ATIF-v1.7" and trajectory["steps"][1]["source"] == "agent"
    )


@pytest.mark.slow
def test_a_wish_to_stop_is_heard_while_the_experts_play_and_their_files_stay(tmp_path):
    workdir = tmp_path / "run"
    process = subprocess.Popen(
        command([*SFT, "--config.demonstrations=3000"], workdir),
        cwd=ROOT,
        env=user_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )

    def experts() -> list[pathlib.Path]:
        return list((workdir / "trajectories").glob("expert_*.json"))

    ends = time.monotonic() + 240
    while len(experts()) < 5 and process.poll() is None and time.monotonic() < ends:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=60)  # all experts would take minutes
    assert process.returncode == 130 and "To resume:" in said, said
    assert 5 <= len(experts()) < 3000
    for path in experts():
        assert load_trajectory(path).ending == "success"


@pytest.mark.slow
def test_a_killed_run_resumes_and_is_bitwise_the_run_that_was_not_killed(sft, tmp_path):
    assert (
        train_and_interrupt(SFT, tmp_path / "run", signal.SIGKILL, after_steps=3) == -signal.SIGKILL
    )
    train(SFT, tmp_path / "run")
    assert [line["step"] for line in metrics(tmp_path / "run")] == list(range(1, 7))
    assert losses(tmp_path / "run") == losses(sft)


@pytest.mark.long
def test_a_run_that_is_ended_does_nothing_when_started_again(sft):
    before = report(sft)
    train(SFT, sft)
    assert report(sft)["evals"] == before["evals"] and len(metrics(sft)) == 6


@pytest.mark.long
def test_a_workdir_of_another_config_is_refused_in_one_line(sft):
    done = subprocess.run(
        command([*SFT, "--config.seed=5"], sft),
        cwd=ROOT,
        env=user_environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (
        done.returncode == 1
        and "seed (0 there, 5 now)" in done.stderr
        and "Traceback" not in done.stderr
    )


@pytest.fixture(scope="module")
def ipa(sft, tmp_path_factory) -> pathlib.Path:
    """Return the workdir of a run of IPA that nobody disturbed."""
    workdir = tmp_path_factory.mktemp("ipa") / "run"
    train([*IPA, f"--config.init_from={sft / 'final'}"], workdir)
    return workdir


@pytest.mark.slow
def test_the_policy_is_trained_behind_an_agent_that_knows_nothing_of_it(sft, tmp_path):
    agent = "command:TELL_TOOLS=0 python3 $AGENT_FILES/outside_agent.py"
    flags = [
        f"--config.init_from={sft / 'final'}",
        f"--config.agent={agent}",
        f"--config.agent_files={ROOT / 'examples' / 'agents'}",
    ]
    train([*IPA, *flags], tmp_path / "run")
    found = report(tmp_path / "run")["accounting"]
    assert found["started"] == found["trained"] and not found["dropped"]
    assert all(line["max_mismatch"] < 1e-4 for line in metrics(tmp_path / "run"))


@pytest.mark.slow
def test_the_iflow_agent_trains_the_policy_as_the_plain_loop_does(sft, ipa, tmp_path):
    """The same seeds: the same tokens in every episode, and the same figures of every step."""
    flags = [f"--config.init_from={sft / 'final'}", "--config.agent=iflow"]
    train([*IPA, *flags], tmp_path / "run")
    names = sorted(path.name for path in (ipa / "trajectories").glob("ipa_*.json"))
    assert names == sorted(p.name for p in (tmp_path / "run" / "trajectories").glob("ipa_*.json"))
    for name in names:
        ours, theirs = (
            load_trajectory(run / "trajectories" / name) for run in (tmp_path / "run", ipa)
        )
        assert [c.action_ids for c in ours.chunks] == [c.action_ids for c in theirs.chunks]
        assert [c.prompt_ids for c in ours.chunks] == [c.prompt_ids for c in theirs.chunks]
        assert [c.tool_call for c in ours.chunks] == [c.tool_call for c in theirs.chunks]
        assert (ours.ending, ours.reward) == (theirs.ending, theirs.reward)
    losses = [[line["loss"] for line in metrics(run)] for run in (tmp_path / "run", ipa)]
    assert losses[0] == losses[1]


@pytest.mark.long
def test_ipa_trains_on_all_it_started_and_leaves_what_programs_read(ipa):
    assert_whole(ipa)


@pytest.mark.slow
@pytest.mark.parametrize("is_interrupted_first", [False, True])
def test_a_killed_run_of_ipa_ends_bitwise_as_the_run_that_was_left_alone(
    sft, ipa, tmp_path, is_interrupted_first
):
    flags, workdir = [*IPA, f"--config.init_from={sft / 'final'}"], tmp_path / "run"
    if is_interrupted_first:
        assert train_and_interrupt(flags, workdir, signal.SIGINT, after_steps=1) == 130
    status = train_and_interrupt(flags, workdir, signal.SIGKILL, after_steps=2)
    assert status in (-signal.SIGKILL, 0)
    train(flags, workdir)
    assert_whole(workdir)
    assert losses(workdir) == losses(ipa)


def assert_whole(workdir):
    """A run of IPA as above: every step, episode, demonstration and evaluation once."""
    lines, document = metrics(workdir), report(workdir)
    assert [line["step"] for line in lines] == [1, 2, 3]
    accounting = document["accounting"]
    assert (
        accounting["trained"] + accounting["dropped"].get("equal_group", 0) == 3 * 2 * 2
        and accounting["in_flight"] == 0
    )
    assert accounting["started"] == accounting["trained"] + sum(accounting["dropped"].values())
    names = collections.Counter(
        path.name[:10] for path in (workdir / "trajectories").glob("ipa_*_g*_e*.json")
    )
    assert names == {"ipa_000000": 4, "ipa_000001": 4, "ipa_000002": 4}
    shown = [
        len(list((workdir / "trajectories").glob(f"ipa_{step:06d}_expert_*.json")))
        for step in range(3)
    ]
    assert shown == [line["demonstrations"] for line in lines] and sum(shown) > 0
    assert all(line["max_mismatch"] < 1e-3 for line in lines if "max_mismatch" in line)
    assert [(entry["stage"], entry["step"]) for entry in document["evals"]] == [
        ("ipa", 0),
        ("ipa", 3),
    ]


@pytest.mark.slow
def test_an_engine_inside_the_trainer_gives_bitwise_the_run_of_an_engine_beside_it(
    sft, ipa, tmp_path
):
    workdir = tmp_path / "run"
    train([*IPA, f"--config.init_from={sft / 'final'}", "--config.engine.device=inside"], workdir)
    assert losses(workdir) == losses(ipa)
    names = [path.name for path in sorted((ipa / "trajectories").glob("ipa_*_g*_e*.json"))]
    assert len(names) == 12
    for name in names:
        theirs = load_trajectory(ipa / "trajectories" / name)
        ours = load_trajectory(workdir / "trajectories" / name)
        assert [sampled(chunk) for chunk in ours.chunks] == [
            sampled(chunk) for chunk in theirs.chunks
        ]
    assert not list((workdir / "weights").glob("**/*.safetensors"))
    final = [(run / "final" / "model.safetensors").read_bytes() for run in (workdir, ipa)]
    assert final[0] == final[1]


def sampled(chunk):
    return chunk.prompt_ids, chunk.action_ids, chunk.logprobs, chunk.versions


@pytest.mark.slow
@pytest.mark.parametrize("async_ratio", [0, 1])
def test_a_killed_run_with_the_engine_inside_resumes_from_what_is_there(
    sft, ipa, tmp_path, async_ratio
):
    """Killed with its engine; with stale samples it scores them by the versions it wrote."""
    flags = [
        *IPA,
        f"--config.init_from={sft / 'final'}",
        "--config.engine.device=inside",
        f"--config.rollout.async_ratio={async_ratio}",
    ]
    workdir = tmp_path / "run"
    assert train_and_interrupt(flags, workdir, signal.SIGINT, after_steps=1) in (130, 0)
    status = train_and_interrupt(flags, workdir, signal.SIGKILL, after_steps=2)
    assert status in (-signal.SIGKILL, 0)
    train(flags, workdir)
    lines, accounting = metrics(workdir), report(workdir)["accounting"]
    assert [line["step"] for line in lines] == [1, 2, 3] and accounting["in_flight"] == 0
    assert accounting["started"] == accounting["trained"] + sum(accounting["dropped"].values())
    assert all(line["max_mismatch"] < 1e-3 for line in lines if "max_mismatch" in line)
    if async_ratio:
        assert any(line["max_staleness"] == 1 for line in lines)
    else:
        assert losses(workdir) == losses(ipa)


@pytest.mark.slow
def test_killed_asynchronous_training_with_resampling_trains_on_nothing_twice_or_too_old(
    sft, tmp_path
):
    flags = [
        "--config=experiments/ipa.py:smoke",
        f"--config.init_from={sft / 'final'}",
        "--config.steps=6",
        "--config.groups=3",
        "--config.group_size=2",
        "--config.eval_every=0",
        "--config.eval_tasks=1",
        "--config.checkpoint_every=2",
        "--config.rollout.async_ratio=1",
        "--config.concurrency=4",
        "--config.rollout.resampling=parallel",
        "--config.rollout.resample_share=0.4",
        "--config.rollout.filter_groups=False",
    ]
    workdir = tmp_path / "run"
    assert train_and_interrupt(flags, workdir, signal.SIGKILL, after_steps=3) in (
        -signal.SIGKILL,
        0,
    )
    before = [json.loads(line) for line in (workdir / "steps.jsonl").read_text().splitlines()]
    train(flags, workdir)
    lines, accounting = metrics(workdir), report(workdir)["accounting"]
    assert [line["step"] for line in lines] == list(range(1, 7))
    # What old samples are compared with are the weights that sampled them, also where those were
    # read from the disk again.
    assert all(line["max_staleness"] <= 1 and line["max_mismatch"] < 1e-3 for line in lines)
    assert (
        sum(line["staleness"] for line in lines) > 0
        and sum(line["resampled"] for line in lines) > 0
    )
    steps = [json.loads(line) for line in (workdir / "steps.jsonl").read_text().splitlines()]
    assert steps[: len(before)] == before  # steps that were repeated took what they had taken
    taken = [
        tuple(group)
        for step in {entry["step"]: entry["groups"] for entry in steps}.values()
        for group in step
    ]
    assert len(taken) == len(set(taken)) == 6 * 3
    assert accounting["trained"] == 6 * 3 * 2 and accounting["in_flight"] == 0
    assert accounting["started"] == accounting["trained"] + sum(accounting["dropped"].values())
    resampled = [
        step["extra"]["kind"]
        for file in (workdir / "trajectories").glob("ipa_*_g*.json")
        for step in json.loads(file.read_text())["steps"][1:]
    ]
    assert {"context", "rl"} <= set(resampled)


@pytest.mark.slow
@pytest.mark.parametrize("replay", ["off", "rollout", "recompute"])
def test_routes_are_recorded_and_replayed_as_the_config_says(sft, tmp_path, replay):
    train(
        [
            *IPA,
            f"--config.init_from={sft / 'final'}",
            "--config.steps=2",
            f"--config.routing_replay={replay}",
        ],
        tmp_path / "run",
    )
    for line in metrics(tmp_path / "run"):
        assert line["max_mismatch"] < 1e-3
        if replay == "off":
            assert "route_agreement" not in line
        else:  # in float32 only the step's first update comes between the routes and the router
            assert 0.8 < line["route_agreement"] <= line["route_overlap"] <= 1
    steps = [
        step
        for file in (tmp_path / "run" / "trajectories").glob("ipa_*.json")
        for step in json.loads(file.read_text())["steps"][1:]
    ]
    assert steps and all(("routes" in step["extra"]) == (replay == "rollout") for step in steps)


@pytest.mark.long
def test_a_broken_checkpoint_is_named_with_the_remedy(sft, tmp_path):
    workdir = tmp_path / "run"
    subprocess.run(["cp", "-r", str(sft), str(workdir)], check=True)
    shutil.rmtree(workdir / "final")  # as if the run had been killed just before its end
    for file in (workdir / "checkpoints" / "6").rglob("*"):
        if file.is_file() and file.stat().st_size > 1000:
            file.write_bytes(b"torn")
    assert "checkpoints/6 cannot be read" in refused(SFT, workdir)
