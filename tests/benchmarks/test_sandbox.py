"""The sandbox benchmark at a small size: the promised keys, and nothing left behind."""

import json
import subprocess
import sys

import pytest

from envs.rock import IsolationError, probe
from tests.paths import ROOT


@pytest.mark.long
def test_the_promised_keys_are_there_and_nothing_leaks(tmp_path):
    try:
        probe("required").require("required")
    except IsolationError as error:
        pytest.skip(str(error))
    # In a process of its own: descriptors of other tests would count as left behind.
    command = [sys.executable, "-m", "benchmarks.sandbox", "--json", str(tmp_path / "out.json")]
    options = ["--repeats", "3", "--cycles", "16", "--live", "3"]
    subprocess.run([*command, *options], cwd=ROOT, check=True, timeout=800)
    found = json.loads((tmp_path / "out.json").read_text())
    for name in (
        "create_first_output_ms_p50",
        "session_command_ms_p50",
        "fork_ms_p50",
        "snapshot_ms_p50",
        "restore_ms_p50",
        "upload_1mb_ms_p50",
    ):
        assert found[name] > 0
    assert (
        found["left"] == {}
        and found["leaks"] == 0
        and found["cycles"] == 16
        and found["ratio_docker"] is None
        and 0 < found["live_mib_each"] < 50
    )
