"""The pipeline of synthesis: what it accepts, that it goes on after a kill, what it sets aside."""

import asyncio
import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from envs.rock import SandboxConfig, SandboxError
from envs.tasks.made import FAMILIES, Mutants, files_of
from envs.tasks.made.pro import INDEX, read_index
from rome.evals.run import make_identity
from rome.evals.runner import open_results
from rome.synth import pipeline, review
from rome.synth.build import Built, drafts_text, find_licence, read_drafts
from rome.synth.claim import ClaimError, claim_folder
from rome.synth.explore import explore, parse_families
from rome.synth.pipeline import Settings, Trace, synthesise
from tests.paths import ROOT

CONFIG = SandboxConfig(isolation="best_available")


def test_seeds_depend_on_the_run_s_seed_and_on_nothing_else():
    first, _ = explore("logs,text:3", (), (), 1, seed=5)
    assert first == explore("logs,text:3", (), (), 1, seed=5)[0]
    assert {one.name for one in first} == {"logs", "text"} and len(first) == 6
    other, _ = explore("logs,text:3", (), (), 1, seed=6)
    assert not {one.value for one in first} & {one.value for one in other}
    with pytest.raises(ValueError, match="is none of"):
        parse_families("logs,chess:3")
    with pytest.raises(ValueError, match="no number above 0"):
        parse_families("logs:-1")


def test_no_run_makes_a_task_of_the_evaluation_set_pro():
    """The set was made by such runs: the default seed gave 72 of its 200 tasks again."""
    evaluated = {(entry["family"], str(entry["seed"])) for entry in read_index(INDEX)}
    for run_seed in range(7):
        seeds, _ = explore("all:40", [], [], 1, run_seed)
        assert len({(one.name, one.value) for one in seeds} - evaluated) == len(FAMILIES) * 40


def test_a_draft_that_nearly_repeats_a_task_of_pro_is_left_out():
    seeds, _ = explore("apis:30", [], [], 1, 0)
    units = []
    for seed in seeds:
        draft = FAMILIES[seed.name].make(int(seed.value))
        units.append(pipeline._Unit(draft, f"{seed.id}/{draft.digest}"))
    pipeline._check_texts(units)
    names = {
        FAMILIES["apis"].make(one["seed"]).name
        for one in read_index(INDEX)
        if one["family"] == "apis"
    }
    left = [unit for unit in units if unit.left]
    assert {unit.left for unit in left} == {"unique"}
    assert sum(unit.reason.removeprefix("repeats ") in names for unit in left) >= 1


def test_hostile_and_torn_inputs_are_set_aside_with_file_and_reason(tmp_path):
    package = tmp_path / "torn"
    package.mkdir()
    (package / "__init__.py").write_bytes(b"\xff\xfe not text")
    pointer = tmp_path / "pointer"
    pointer.mkdir()
    (pointer / "__init__.py").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0")
    hostile = tmp_path / "hostile"
    subprocess.run(["git", "init", "-q", str(hostile)], check=True)
    (hostile / ".git" / "objects" / "info" / "alternates").write_text("/nowhere\n")
    marker = tmp_path / "ran"
    with open(hostile / ".git" / "config", "a") as file:
        file.write(f'[core]\n\tfsmonitor = "touch {marker}"\n\thooksPath = {tmp_path}\n')
    inputs = [str(tmp_path / "none"), str(package), str(pointer)]
    seeds, aside = explore("", inputs, (str(hostile), str(tmp_path)), 1, 0)
    assert not seeds and not marker.exists()
    reasons = {pathlib.Path(one.file).name: one.reason for one in aside}
    assert "not UTF-8" in reasons["torn"] and "LFS" in reasons["__init__.py"]
    assert "no git repository" in reasons[tmp_path.name] and reasons["hostile"]
    assert len(aside) == 5


def test_a_verifier_that_reads_source_or_runs_nothing_is_rejected():
    good = dict(files_of(FAMILIES["text"].make(1)))
    assert review.verifier_faults(good) == []

    def with_test(text):
        only = {name: value for name, value in good.items() if not name.startswith("tests/")}
        return {**only, "tests/test.sh": (text.encode(), 0o755)}

    greps = with_test("grep -q 'sort -n' /app/filter.sh && echo 1 > /logs/verifier/reward.txt\n")
    assert "reads source" in review.verifier_faults(greps)[0]
    idle = with_test("[ -f /app/x ] && echo 1 > /logs/verifier/reward.txt\n")
    assert review.verifier_faults(idle) == ["no program is run by the tests"]
    assert review.verifier_faults({}) == ["tests/test.sh is missing"]


def test_exact_and_near_duplicates_are_found_and_others_are_not():
    drafts = [FAMILIES["logs"].make(seed) for seed in range(8)]
    near = dataclasses.replace(
        drafts[2], name="logs/again", instruction=drafts[2].instruction + " ok"
    )
    assert review.find_duplicates([*drafts, drafts[0], near]) == {8: 0, 9: 2}


def test_drafts_survive_their_file(tmp_path):
    built = Built([FAMILIES["services"].make(4), FAMILIES["git"].make(4)], "")
    (tmp_path / "d.json").write_text(drafts_text(built))
    again = read_drafts(tmp_path / "d.json")
    assert [draft.digest for draft in again.drafts] == [draft.digest for draft in built.drafts]
    assert files_of(again.drafts[0]) == files_of(built.drafts[0])


def test_a_trace_survives_a_line_that_a_kill_cut_off(tmp_path):
    path = tmp_path / "trace.jsonl"
    trace = Trace(path)
    trace.add("review", "a", 1.5, tokens=3)
    with open(path, "a") as file:
        file.write('{"agent": "review", "un')
    again = Trace(path)
    assert list(again.lines) == [("review", "a")] and again.tokens("review") == 3
    again.add("review", "b", 2.0)
    assert set(Trace(path).lines) == {("review", "a"), ("review", "b")}


def test_a_folder_of_another_run_is_refused(tmp_path):
    claim_folder(tmp_path, dataclasses.asdict(Settings(families="logs:1")))
    claim_folder(tmp_path, dataclasses.asdict(Settings(families="logs:1")))
    with pytest.raises(ClaimError, match="whose families is 'logs:1', not 'logs:2'"):
        claim_folder(tmp_path, dataclasses.asdict(Settings(families="logs:2")))


def test_licences_are_found_where_pip_and_repositories_put_them(tmp_path):
    package = tmp_path / "thing"
    package.mkdir()
    assert find_licence(package) == ""
    info = tmp_path / "thing-1.0.dist-info"
    info.mkdir()
    (info / "LICENSE").write_text("Permission is hereby\ngranted, free of charge, to any person")
    assert find_licence(package) == "MIT"


def test_a_draft_that_a_fault_held_up_is_proven_by_the_next_call(tmp_path, monkeypatch):
    """The folder of the proof takes the candidate that the first call had to leave out."""
    faults = [SandboxError("the machine is full")]

    async def score(*args):
        if faults:
            raise faults.pop()
        return Mutants(10, 10)

    async def prove(dataset, config, out, *, tasks, seed, **settings):
        with open_results(out, make_identity(dataset, tasks, "validate", seed)):
            return {"tasks": [{"task": task.name, "ok": True, "reasons": []} for task in tasks]}

    monkeypatch.setattr(pipeline, "score_mutants", score)
    monkeypatch.setattr(pipeline, "validate", prove)
    settings = Settings(families="logs:2")
    counts = [asyncio.run(synthesise(settings, tmp_path, CONFIG))["accepted"] for _ in range(2)]
    assert counts == [1, 2]


@pytest.mark.slow
def test_weak_drafts_leave_at_their_stage_and_sound_ones_are_accepted(tmp_path):
    settings = Settings(families="text,logs:2", mutants=6, oracle_runs=1, attempts=1, seed=3)
    card = asyncio.run(synthesise(settings, tmp_path, CONFIG))
    stages = list(card["yield_by_stage"].values())
    assert stages == sorted(stages, reverse=True) and card["accepted"] >= 1
    assert card["mutation_score"] >= 0.9
    assert len(list((tmp_path / "tasks").iterdir())) == card["accepted"]
    assert all(task["pass_rate"] == 1.0 for task in card["tasks"])


@pytest.mark.slow
def test_a_killed_run_goes_on_and_makes_the_same_set(tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "launch.synth", "--families=text:2", "--mutants=4"]
    command += ["--oracle_runs=1", f"--out={out}"]
    first = subprocess.Popen(command, cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    trace = out / "trace.jsonl"
    while not (trace.exists() and '"review"' in trace.read_text()):
        assert first.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    done = trace.read_text()
    subprocess.run(command, cwd=ROOT, check=True, timeout=800, stdout=subprocess.DEVNULL)
    whole = tmp_path / "whole"
    again = [*command[:-1], f"--out={whole}"]
    subprocess.run(again, cwd=ROOT, check=True, timeout=800, stdout=subprocess.DEVNULL)
    assert trace.read_text().startswith(done.rpartition("\n")[0])
    names = [sorted(path.name for path in (folder / "tasks").iterdir()) for folder in (out, whole)]
    assert names[0] == names[1]
    cards = [json.loads((folder / "card.json").read_text()) for folder in (out, whole)]
    assert cards[0]["yield_by_stage"] == cards[1]["yield_by_stage"]
