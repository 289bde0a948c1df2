"""What a stranger's tools read: pyproject.toml, the requirement files, the version."""

import os
import re
import subprocess
import sys
import tomllib

import pytest

from rome.version import VERSION, describe
from tests.paths import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def requirements(name: str) -> list[str]:
    """Return the requirements of a file, without comments."""
    lines = (line.partition("#")[0].strip() for line in (ROOT / name).read_text().splitlines())
    return [line for line in lines if line]


def test_every_extra_reads_a_file_that_is_there():
    dynamic = PROJECT["tool"]["setuptools"]["dynamic"]
    assert dynamic["dependencies"]["file"] == ["requirements.txt"]
    extras = dynamic["optional-dependencies"]
    assert set(extras) == {"cuda", "tpu", "ray", "grammar", "dev", "docs"}
    for extra in extras.values():
        assert [requirements(name) for name in extra["file"]]


@pytest.mark.parametrize("name", sorted(path.name for path in ROOT.glob("requirements*.txt")))
def test_every_requirement_is_bounded_on_both_sides_or_pinned(name):
    for requirement in requirements(name):
        specifier = requirement.partition(";")[0]
        assert re.search(r">=[\w.]+,<[\w.]+", specifier) or "==" in specifier, requirement


def test_the_version_names_the_commit_of_a_checkout():
    assert re.fullmatch(r"\d+\.\d+\.\d+", VERSION)
    if (ROOT / ".git").exists():
        assert re.fullmatch(re.escape(VERSION) + r"\+g[0-9a-f]{7,40}(\.dirty)?", describe())
    else:
        assert describe() == VERSION


def test_the_changelog_has_the_version():
    assert f"## {VERSION}" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.slow
@pytest.mark.network
def test_an_editable_install_is_imported_from_any_folder(tmp_path):
    """The dependencies are this environment's: what is shown is that the project installs."""
    environment = tmp_path / "venv"
    subprocess.run(
        [sys.executable, "-m", "venv", "--system-site-packages", environment], check=True
    )
    python = str(environment / "bin" / "python")
    install = [python, "-m", "pip", "install", "--no-deps", "-e", str(ROOT)]
    done = subprocess.run(install, capture_output=True, text=True, timeout=800, cwd=tmp_path)
    if "No matching distribution" in done.stderr or "Temporary failure" in done.stderr:
        pytest.skip(f"no package index to build with: {done.stderr.strip()[-200:]}")
    assert done.returncode == 0, done.stderr
    code = "from envs.rock import Sandbox; import rome.losses, envs.gem, sys; print(Sandbox)"
    packages = os.pathsep.join(path for path in sys.path if "site-packages" in path)
    found = subprocess.run(
        [python, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": packages, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "Sandbox" in found.stdout, found.stderr
