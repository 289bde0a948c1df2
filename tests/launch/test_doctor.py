"""The doctor: what works is tried for real, what does not is named with its remedy, and only a
broken episode is a failure.
"""

import json

import pytest

from envs.rock import SandboxError, probe
from envs.rock.embedded import probe as embedded_probe
from launch.doctor import main
from rome.stages import doctor


@pytest.fixture(autouse=True)
def fresh():
    embedded_probe._found.clear()
    yield
    embedded_probe._found.clear()


@pytest.fixture
def no_sandbox(monkeypatch):
    def refuse(tier):
        raise SandboxError("unshare: Operation not permitted")

    monkeypatch.setattr(embedded_probe, "_try_to_run", refuse)


def needs_sandbox():
    if (report := probe("best_available")).tier is None:
        pytest.skip(report.missing[0].reason)


def test_each_mechanism_is_tried_and_the_last_is_an_episode(monkeypatch, tmp_path, capsys):
    needs_sandbox()
    monkeypatch.setattr(
        doctor,
        "check_devices",
        lambda: doctor.Finding("accelerator, engine", True, "not looked at"),
    )  # seconds
    assert main(["--json", str(tmp_path / "found.json")]) == 0
    found = {
        finding["what"]: finding for finding in json.loads((tmp_path / "found.json").read_text())
    }
    assert list(found) == [
        "packages",
        "accelerator, engine",
        "tokenizer",
        "sandbox tier namespaces",
        "sandbox tier landlock",
        "sandboxes",
        "cgroups",
        "snapshots",
        "Docker",
        "an episode",
    ]
    assert (
        found["packages"]["works"]
        and found["tokenizer"]["works"]
        and found["snapshots"]["works"]
        and "ended as success" in found["an episode"]["says"]
    )
    assert "an episode" in capsys.readouterr().out


def test_quick_says_nothing_where_all_is_well(capsys):
    needs_sandbox()
    assert main(["--quick"]) == 0
    assert capsys.readouterr() == ("", "")


def test_without_a_sandbox_quick_fails_with_the_reason_and_the_remedy(no_sandbox, capsys):
    assert main(["--quick"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "Operation not permitted" in line and "remedy" in line


def test_without_a_sandbox_the_tiers_are_named_and_nothing_crashes(no_sandbox, monkeypatch, capsys):
    monkeypatch.setattr(
        doctor,
        "check_devices",
        lambda: doctor.Finding("accelerator, engine", True, "not looked at"),
    )
    found = list(doctor.findings())
    assert [finding.works for finding in found if "tier" in finding.what] == [
        False,
        False,
    ] and not found[-1].works
    assert all(finding.remedy for finding in found if "tier" in finding.what)
    assert main([], checks=lambda: iter(found)) == 1
    (choice,) = [finding for finding in found if finding.what == "sandboxes"]
    assert not choice.works and "none of the embedded backend" in choice.says and choice.remedy


def test_where_only_the_weaker_tier_works_it_is_said_what_it_lacks(monkeypatch):
    tried = embedded_probe._try_to_run

    def refuse(tier):
        if tier == "namespaces":
            raise SandboxError("unshare: Operation not permitted")
        tried(tier)

    monkeypatch.setattr(embedded_probe, "_try_to_run", refuse)
    if probe("best_available").tier is None:
        pytest.skip("no landlock tier here")
    choice = doctor.check_choice()
    assert (
        choice.works
        and "tier landlock, and only under isolation='best_available'" in choice.says
        and "disk" in choice.says
        and choice.remedy
    )


@pytest.mark.long
def test_the_device_that_jax_uses_is_told():
    says = doctor.check_devices().says
    assert says.startswith(("1 cpu device", "8 cpu devices")) or "gpu" in says or "tpu" in says
    assert "; in training, " in says and "engine" in says
