"""The Makefile and launch/setup.sh in a small project of their own: what a user meets before any of
our Python runs.
"""

import os
import pathlib
import pty
import re
import select
import shutil
import subprocess
import sys
import time

import pip
import pytest

from tests.paths import ROOT

OLD_PYTHON = """#!/bin/sh
case "$*" in *version_info\\ \\<*) exit 1;; *) echo 3.9;; esac
"""
JOB = """
import signal, sys, time
caught = []
signal.signal(signal.SIGINT, lambda *_: caught.append(1))
print("arguments", sys.argv[1:], flush=True)
if "--wait" in sys.argv:
    while not caught:
        time.sleep(0.02)
    time.sleep(0.5)  # a second signal would come in now
    print(f"saved after {len(caught)} signal", flush=True)
    sys.exit(130)
sys.exit(3 if "--fail" in sys.argv else 0)
"""


@pytest.fixture
def project(tmp_path):
    """The Makefile and the setup over an empty requirements file, a .venv that has nothing to
    install, and a job that reports signals.
    """
    (tmp_path / "launch").mkdir()
    shutil.copy(ROOT / "Makefile", tmp_path)
    shutil.copy(ROOT / "launch" / "setup.sh", tmp_path / "launch")
    (tmp_path / "launch" / "train.py").write_text(JOB)
    (tmp_path / "launch" / "doctor.py").write_text("")
    for name in ("", "-dev", "-docs", "-tpu", "-cuda"):
        (tmp_path / f"requirements{name}.txt").write_text("# nothing\n")
    (tmp_path / "bin").mkdir()  # comes first in PATH
    return tmp_path


def ready(project):
    """A .venv as setup leaves it, with this environment's pip: making one anew takes seconds."""
    subprocess.run(
        [sys.executable, "-m", "venv", "--without-pip", ".venv"], cwd=project, check=True
    )
    (packages,) = (project / ".venv").glob("lib/python3*/site-packages")
    (packages / "pip").symlink_to(pathlib.Path(pip.__file__).parent)
    shutil.copy(project / "requirements.txt", project / ".venv")
    return project


def environment(project):
    kept = {
        name: value
        for name, value in os.environ.items()
        if name
        not in (
            "MAKEFLAGS",
            "MFLAGS",
            "MAKELEVEL",
            "PYTHON",
            "CONFIG",
            "WORKDIR",
            "ARGS",
            "ACCELERATOR",
        )
    }
    # Whatever chips the machine under the test has, the project sees none.
    return {
        **kept,
        "ROME_DEVICES": str(project / "devices"),
        "PATH": f"{project / 'bin'}:{os.environ['PATH']}",
    }


def make(project, *arguments, **variables):
    variables = environment(project) | variables
    return subprocess.run(
        ["make", *arguments],
        cwd=project,
        env=variables,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_when_all_is_there_nothing_is_said_and_the_job_gets_its_arguments(project):
    result = make(
        ready(project),
        "train",
        "CONFIG=experiments/ipa.py:smoke",
        "WORKDIR=runs/my run",
        "ARGS=--config.seed=3",
    )
    assert (
        result.stdout == "arguments ['--config=experiments/ipa.py:smoke', '--workdir=runs/my run',"
        " '--config.seed=3']\n"
    )
    assert (result.returncode, result.stderr) == (0, "")


def test_without_workdir_the_job_chooses_its_own(project):
    assert make(ready(project), "train").stdout == "arguments ['--config=experiments/ipa.py']\n"


def test_a_failing_job_fails_make(project):
    assert (
        make(ready(project), "train", "ARGS=--fail").returncode == 2
    )  # GNU make's only status for a failed recipe


def test_a_job_installs_no_tools_and_the_checks_do(project):
    ready(project)
    assert "requirements-dev" not in make(project, "train").stdout
    assert "installing the packages of requirements-dev.txt" in make(project, "check").stdout
    assert "installing the packages of requirements-docs.txt" in make(project, "docs").stdout


@pytest.mark.long
def test_an_environment_is_made_filled_and_then_left_alone(project):
    (project / ".venv" / "bin").mkdir(parents=True)  # one whose interpreter has gone counts as none
    (project / ".venv" / "bin" / "python").symlink_to("/nowhere/python3")
    first = make(project, "train", f"PYTHON={sys.executable}")
    assert first.returncode == 0, first.stderr
    assert (
        "making .venv with" in first.stdout
        and "installing the packages of requirements.txt" in first.stdout
    )
    assert make(project, "train").stdout.startswith("arguments")


def test_changed_requirements_are_installed_once(project):
    ready(project)
    (project / "requirements.txt").write_text("# changed\n")
    assert "installing the packages of requirements.txt" in make(project, "train").stdout
    assert make(project, "train").stdout.startswith("arguments")


def test_a_python_that_is_too_old_gets_one_line_with_the_remedy(project):
    old = project / "bin" / "python3.9"
    old.write_text(OLD_PYTHON)
    old.chmod(0o755)
    result = make(project, "train", f"PYTHON={old}")
    lines = [line for line in result.stderr.splitlines() if not line.startswith("make")]
    assert (
        len(lines) == 1 and f"{old} is 3.9" in lines[0] and "PYTHON=/path/to/python3.12" in lines[0]
    )
    assert result.returncode == 2 and not (project / ".venv").exists()


def test_another_python_than_the_environments_is_refused_with_the_remedy(project):
    other = project / "bin" / "python3.14"
    other.write_text("#!/bin/sh\necho 3.99\n")
    other.chmod(0o755)
    result = make(ready(project), "train", f"PYTHON={other}")
    assert "is 3.99. Run 'make clean' first" in result.stderr and result.returncode == 2


@pytest.mark.slow
@pytest.mark.parametrize("version, kept", [("0.11.0", True), ("0.7.2", False)])
def test_an_accelerator_images_jax_is_kept_where_the_requirements_allow_it(project, version, kept):
    for name, number in (("jax", version), ("jax-cuda12-plugin", version)):
        folder = project / "image" / f"{name.replace('-', '_')}-{number}.dist-info"
        folder.mkdir(parents=True)
        (folder / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {number}\n"
        )
        (folder / "RECORD").touch()
    (project / "requirements.txt").write_text(
        "jax>=0.10,<0.13; sys_platform == 'none'\n"
    )  # read for its range, nothing to download
    result = make(
        project, "train", f"PYTHON={sys._base_executable}", PYTHONPATH=str(project / "image")
    )
    assert result.returncode == 0, result.stderr
    assert (f"keeping the jax {version}" in result.stdout) == kept
    assert (f"jax=={version}" in (project / ".venv" / "constraints.txt").read_text()) == kept


def add_device(project, path, text=""):
    """A device file, or one of /sys, as this project's machine shows it."""
    file = project / "devices" / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


@pytest.mark.long
@pytest.mark.parametrize(
    "devices, chosen",
    [
        ({}, None),
        ({"dev/nvidia0": "", "dev/nvidiactl": ""}, "cuda"),
        ({"dev/nvidiactl": ""}, None),  # a driver without a card
        ({"dev/accel0": "", "sys/bus/pci/devices/0000:00:05.0/vendor": "0x1ae0\n"}, "tpu"),
        ({"dev/vfio/0": "", "sys/bus/pci/devices/0000:00:05.0/vendor": "0x1ae0\n"}, "tpu"),
        (
            {"dev/accel0": "", "sys/bus/pci/devices/0000:00:05.0/vendor": "0x8086\n"},
            None,
        ),  # another maker's accelerator
    ],
)
def test_the_machines_devices_choose_the_requirements(project, devices, chosen):
    ready(project)
    for path, text in devices.items():
        add_device(project, path, text)
    result = make(project, "train")
    assert result.returncode == 0, result.stderr
    assert [name for name in ("tpu", "cuda") if f"requirements-{name}.txt" in result.stdout] == (
        [chosen] if chosen else []
    )
    assert make(project, "train").stdout.startswith("arguments")  # once


@pytest.mark.long
@pytest.mark.parametrize("accelerator", ["tpu", "cuda", "cpu"])
def test_accelerator_wins_over_the_devices(project, accelerator):
    add_device(ready(project), "dev/nvidia0")
    result = make(project, "train", f"ACCELERATOR={accelerator}")
    assert result.returncode == 0, result.stderr
    assert [
        name for name in ("tpu", "cuda", "cpu") if f"requirements-{name}.txt" in result.stdout
    ] == [accelerator] * (accelerator != "cpu")


def test_an_unknown_accelerator_gets_one_line_with_the_remedy(project):
    result = make(ready(project), "train", "ACCELERATOR=gpu")
    assert (
        result.returncode == 2
        and "ACCELERATOR=gpu is none of tpu, cuda and cpu" in result.stderr
        and "arguments" not in result.stdout
    )


def test_an_image_that_brings_its_own_jax_gets_no_other_one(project):
    add_device(ready(project), "dev/nvidia0")
    settings = project / ".venv" / "pyvenv.cfg"
    settings.write_text(
        settings.read_text().replace(
            "include-system-site-packages = false", "include-system-site-packages = true"
        )
    )
    assert make(project, "train").stdout.startswith("arguments")


def test_every_requirements_file_allows_the_same_jax():
    pattern = re.compile(r"^jax(?:\[\w+\])?(>=.*)$", re.MULTILINE)
    found = {
        pattern.search((ROOT / name).read_text())[1]
        for name in ("requirements.txt", "requirements-tpu.txt", "requirements-cuda.txt")
    }
    assert found == {">=0.10,<0.13"}


@pytest.mark.long
def test_packages_that_cannot_be_installed_stop_make_before_the_job_and_are_tried_again(project):
    (ready(project) / "requirements.txt").write_text("./no_such_folder\n")
    for _ in range(2):
        result = make(project, "train")
        assert (
            result.returncode == 2
            and "pip could not install requirements.txt" in result.stderr
            and "arguments" not in result.stdout
        )


def test_clean_removes_the_environment_and_keeps_results(project):
    (ready(project) / "runs").mkdir()
    make(project, "clean")
    assert not (project / ".venv").exists() and (project / "runs").exists()


def test_ctrl_c_reaches_the_job_once_and_make_waits_for_it(project):
    ready(project)
    leader, follower = pty.openpty()
    command = ["make", "train", "ARGS=--wait"]
    process = subprocess.Popen(
        ["setsid", "--ctty", "--wait", *command],
        cwd=project,
        env=environment(project),
        stdin=follower,
        stdout=follower,
        stderr=follower,
    )
    os.close(follower)
    output, deadline, pressed = "", time.monotonic() + 60, False
    try:
        while time.monotonic() < deadline:
            if select.select([leader], [], [], 0.5)[0]:
                try:
                    output += os.read(leader, 4096).decode()
                except OSError:  # the terminal has closed
                    break
            if not pressed and "arguments" in output:
                os.write(leader, b"\x03")
                pressed = True
        assert process.wait(timeout=60) != 0
    finally:
        process.kill()
        os.close(leader)
    assert "saved after 1 signal" in output and "Traceback" not in output
