"""The profiler's window, with a recorder in place of JAX's profiler, and once with the real one."""

import jax
import jax.numpy as jnp
import pytest

from rome.train.profile import Profile


class Recorder:
    """In place of jax.profiler. `fails` names the functions that raise."""

    def __init__(self, fails=()):
        self.calls = []
        self.fails = fails

    def start_trace(self, directory):
        self._call("start", OSError("no space left on device"))

    def stop_trace(self):
        self._call("stop", RuntimeError("the trace is gone"))

    def _call(self, name, error):
        self.calls.append(name)
        if name in self.fails:
            raise error


def run(monkeypatch, tmp_path, window, steps, **options):
    """The numbers of the steps that were traced, and the notes."""
    recorder = Recorder(**options)
    monkeypatch.setattr("rome.train.profile.jax.profiler.start_trace", recorder.start_trace)
    monkeypatch.setattr("rome.train.profile.jax.profiler.stop_trace", recorder.stop_trace)
    notes = []
    profile = Profile(tmp_path, window, notes.append)
    traced = []
    for step in steps:
        before = len(recorder.calls)
        profile.before(step)
        if recorder.calls.count("start") > recorder.calls.count("stop"):
            traced.append(step)
        profile.after(step, jnp.zeros(()))
        assert len(recorder.calls) - before <= 2
    profile.close()
    assert recorder.calls.count("start") == recorder.calls.count("stop") or options
    return traced, notes


@pytest.mark.parametrize(
    ("window", "steps", "expected"),
    [
        ((3, 5), range(1, 9), [3, 4, 5]),
        ((3, 3), range(1, 9), [3]),
        ((3, 5), range(5, 9), [5]),  # resumed within the window
        ((3, 5), range(6, 9), []),  # resumed beyond it
        ((3, 5), range(1, 5), [3, 4]),  # the run ends within it
        (None, range(1, 9), []),
    ],
    ids=["inside", "one step", "resumed within", "resumed beyond", "ends within", "none"],
)
def test_the_steps_of_the_window_are_traced_once(monkeypatch, tmp_path, window, steps, expected):
    traced, notes = run(monkeypatch, tmp_path, window, steps)
    assert traced == expected and len(notes) == bool(expected)


@pytest.mark.parametrize("what", ["start", "stop"])
def test_a_trace_that_cannot_be_written_is_said_once_and_stops_no_run(monkeypatch, tmp_path, what):
    _, (note,) = run(monkeypatch, tmp_path, (2, 3), range(1, 9), fails=(what,))
    assert "could not" in note and str(tmp_path) in note


@pytest.mark.slow
def test_the_real_profiler_leaves_a_trace_for_xprof(tmp_path):
    profile = Profile(tmp_path / "profile", (2, 2), print)
    for step in (1, 2):
        profile.before(step)
        profile.after(step, jax.jit(jnp.add)(1, step))
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
