"""What a zygote that was killed leaves is removed by the next one, whatever it left."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from envs.rock.host import cgroups, slots

SLOT = 19_321  # far from those that zygotes of other tests begin with
DEAD = 4_194_305  # above the largest process id of Linux


@pytest.fixture
def base(tmp_path):
    (tmp_path / "state").mkdir()
    return tmp_path / "state"


@pytest.fixture
def groups():
    """Cgroups as a sandbox of a zygote that has died has them."""
    place, reason = cgroups.find()
    if place is None:
        pytest.skip(f"no cgroups here: {reason}")
    made = cgroups.create(place, f"rock-{SLOT}-{DEAD}", 1 << 25, 8, 1.0)
    yield made
    cgroups.remove([path for path in made if os.path.isdir(path)], kill=True)


def leave_record(base: pathlib.Path, groups: list[str], fenced: bool = False) -> None:
    record = {"zygote": DEAD, "fenced": fenced, "cgroups": groups}
    (base / f"{SLOT}.lock").write_text(json.dumps(record).ljust(slots.RECORD_BYTES))


@pytest.mark.parametrize("snapshots", [0, 1, 3])
def test_the_sweep_removes_the_groups_of_a_sandbox_and_of_one_with_snapshots(
    base, groups, snapshots
):
    leave_record(base, groups)
    for number in range(snapshots):
        (base / f"{SLOT}.{number}.snapshot" / "workspace").mkdir(parents=True)
    slots.sweep(str(base))
    assert not any(map(os.path.isdir, groups)) and os.listdir(base) == []


def test_a_fenced_sandbox_with_a_snapshot_loses_its_processes_and_directory_too(base):
    if os.geteuid() != 0:
        pytest.skip("only root gives sandboxes of this tier user ids of their own")
    leave_record(base, [], fenced=True)
    (base / f"{SLOT}.1.snapshot").mkdir()
    (base / str(SLOT) / "workspace").mkdir(parents=True)
    uid = slots.FIRST_UID + SLOT
    process = subprocess.Popen(
        [sys.executable, "-c", f"import os, time; os.setuid({uid}); print(1, flush=True);"
         " time.sleep(600)"],
        stdout=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout.readline() == b"1\n"
    slots.sweep(str(base))
    assert process.wait(60) == -9 and os.listdir(base) == []


@pytest.mark.parametrize("damaged", [0, 1, 13, 40, "12", "[]", '{"cgroups": 7}', "\0" * 40])
def test_a_damaged_record_stops_nothing_and_its_groups_are_found_by_name(base, groups, damaged):
    """A number stands for a record that was cut after so many bytes."""
    leave_record(base, groups)
    record = (base / f"{SLOT}.lock").read_text()
    text = record[:damaged] if isinstance(damaged, int) else damaged
    (base / f"{SLOT}.lock").write_text(text)
    (base / str(SLOT)).mkdir()
    slots.sweep(str(base))
    assert not any(map(os.path.isdir, groups)) and os.listdir(base) == []


def test_a_zygote_that_nobody_has_collected_is_dead(base):
    """Killed with its manager, it waits for the machine's first process, which may be slow."""
    place, reason = cgroups.find()
    if place is None:
        pytest.skip(f"no cgroups here: {reason}")
    zygote = subprocess.Popen(["/bin/true"])
    os.waitid(os.P_PID, zygote.pid, os.WEXITED | os.WNOWAIT)
    theirs = cgroups.create(place, f"rock-{SLOT}-{zygote.pid}", 1 << 25, 8, 1.0)
    try:
        (base / f"{SLOT}.lock").write_text("")
        (base / f"programs-{zygote.pid}").mkdir()
        slots.sweep(str(base))
        assert not any(map(os.path.isdir, theirs)) and os.listdir(base) == []
    finally:
        cgroups.remove([path for path in theirs if os.path.isdir(path)])
        zygote.wait()


@pytest.mark.parametrize("alive", [True, False])
def test_copies_of_programs_go_with_their_zygote(base, alive):
    zygote = os.getpid() if alive else DEAD
    (base / f"programs-{zygote}").mkdir()
    slots.sweep(str(base))
    assert os.listdir(base) == ([f"programs-{zygote}"] if alive else [])


def test_groups_of_a_zygote_that_lives_are_not_those_of_a_damaged_record(base):
    place, reason = cgroups.find()
    if place is None:
        pytest.skip(f"no cgroups here: {reason}")
    theirs = cgroups.create(place, f"rock-{SLOT}-{os.getpid()}", 1 << 25, 8, 1.0)
    try:
        (base / f"{SLOT}.lock").write_text("{")
        slots.sweep(str(base))
        assert all(map(os.path.isdir, theirs))
    finally:
        cgroups.remove(theirs)


@pytest.mark.parametrize("name", ["x.lock", "x.snapshot", ".lock", "1.2.3", "-1.lock", "notes"])
def test_files_of_other_names_are_left_alone(base, name):
    (base / name).write_text("")
    slots.sweep(str(base))
    assert os.listdir(base) == [name]
