"""What SGLang would be started with, and what is said where it cannot be."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

from rome.engine import dialect
from rome.engine.process import ROOT

SCRIPT = ROOT / "launch" / "sglang_server.py"


def run(*arguments, **environment):
    return subprocess.run(
        [sys.executable, SCRIPT, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | environment,
    )


def test_a_dry_run_explains_every_flag_and_passes_the_rest_on():
    done = run(
        "--model_path",
        "/models/with space",
        "--tensor_parallel",
        "4",
        "--no-deterministic",
        "--dry-run",
        "--",
        "--attention-backend",
        "fa3",
    )
    assert done.returncode == 0
    lines, command = done.stdout.split("\n\n")
    flags = [line.split()[0] for line in lines.splitlines()]
    assert all(
        len(re.split(r" {2,}|' ", line, maxsplit=1)[-1].split()) > 2 for line in lines.splitlines()
    )
    assert set(flags) >= {
        "--enable-memory-saver",
        "--enable-return-routed-experts",
        "--weight-version",
        "--skip-tokenizer-init",
        "--tokenizer-worker-num",
    }
    assert "--enable-deterministic-inference" not in flags
    assert (
        all(flag in command for flag in flags)
        and "'/models/with space'" in command
        and command.rstrip().endswith("--attention-backend fa3")
    )


@pytest.mark.parametrize(
    "version, words",
    [
        (None, "sglang is not installed"),
        ("0.5.8", "sglang 0.5.8 is too old"),
        ("0.4.10.post2", "is too old"),
    ],
)
def test_a_missing_or_old_sglang_is_one_clear_line(tmp_path, version, words):
    if version:
        (tmp_path / f"sglang-{version}.dist-info").mkdir()
        (tmp_path / f"sglang-{version}.dist-info" / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: sglang\nVersion: {version}\n"
        )
    done = run("--model_path", "/m", PYTHONPATH=str(tmp_path))
    assert (
        done.returncode == 1
        and words in done.stderr
        and "requirements-sglang.txt" in done.stderr
        and len(done.stderr.splitlines()) == 1
    )


def test_the_oldest_version_is_one_and_the_same_everywhere():
    oldest = ".".join(map(str, dialect.MIN_SGLANG))
    assert (
        f"MIN_SGLANG = {dialect.MIN_SGLANG}" in SCRIPT.read_text()
        and f"sglang>={oldest}," in (ROOT / "requirements-sglang.txt").read_text()
    )


@pytest.mark.slow
@pytest.mark.live
@pytest.mark.skipif(
    not os.environ.get("SGLANG_PYTHON"),
    reason="SGLANG_PYTHON is not set (tests/rome/engine/test_sglang_wheel.py says what it names)",
)
@pytest.mark.parametrize(
    "python", [name for name in os.environ.get("SGLANG_PYTHON", "").split(":") if name]
)
def test_every_flag_is_one_that_the_wheel_knows(python):
    find = (
        "import importlib.util;"
        " print(importlib.util.find_spec('sglang').submodule_search_locations[0])"
    )
    root = (
        pathlib.Path(
            subprocess.run(
                [python, "-c", find], capture_output=True, text=True, timeout=60, check=True
            ).stdout.strip()
        )
        / "srt"
    )
    source = "\n".join(
        path.read_text() for path in [root / "server_args.py", *root.glob("arg_groups/fields/*.py")]
    )
    flags = re.findall(r"^(--\S+)", run("--model_path", "/m", "--dry-run").stdout, re.MULTILINE)
    assert len(flags) > 10
    for flag in flags:
        assert (
            re.search(rf"^    {flag[2:].replace('-', '_')}: ", source, re.MULTILINE)
            or f'"{flag}"' in source
        ), flag
