"""The display in a real terminal (a pty), and as plain lines."""

import io
import os
import pty
import select
import subprocess
import sys
import time

import pytest
from rich.console import Console

from rome.train import display as display_module
from rome.train.display import ASCII_BLOCKS, Display, duration, sparkline
from rome.train.report import EvalResult
from tests.paths import ROOT

PROGRAM = """
from rome.train.display import Display
with Display("ipa", 3) as display:
    for step in (1, 2, 3):
        display.update(step, {"reward": step / 10, "success": 0.42, "gradient_norm": 1.0})
        display.note(f"weights {step} published")
"""


def plain(total_steps, interval=0.0, **options):
    text = io.StringIO()
    console = Console(file=text, width=80, highlight=False)
    display = Display("ipa", total_steps, console, plain_interval_seconds=interval, **options)
    return display, text


@pytest.fixture
def now(monkeypatch):
    """The clock, as a list of one number."""
    seconds = [0.0]
    monkeypatch.setattr(display_module.time, "monotonic", lambda: seconds[0])
    return seconds


def run_in_terminal(environment):
    """Runs PROGRAM on a pseudo-terminal of 80 columns; returns what it wrote there."""
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        cwd=ROOT,
        stdout=follower,
        stderr=follower,
        stdin=follower,
        env=environment,
    )
    os.close(follower)
    output, deadline = b"", time.monotonic() + 60
    try:
        while time.monotonic() < deadline:
            if not select.select([leader], [], [], 1.0)[0]:
                continue
            try:
                data = os.read(leader, 65536)
            except OSError:  # the other end is closed
                break
            if not data:
                break
            output += data
        assert process.wait(timeout=60) == 0, output.decode()
    finally:
        process.kill()
        os.close(leader)
    return output.decode()


def terminal_environment(**extra):
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in ("JPY_PARENT_PID", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "CI")
    }
    return {**kept, "TERM": "xterm-256color", "COLUMNS": "80", "LINES": "24", **extra}


def test_a_terminal_shows_one_panel_that_is_redrawn_in_place():
    output = run_in_terminal(terminal_environment())
    assert "\x1b[1A" in output or "\x1b[2K" in output  # the cursor goes back over the old panel
    last = output[output.rindex("╭") :]
    assert (
        "step 3/3" in last and "+0.30" in last and "42 %" in last and "gradient_norm" not in output
    )
    assert all(f"weights {step} published" in output for step in (1, 2, 3))


@pytest.mark.parametrize("encoding", ["iso8859-1", "ascii", "koi8-r"])
def test_a_terminal_without_utf8_shows_the_panel_in_its_own_characters(encoding):
    output = run_in_terminal(terminal_environment(PYTHONIOENCODING=encoding))
    assert "step 3/3" in output and ASCII_BLOCKS[-1] in output


@pytest.mark.parametrize("extra", [{"TERM": "dumb"}, {"JPY_PARENT_PID": "1"}])
def test_a_terminal_that_cannot_redraw_gets_plain_lines(extra):
    output = run_in_terminal(terminal_environment(**extra))
    assert "╭" not in output and "3/3  reward +0.30  success 42 %" in output


def test_plain_output_has_one_line_a_step_with_what_is_known_about_it():
    display, text = plain(2)
    with display:
        display.update(1, {"reward": 0.5, "staleness": 0.25, "unknown": 3.0})
        display.update(2, {"reward": 0.75})
    lines = text.getvalue().splitlines()
    assert len(lines) == 2
    assert (
        lines[0].startswith("ipa   1/2  reward +0.50  staleness 0.25") and "unknown" not in lines[0]
    )


def test_plain_lines_are_spaced_but_the_first_and_the_last_are_always_there(now):
    display, text = plain(10, interval=5.0)
    with display:
        for step in range(1, 11):
            now[0] += 2.0
            display.update(step, {"reward": 0.0})
    assert [int(line.split()[1].split("/")[0]) for line in text.getvalue().splitlines()] == [
        1,
        4,
        7,
        10,
    ]


def test_an_interrupted_run_still_ends_with_the_line_of_its_last_step():
    display, text = plain(100, interval=1000.0)
    with pytest.raises(KeyboardInterrupt), display:
        for step in (1, 2, 3):
            display.update(step, {"reward": 0.0})
        raise KeyboardInterrupt
    assert text.getvalue().splitlines()[-1].startswith("ipa     3/100")


def test_time_left_follows_the_pace_after_the_first_step(now):
    display, text = plain(60)
    with display.evaluating():  # at step 0
        now[0] = 20.0
    now[0] = 300.0  # compiling, resumed at step 40
    display.update(41, {"reward": 0.0})
    assert display.seconds_left() is None
    for step in (42, 43):
        now[0] += 10.0
        display.update(step, {"reward": 0.0})
    assert display.seconds_left() == pytest.approx(170.0 + 20.0)
    assert "left 3 min 10 s" in text.getvalue()


@pytest.mark.parametrize(
    "every, evaluations", [(10, 6), (25, 3), (0, 1), (100, 1)], ids=lambda value: str(value)
)
def test_time_left_is_the_steps_at_their_pace_and_the_evaluations_at_theirs(
    now, every, evaluations
):
    display, _ = plain(60, evaluate_every=every)
    with display.evaluating():
        now[0] += 90.0
    for step in range(1, 6):
        now[0] += 10.0
        display.update(step, {"reward": 0.0})
    assert display.evaluations_left() == evaluations
    assert display.seconds_left() == pytest.approx(55 * 10.0 + evaluations * 90.0)


def test_time_left_does_not_jump_after_an_evaluation(now):
    display, _ = plain(60, evaluate_every=30)
    with display.evaluating():
        now[0] += 90.0
    for step in range(1, 31):
        now[0] += 10.0
        display.update(step, {"reward": 0.0})
    before = display.seconds_left()
    with display.evaluating():
        now[0] += 40.0
        assert display.seconds_left() == pytest.approx(before + 90.0 - 40.0)  # 50 s of this one
        now[0] += 50.0
    assert display.seconds_left() == pytest.approx(before)
    now[0] += 10.0
    display.update(31, {"reward": 0.0})
    assert display.seconds_left() == pytest.approx(before - 10.0)


def test_an_evaluation_that_was_never_measured_is_named_beside_the_time_left(now):
    display, text = plain(60, evaluate_every=30)
    for step in (41, 42):
        now[0] += 10.0
        display.update(step, {"reward": 0.0})
    assert "left 3 min 00 s and 1 evaluation" in text.getvalue()
    with display.evaluating():
        now[0] += 5.0
    assert display.time_left() == "3 min 05 s"


@pytest.mark.parametrize("may_end_early", [True, False])
def test_a_stage_that_may_end_early_says_at_most(now, may_end_early):
    display, text = plain(60, may_end_early=may_end_early)
    with display.evaluating():
        now[0] += 5.0
    for step in (1, 2):
        now[0] += 10.0
        display.update(step, {"loss": 0.5})
    assert ("2/60 at most  loss" in text.getvalue()) == may_end_early
    assert ("left at most 9 min 45 s" in text.getvalue()) == may_end_early
    head = io.StringIO()
    Console(file=head, width=100).print(display._panel())
    assert ("step 2/at most 60" in head.getvalue()) == may_end_early


def test_a_second_update_of_a_step_adds_metrics_without_a_second_line():
    display, text = plain(5)
    display.update(1, {"reward": 0.5})
    display.update(1, {"success": 0.25})
    assert display.metrics == {"reward": 0.5, "success": 0.25}
    assert len(text.getvalue().splitlines()) == 1


def test_an_evaluation_is_said_with_its_interval_and_its_size():
    display, text = plain(5)
    tasks = [
        {"task": f"find/{seed}", "family": "find", "success": seed < 30, "unseen_family": False}
        for seed in range(50)
    ]
    display.evaluated(EvalResult.from_tasks("ipa", 10, tasks))
    assert "evaluation at step 10: 60 % (46 to 72) of 50 tasks" in text.getvalue()


@pytest.mark.parametrize("width", [40, 80, 200])
def test_the_panel_fits_its_terminal(width):
    console = Console(file=io.StringIO(), width=width, force_terminal=True, highlight=False)
    display = Display("ipa", 60, console)
    for step in (1, 2, 3):
        metrics = {
            "reward": 0.1 * step,
            "success": 0.5,
            "turns": 3.0,
            "tokens": 250.0,
            "staleness": 0.5,
            "mismatch": 1e-5,
            "tokens_per_s": 12345.0,
        }
        display.update(step, metrics)
    lines = [
        "".join(segment.text for segment in line)
        for line in console.render_lines(display._panel(), pad=False)
    ]
    assert all(len(line) <= width for line in lines) and len(lines) < 12
    assert "12,345 tok/s" in "".join(lines)


def test_markup_in_a_note_is_text():
    display, text = plain(5)
    display.note("saved to [runs/a] in 3 s")
    assert "saved to [runs/a] in 3 s" in text.getvalue()


def test_durations_and_curves_read_well():
    assert [duration(s) for s in (0.4, 59.6, 185, 7620)] == [
        "0 s",
        "1 min 00 s",
        "3 min 05 s",
        "2 h 07 min",
    ]
    assert sparkline([0, 1, 2, 7]) == "▁▂▃█" and sparkline([3, 3]) == "▁▁"
