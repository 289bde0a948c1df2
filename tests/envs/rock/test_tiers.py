"""What the probe says where something is missing, and the cgroup files of both versions."""

import os
import pathlib
import tempfile

import pytest

from envs.rock import IsolationError, SandboxError, probe
from envs.rock.embedded import probe as embedded_probe
from envs.rock.embedded import zygote_client
from envs.rock.host import cgroups
from envs.rock.tiers import GUARANTEES, Missing, TierReport


@pytest.fixture(autouse=True)
def fresh():
    embedded_probe._found.clear()
    yield
    embedded_probe._found.clear()


@pytest.fixture
def no_user_namespaces(monkeypatch):
    """A machine that refuses them, as an ordinary container does."""
    tried = embedded_probe._try_to_run

    def refuse(tier):
        if tier == "namespaces":
            raise SandboxError("unshare: Operation not permitted")
        tried(tier)

    monkeypatch.setattr(embedded_probe, "_try_to_run", refuse)
    monkeypatch.setattr(embedded_probe, "_setting", lambda path: "")


def test_refused_user_namespaces_are_named_with_their_remedy_and_refused_when_required(
    no_user_namespaces,
):
    report = probe("required")
    assert report.tier is None
    with pytest.raises(
        IsolationError,
        match=(
            r"this machine refuses user namespaces .*Operation not permitted.*; remedy: leave the"
            " container"
        ),
    ):
        report.require("required")


def test_best_available_falls_back_and_says_loudly_what_is_not_enforced(no_user_namespaces):
    report = probe("best_available")
    if report.tier is None:
        pytest.skip("no landlock tier here")
    assert report.tier == "landlock" and {"disk", "processes"} <= {
        item.guarantee for item in report.missing
    }
    report.require("best_available")
    banner = report.banner()
    assert (
        "NOT enforced" in banner
        and "leave the container" in banner
        and all(item.guarantee in banner for item in report.missing)
    )
    with pytest.raises(IsolationError):
        report.require("required")


@pytest.mark.parametrize(
    "error",
    [
        SandboxError("the sandbox host process does not answer (Broken pipe)"),
        SandboxError("[Errno 24] Too many open files"),
        SandboxError("unshare: Resource temporarily unavailable"),
        OSError(12, "Cannot allocate memory"),
    ],
)
def test_a_failure_that_may_pass_is_neither_believed_nor_kept(monkeypatch, error):
    tried = embedded_probe._try_to_run
    failures = [error] * 3

    def fail_at_first(tier):
        if tier == "namespaces" and failures:
            raise failures.pop()
        tried(tier)

    monkeypatch.setattr(embedded_probe, "_try_to_run", fail_at_first)
    first = probe("required")  # two attempts fail
    assert first.tier is None and str(error) in first.missing[0].reason
    if "unshare" not in str(error):
        assert "user namespaces" not in first.missing[0].reason  # nor is a wrong remedy told
    if (second := probe("required")).tier is None:
        pytest.skip("no namespaces tier here")
    assert second.tier == "namespaces" and failures == []


def test_a_refusal_of_the_kernel_and_a_tier_that_works_are_found_out_once(no_user_namespaces):
    tries = []
    tried = embedded_probe._try_to_run
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embedded_probe, "_try_to_run", lambda tier: (tries.append(tier), tried(tier)))
        reports = {probe("best_available").tier for _ in range(3)}
    assert len(reports) == 1 and sorted(tries) == sorted(set(tries))


def test_landlock_claims_the_files_only_where_commands_own_none(monkeypatch):
    for uid, claimed in ((0, True), (1000, False)):
        monkeypatch.setattr(embedded_probe.os, "geteuid", lambda uid=uid: uid)
        report = embedded_probe._report("landlock", [("no namespaces", "use some")])
        assert ("filesystem" in report.guarantees) == claimed
        reasons = [item.reason for item in report.missing if item.guarantee == "filesystem"]
        assert claimed or "modes, owners, times" in reasons[0]


def test_nothing_missing_needs_no_banner():
    TierReport("namespaces", frozenset(GUARANTEES), ()).require("required")
    assert TierReport("namespaces", frozenset(GUARANTEES), ()).banner() == ""


def test_without_memory_limits_required_is_refused():
    report = TierReport(
        "namespaces",
        frozenset(GUARANTEES) - {"memory"},
        (Missing("memory", "no cgroups", "run as root"),),
    )
    with pytest.raises(IsolationError, match=r"memory.*no cgroups; remedy: run as root"):
        report.require("required")
    report.require("best_available")


@pytest.mark.parametrize(
    "setting, value, words",
    [
        ("/proc/sys/user/max_user_namespaces", "0", "sysctl user.max_user_namespaces"),
        ("/proc/sys/kernel/apparmor_restrict_unprivileged_userns", "1", "AppArmor"),
    ],
)
def test_what_refuses_user_namespaces_is_named(monkeypatch, setting, value, words):
    monkeypatch.setattr(embedded_probe, "_setting", lambda path: value if path == setting else "")
    assert words in " ".join(embedded_probe._userns_obstacle("unshare: Operation not permitted"))


def test_a_chroot_is_named(monkeypatch):
    monkeypatch.setattr(embedded_probe, "_setting", lambda path: "")
    monkeypatch.setattr(embedded_probe, "_in_chroot", lambda: True)
    assert "chroot" in embedded_probe._userns_obstacle("unshare: Operation not permitted")[0]


def test_an_unknown_isolation_is_an_error():
    with pytest.raises(ValueError, match=r"required, best_available"):
        probe("strict")


def test_version_2_limits_are_written_to_its_own_files(tmp_path):
    """A directory stands in for cgroup2, which this kernel may not offer: what is checked is which
    files get which values.
    """
    parent = tmp_path / "app.slice"
    parent.mkdir()
    place = cgroups.Place(2, {"memory": str(parent), "pids": str(parent), "cpu": str(parent)})
    made = parent / "rock-1"

    real_mkdir = os.mkdir

    def mkdir(path, *rest):
        real_mkdir(path, *rest)
        if pathlib.Path(path) == made:
            for name in ("memory.max", "memory.swap.max", "pids.max", "cpu.max", "cgroup.procs"):
                (made / name).touch()
            (made / "memory.events").write_text("low 0\nhigh 0\nmax 12\noom 3\noom_kill 2\n")
            (made / "pids.events").write_text("max 5\n")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "mkdir", mkdir)
        assert cgroups.create(place, "rock-1", 64 << 20, 32, 0.5) == [str(made)]
    assert {
        name: (made / name).read_text()
        for name in ("memory.max", "memory.swap.max", "pids.max", "cpu.max")
    } == {
        "memory.max": str(64 << 20),
        "memory.swap.max": "0",
        "pids.max": "32",
        "cpu.max": "50000 100000",
    }
    assert cgroups.Meters([str(made)]).events() == {"memory": 2, "pids": 5}


def test_version_2_controllers_are_enabled_where_that_is_allowed(tmp_path):
    (tmp_path / "cgroup.controllers").write_text("cpuset cpu io memory pids\n")
    (tmp_path / "cgroup.subtree_control").write_text("memory\n")
    (tmp_path / "cgroup.procs").touch()
    assert cgroups._enable(str(tmp_path)) == ["memory", "pids", "cpu"]
    assert cgroups._enable(str(tmp_path / "nothing")) == []


def test_a_group_that_cannot_be_limited_is_not_left_behind(tmp_path):
    place = cgroups.Place(1, {"memory": str(tmp_path), "pids": str(tmp_path / "missing")})
    with pytest.raises(OSError):
        cgroups.create(place, "rock-1", 1 << 20, 8, 1.0)
    assert not (tmp_path / "rock-1").exists()


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="an ordinary user's sandboxes have the user's id")
@pytest.mark.parametrize("closed", ["outer/inner", "outer"])
def test_a_directory_of_temporary_files_that_sandboxes_cannot_enter_is_named(
    closed, monkeypatch, tmp_path
):
    zygote_client.shut_down()
    inner = tmp_path / "outer" / "inner"
    inner.mkdir(parents=True)
    (tmp_path / closed).chmod(0o700)
    monkeypatch.setattr(tempfile, "tempdir", str(inner))
    with pytest.raises(IsolationError, match=r"cannot enter /.*; chmod o\+x it, or set TMPDIR"):
        probe("required").require("required")
    zygote_client.shut_down()
