"""What a run survives, on real processes: it goes on, or says in one line what is wrong and
resumes; nothing is trained on twice or lost.
"""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import time

import pytest

from tests.chaos.runs import (
    IPA,
    ROOT,
    SFT,
    check_whole,
    command,
    environment,
    find,
    kill_group,
    metrics,
    output,
    training,
    wait_for_end,
    wait_for_steps,
    weights_are_finite,
)

# The limit is for hangs; what a run may take is said with Patience.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Where the runs begin: a model that can write tool calls, more or less."""
    workdir = tmp_path_factory.mktemp("sft") / "run"
    with training(SFT, workdir) as process:
        wait_for_end(process, workdir)
    return f"--config.init_from={workdir / 'final'}"


@pytest.mark.parametrize(
    "number, engines", [(signal.SIGKILL, 1), (signal.SIGKILL, 2), (signal.SIGSTOP, 2)]
)
def test_an_engine_that_dies_or_hangs_is_started_again_with_the_weights_of_the_step(
    start, tmp_path, number, engines
):
    workdir = tmp_path / "run"
    with training([*IPA, start, f"--config.engine.count={engines}"], workdir) as process:
        wait_for_steps(process, workdir, 2)
        victims = find(process.pid, "launch.serve")
        assert len(victims) == engines
        os.kill(victims[0], number)
        assert process.wait(240) == 0, output(workdir)[-2000:]
    check_whole(workdir)
    log = output(workdir)
    assert (
        "starting engine http://127.0.0.1:" in log
        and ("is dead" if number == signal.SIGKILL else "is suspect") in log
    )
    assert all(
        line["max_mismatch"] < 1e-3 for line in metrics(workdir)
    )  # what the new engine sampled is what the trainer computes


@pytest.mark.parametrize(
    "number, whom",
    [(signal.SIGKILL, "manager"), (signal.SIGKILL, "sandboxes"), (signal.SIGSTOP, "sandboxes")],
)
def test_sandboxes_that_are_lost_or_hang_are_infrastructure_and_their_episodes_are_played_again(
    start, tmp_path, number, whom
):
    """The manager of all of them, or each one's holder with the guard of its egress."""
    workdir = tmp_path / "run"
    with training(
        [
            *IPA,
            start,
            "--config.steps=8",
            "--config.sandbox.egress=model@127.0.0.1:9",
            "--config.episode_seconds=20",
        ],
        workdir,
    ) as process:
        wait_for_steps(process, workdir, 1)
        hurt = 0
        tries = 0
        while tries < 3 or (not hurt and tries < 200 and process.poll() is None):
            # The manager came first; there is none yet where it was killed a moment ago, and no
            # sandbox where the trainer is at work.
            found = sorted(find(process.pid, "host import zygote"))
            for victim in found[:1] if whom == "manager" else found[1:]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(victim, number)
                    hurt += 1
            time.sleep(1.0 if hurt else 0.05)
            tries += 1
        assert hurt
        assert process.wait(280) == 0, output(workdir)[-2000:]
    accounting = check_whole(workdir, steps=8)
    assert {reason for reason, count in accounting["dropped"].items() if count} <= {"infra_sandbox"}
    assert not find(os.getpid(), "host import zygote")


def test_a_torn_checkpoint_is_named_and_without_it_the_run_goes_on_from_the_one_before(
    start, tmp_path
):
    workdir = tmp_path / "run"
    flags = [*IPA, start]
    with training(flags, workdir) as process:
        wait_for_steps(process, workdir, 5)
        process.send_signal(signal.SIGKILL)
        process.wait(30)
    newest = max(
        (path for path in (workdir / "checkpoints").iterdir() if path.name.isdecimal()),
        key=lambda path: int(path.name),
    )
    for file in newest.rglob("*"):
        if file.is_file() and file.stat().st_size > 1000:
            file.write_bytes(b"torn")
    with training(flags, workdir) as process:
        assert process.wait(120) == 1
    assert f"checkpoints/{newest.name} cannot be read" in output(workdir)
    shutil.rmtree(newest)
    with training(flags, workdir) as process:
        assert process.wait(240) == 0, output(workdir)[-2000:]
    check_whole(workdir)


def test_engines_that_are_lent_to_the_learner_come_back_with_its_weights(start, tmp_path):
    workdir = tmp_path / "run"
    with training(
        [*IPA, start, "--config.engine.count=2", "--config.rollout.lend_engines=1"], workdir
    ) as process:
        assert process.wait(280) == 0, output(workdir)[-2000:]
    check_whole(workdir)
    assert all(line["engines"] == 2 and line["max_mismatch"] < 1e-3 for line in metrics(workdir))
    released = [
        (workdir / name).read_text().count("memory released")
        for name in ("engine.log", "engine_1.log")
    ]
    assert released == [0, 6]


def test_a_full_disk_is_said_in_one_line_and_room_is_all_that_the_run_needs(start, tmp_path):
    """The workdir lies on a file system of a few megabytes, in a mount namespace of the test."""
    run = " ".join(command([*IPA, start], tmp_path / "disk" / "run"))
    script = f"""
set -u
mount -t tmpfs -o size=45m tmpfs {tmp_path}/disk || exit 77
{run} > {tmp_path}/first.log 2>&1; echo first $?
mount -o remount,size=2g {tmp_path}/disk
{run} > {tmp_path}/second.log 2>&1; echo second $?
cp -r {tmp_path}/disk/run {tmp_path}/run
"""
    (tmp_path / "disk").mkdir()
    unshare = (
        ["unshare", "--mount"]
        if os.getuid() == 0
        else ["unshare", "--user", "--map-root-user", "--mount"]
    )
    done = subprocess.run(
        [*unshare, "bash", "-c", script],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=500,
    )
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip(f"no mount namespace to be had: {done.stderr[-200:]}")
    first = (tmp_path / "first.log").read_text()
    assert "first 1" in done.stdout and "No space left on device" in first.replace("\n", " "), (
        done.stdout + first[-1500:]
    )
    assert "second 0" in done.stdout, (tmp_path / "second.log").read_text()[-1500:]
    check_whole(tmp_path / "run")


# For runs that must get through on a machine that does much else: more time for what depends on it.
UNHURRIED = ["--config.episode_seconds=600", "--config.start_seconds=600"]


OUTSIDE = [
    "--config.agent=command:TELL_TOOLS=0 python3 $AGENT_FILES/outside_agent.py",
    f"--config.agent_files={ROOT / 'examples/agents'}",
]


@pytest.mark.parametrize("agent", [[], OUTSIDE], ids=["plain", "command"])
def test_the_trainer_is_killed_again_and_again_and_the_run_ends_whole(start, tmp_path, agent):
    """With the trainer its proxy is killed, and with that the agents in their sandboxes."""
    workdir = tmp_path / "run"
    flags = [*IPA, *UNHURRIED, start, "--config.checkpoint_every=1", "--config.keep_trajectories=1"]
    flags += agent
    for steps in (1, 2, 4):
        with training(flags, workdir) as process:
            wait_for_steps(process, workdir, steps)
            kill_group(process)
    with training(flags, workdir) as process:
        wait_for_end(process, workdir)
    check_whole(workdir)
    assert "resumed at step" in output(workdir)


@pytest.mark.timeout(5400)
def test_a_run_that_is_killed_15_times_at_random_moments_ends_whole(start, tmp_path):
    """Moments are drawn from the time that a start takes to its first step, and a quarter more.

    So they lie in imports, in compilations, in the start of engines, in episodes, in updates, in
    publications and in saves, however fast the machine is.
    """
    workdir = tmp_path / "run"
    flags = [*IPA, *UNHURRIED, start, "--config.checkpoint_every=1", "--config.steps=24"]
    seed = time.time_ns()
    moments = random.Random(seed)
    began = time.monotonic()
    with training(flags, workdir) as process:
        wait_for_steps(process, workdir, 1)
        once = time.monotonic() - began
        kill_group(process)
    kills = 1
    reached = [1]
    while kills < 15:
        with training(flags, workdir) as process:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(moments.uniform(0, 1.25 * once))
            if process.poll() is not None:  # it was done first
                break
            kill_group(process)
        kills += 1
        reached.append(len(metrics(workdir)))
    assert kills == 15, f"seed {seed}: done after {kills} kills and steps {reached}"
    with training(flags, workdir) as process:
        wait_for_end(process, workdir)
    check_whole(workdir, steps=24)
    assert weights_are_finite(workdir / "final"), f"seed {seed}, steps {reached}"
