"""The four-stage filter: what each stage catches, what it leaves, and what it keeps on record."""

import asyncio
import json
import os
import time
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from envs.gem import format_tool_call
from envs.rock import SandboxConfig
from envs.tasks.made import FAMILIES
from rome.agent.endpoint import Answer, EndpointError
from rome.data.trajectory import Chunk, Trajectory, save_trajectory
from rome.synth import expert, fakes, funnel
from rome.synth import filter as filter_module
from rome.synth.filter import _calibrated, differing_turns, filter_folder, read_items, run_filter
from rome.synth.filter_rules import calibrate, heuristic, model_judge, rule_judge
from rome.synth.verdicts import Item, Verdict, commands_of

CONFIG = SandboxConfig(isolation="best_available")
DRAFT = FAMILIES["text"].make(2)


def turn(command, status="ok", observation=""):
    return Chunk(
        [],
        [],
        [],
        text=format_tool_call("bash", {"command": command}),
        tool_call={"name": "bash", "arguments": {"command": command}},
        status=status,
        observation=observation,
    )


def write(text=DRAFT.oracle):
    return f"cat > /app/{DRAFT.program} << 'END_OF_PROGRAM'\n{text.rstrip()}\nEND_OF_PROGRAM"


def honest(*more):
    chunks = [turn("ls /app"), turn(write()), *more, Chunk([], [], [], text="It is done.")]
    return Trajectory(DRAFT.name, "text", chunks, 1.0, "success", instruction=DRAFT.instruction)


def item(trajectory, name="one"):
    return Item(name, trajectory, DRAFT.instruction)


@pytest.mark.parametrize(
    "more",
    [
        (),
        (turn("cat nothing", observation="cat: nothing: No such file"),),
        (turn("mkdir -p /app/tests && echo 1 > /app/tests/mine.txt"),),
        (turn("rm -rf /tmp/scratch"), turn("rm -rf /tmp/scratch")),
        (turn("head -n 3 /app/sample.txt | bash /app/filter.sh"),) * 3,
    ],
)
def test_honest_work_with_its_detours_passes(more):
    one = item(honest(*more))
    assert heuristic(one).accepted, heuristic(one).reasons
    assert asyncio.run(rule_judge(one)).accepted


@pytest.mark.parametrize("kind", ["stuck", "malformed", "forged_reward", "tests_changed"])
def test_heuristics_catch_what_the_form_shows(kind):
    import random

    source = fakes.Source(honest(), DRAFT, "", honest())
    fake = fakes.KINDS[kind](source, random.Random(1))
    verdict = heuristic(item(fake))
    assert not verdict.accepted and verdict.reasons


@pytest.mark.parametrize("kind", ["constant_answer", "lucky", "another_task", "made_up"])
def test_the_judge_catches_what_the_content_shows(kind):
    import random

    other = FAMILIES["logs"].make(3)
    chunks = [turn(f"cat > /app/{other.program} << 'END_OF_PROGRAM'\n{other.oracle}END_OF_PROGRAM")]
    work = Trajectory(other.name, "logs", chunks, 1.0, "success", instruction=other.instruction)
    source = fakes.Source(honest(), DRAFT, "", work)
    for seed in range(4):
        fake = fakes.KINDS[kind](source, random.Random(seed))
        verdict = asyncio.run(rule_judge(item(fake)))
        assert not verdict.accepted, (seed, commands_of(fake))


def test_a_failed_or_spoiled_episode_is_no_success():
    lost = honest()
    lost.reward = 0.0
    assert not heuristic(item(lost)).accepted
    assert not heuristic(item(Trajectory("t", "f", [], 1.0, "success"))).accepted


class Chat:
    """Answers with one text."""

    def __init__(self, text):
        self.text = text

    async def ask(self, messages, **settings):
        return Answer({"message": {"content": self.text}}, {})


def test_a_model_judges_and_rules_stand_in_where_it_says_nothing():
    good = asyncio.run(model_judge(Chat('So: {"score": 0.9, "reason": "works"}'))(item(honest())))
    bad = asyncio.run(model_judge(Chat('{"score": 0.1, "reason": "fake"}'))(item(honest())))
    assert (good.accepted, good.score) == (True, 0.9) and bad.reasons == ("fake",)
    mute = asyncio.run(model_judge(Chat("no idea"))(item(honest())))
    assert mute.accepted and "judged by rules" in mute.reasons[-1]


def test_calibration_finds_the_threshold_that_separates():
    found = calibrate([(True, 0.8), (True, 0.7), (False, 0.3), (False, 0.6)])
    assert 0.6 < found["threshold"] <= 0.7 and found["caught"] == 1.0 and found["lost"] == 0.0
    with pytest.raises(ValueError, match="0 false labels"):
        calibrate([(True, 1.0)])


def test_the_queue_is_escaped_and_decisions_come_back(tmp_path):
    nasty = item(honest(turn("echo '<script>alert(1)</script>'")), name='a"><b')
    nasty.verdicts["judge"] = Verdict("judge", True, 0.6, ("doubtful",))
    queue = expert.choose_queue([nasty])
    assert queue == [nasty]
    expert.write_queue(tmp_path / "review.html", queue)
    page = (tmp_path / "review.html").read_text()
    assert "<script>alert" not in page and 'data-id="a&quot;&gt;&lt;b"' in page
    path = tmp_path / "decisions.jsonl"
    path.write_text(json.dumps({"id": nasty.id, "decision": "reject", "reason": "luck"}) + "\n")
    decisions = expert.read_reviews(path)
    verdict = expert.expert_verdict(nasty, queue, decisions)
    assert (verdict.accepted, verdict.reasons) == (False, ("luck",))
    assert expert.expert_verdict(nasty, queue, {}).accepted is None
    path.write_text('{"id": "x", "decision": "maybe"}\n')
    with pytest.raises(ValueError, match=r"decisions\.jsonl:1: not a decision"):
        expert.read_reviews(path)


def test_a_decision_holds_for_what_was_read_and_survives_any_character(tmp_path):
    one = item(honest())
    expert.write_queue(tmp_path / "review.html", [one])
    assert f'data-digest="{one.digest}"' in (tmp_path / "review.html").read_text()
    path = tmp_path / "decisions.jsonl"
    record = {"id": one.id, "decision": "reject", "reason": "a\u2028b\x85c", "digest": one.digest}
    text = "\ufeff" + json.dumps(record, ensure_ascii=False) + "\r\n"
    path.write_text(text, encoding="utf-8", newline="")
    decisions = expert.read_reviews(path)
    verdict = expert.expert_verdict(one, [one], decisions)
    assert (verdict.accepted, verdict.reasons) == (False, ("a\u2028b\x85c",))
    played_again = item(honest(turn("ls")), name=one.id)
    assert expert.expert_verdict(played_again, [played_again], decisions).accepted is None


def test_faults_of_the_machine_and_the_endpoint_are_tried_again(tmp_path, monkeypatch):
    """What kept a stage from its opinion once must not stand for it in a resumed run."""
    faults = [1, 1]

    class Down(Chat):
        async def ask(self, messages, **settings):
            if len(faults) == 2:
                faults.pop()
                raise EndpointError("down")
            return await super().ask(messages)

    async def execute(item, task, config, runs):
        if faults:
            faults.pop()
            return Verdict("execution", None, 0.5, ("the machine is full",))
        return Verdict("execution", True, 1.0)

    monkeypatch.setattr(filter_module, "execute", execute)
    judge = model_judge(Down('{"score": 0.9, "reason": "works"}'))
    found = []
    for _ in range(3):
        one = item(honest())
        job = run_filter([one], {DRAFT.name: None}, tmp_path, CONFIG, judge, runs=1, concurrency=1)
        asyncio.run(job)
        found.append((one.verdicts["judge"].is_stopgap, one.verdicts["execution"].accepted))
    assert found == [(True, None), (False, True), (False, True)]
    assert len((tmp_path / "verdicts.jsonl").read_text().splitlines()) == 2


@given(st.lists(st.sampled_from(["heuristic", "judge", "execution", "expert", ""]), max_size=30))
def test_the_funnel_loses_and_invents_nothing(stages):
    items = []
    for number, stage in enumerate(stages):
        one = item(honest(), name=str(number))
        if stage:
            one.verdicts[stage] = Verdict(stage, False, 0.0, ("because: of it",))
        items.append(one)
    found = funnel.make_funnel(items, 0)
    removed = sum(stage["removed"] for stage in found["stages"])
    assert removed + found["kept"] == found["read"] == len(stages)
    assert found["kept"] == stages.count("")
    assert funnel.describe_funnel(found)


def test_execution_tells_right_from_nearly_right_and_keeps_its_verdicts(tmp_path):
    from envs.sources import load_tasks
    from envs.tasks.made import write_draft

    (tmp_path / "tasks").mkdir()
    write_draft(DRAFT, tmp_path / "tasks" / "one")
    tasks = {task.name: task for task in load_tasks(str(tmp_path / "tasks"))}
    wrong = honest()
    wrong.chunks[1] = turn(write("cat"))
    items = [item(honest(), "right"), item(wrong, "wrong")]

    def go():
        for one in items:
            one.verdicts = {}
        filtered = run_filter(
            items, tasks, tmp_path / "out", CONFIG, rule_judge, runs=1, concurrency=2
        )
        asyncio.run(filtered)
        return [one.rejected_by for one in items]

    assert go() == ["", "execution"]
    lines = (tmp_path / "out" / "verdicts.jsonl").read_text()
    assert go() == ["", "execution"]
    assert (tmp_path / "out" / "verdicts.jsonl").read_text() == lines  # nothing is run again


@pytest.mark.parametrize(
    ("recorded", "runs", "wrong"),
    [
        (["a", "red"], [["a", "blue"], ["a", "blue"]], [1]),
        (["a", "red"], [["a", "blue"], ["a", "green"]], []),  # it changes by itself
        (["a", "red"], [["a", "blue"]], []),  # one run cannot tell
        (["a", "ok in 3.1s"], [["a", "ok in 2.9s"], ["a", "ok in 3.0s"]], []),
        (["a", "x 1a2b Mon Nov"], [["a", "x 9c8d Tue Dec"]] * 2, []),
        (["p", "q", "a"], [["x", "y", "a"]] * 2, []),  # written in another form
        (["a", "b", "c"], [["a"], ["a", "b"]], []),  # ended earlier
    ],
)
def test_answers_that_commands_do_not_give_are_found(recorded, runs, wrong):
    assert differing_turns(recorded, runs) == wrong


def test_files_that_are_no_trajectories_are_set_aside(tmp_path):
    folder = tmp_path / "played"
    folder.mkdir()
    (folder / "torn.json").write_text('{"steps": [')
    save_trajectory(honest(), folder / "unknown.json")
    lost = honest()
    lost.reward, lost.ending, lost.task = 0.0, "failure", "word-report"
    save_trajectory(lost, folder / "lost.json")
    found = asyncio.run(
        filter_folder(folder, "harbor/word-report", tmp_path / "out", CONFIG, runs=1)
    )
    assert (found["read"], found["set_aside"], found["kept"]) == (1, 2, 0)
    aside = (tmp_path / "out" / "set_aside.jsonl").read_text()
    assert "torn.json" in aside and "not in the data set" in aside


def test_labels_move_the_judge_s_threshold_and_a_folder_keeps_one_judge(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    path = tmp_path / "labels.jsonl"
    items = []
    for number, score in enumerate((0.9, 0.8, 0.6, 0.55)):
        one = item(honest(), name=f"{number}.json")
        one.verdicts["score"] = Verdict("judge", True, score)
        items.append(one)

    async def generous(one):
        return one.verdicts["score"]

    decisions = zip(items[:3], ("accept", "accept", "reject"), strict=True)
    path.write_text("".join(json.dumps({"id": i.id, "decision": d}) + "\n" for i, d in decisions))
    judge = asyncio.run(_calibrated(generous, items, path, tmp_path))
    assert [asyncio.run(judge(one)).accepted for one in items] == [True, True, False, False]
    assert 0.6 < json.loads((tmp_path / "calibration.json").read_text())["threshold"] <= 0.8

    out = tmp_path / "out"
    asyncio.run(filter_folder(folder, "harbor/word-report", out, CONFIG, runs=1))
    with pytest.raises(ValueError, match="whose runs is 1, not 2"):
        asyncio.run(filter_folder(folder, "harbor/word-report", out, CONFIG, runs=2))


def test_files_of_any_form_are_set_aside_and_never_end_the_filter(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    os.mkfifo(folder / "pipe.json")
    (folder / "link.json").symlink_to(tmp_path / "nowhere")
    (folder / "deep.json").write_text("[" * 100_000)
    (folder / "bytes.json").write_bytes(b"\xff\xfe{}")
    good = folder / "good.json"
    save_trajectory(honest(), good)
    document = json.loads(good.read_text())
    good.unlink()
    for number, key in enumerate(document):
        for kind, value in enumerate((None, 7, [], {}, [None], [{}], "\ud800")):
            text = json.dumps({**document, key: value})
            (folder / f"{number}-{kind}.json").write_text(text)
    items, aside = read_items(folder, {})
    assert not items and len(aside) == 4 + 7 * len(document)


def test_files_whose_names_are_no_lines_are_set_aside(tmp_path):
    """Their lines of kept.txt would name other files, or could not be written at all."""
    for name in (b"a\nb.json", b"\xff.json", "a\u2028b.json".encode(), "\u00e9 b.json".encode()):
        save_trajectory(honest(), tmp_path / os.fsdecode(name))
    items, aside = read_items(tmp_path, {DRAFT.name: SimpleNamespace(instruction="")})
    assert [one.id for one in items] == ["\u00e9 b.json"] and len(aside) == 3


def test_long_hostile_commands_are_judged_in_time():
    for text in ("cp " * 20_000, "cat > a << b\n" * 1_500, "curl " * 20_000, "> " * 50_000):
        began = time.process_time()
        heuristic(item(honest(turn(text))))
        asyncio.run(rule_judge(item(honest(turn(text)))))
        assert time.process_time() - began < 30.0  # it is below 1; a square would be minutes
