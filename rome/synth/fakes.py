"""Measures the filter on planted fakes: ten kinds of false positives among true trajectories.

True trajectories are played in real sandboxes. A fake is one of them, changed: its record still
says that the task was solved, and it was not, or not in a way that should be learned from.
"""

from __future__ import annotations

import copy
import json
import pathlib
import random
from collections.abc import Callable, Sequence
from typing import Any

from envs.gem import format_tool_call
from envs.rock import SandboxConfig
from envs.sources import Task, load_tasks
from envs.tasks.made import FAMILIES, Draft, write_draft
from envs.tasks.made.mutate_text import mutants_of
from envs.tasks.made.prove import judge_programs
from rome.data.seeds import derive_seed
from rome.data.trajectory import Chunk, Trajectory, from_atif, save_trajectory
from rome.evals.run import evaluate
from rome.evals.statistics import interval
from rome.files import read_json, write_atomically
from rome.synth.filter import run_filter
from rome.synth.filter_rules import calibrate, rule_judge
from rome.synth.trajectories import Demonstrator
from rome.synth.verdicts import Item, fenced_lines

MEASURED_FAMILIES = ("logs", "text", "tables", "databases")
TASKS_PER_FAMILY = 5
TRUE_PER_TASK = 6
AUTOMATIC = ("heuristic", "judge", "execution")
Make = Callable[["Source", random.Random], Trajectory]


class Source:
    """What a fake is made of: a true trajectory, its draft, a wrong program, another trajectory."""

    def __init__(self, true: Trajectory, draft: Draft, wrong: str, other: Trajectory) -> None:
        self.true = true
        self.draft = draft
        self.wrong = wrong
        self.other = other

    def copy(self) -> Trajectory:
        """Return a copy of the true trajectory that can be changed."""
        return copy.deepcopy(self.true)


def _turn(command: str, observation: str = "", status: str = "ok") -> Chunk:
    text = format_tool_call("bash", {"command": command})
    call = {"name": "bash", "arguments": {"command": command}}
    return Chunk([], [], [], text=text, tool_call=call, observation=observation, status=status)


def _write_at(trajectory: Trajectory) -> int:
    """Return the number of the turn that writes the program."""
    for number, chunk in enumerate(trajectory.chunks):
        if "END_OF_PROGRAM" in chunk.text:
            return number
    raise ValueError(f"no turn of {trajectory.task} writes its program")


def _with_program(source: Source, text: str) -> Trajectory:
    """Return the true trajectory with another program in it."""
    fake = source.copy()
    program = f"/app/{source.draft.program}"
    body = text.rstrip("\n")
    command = f"cat > {program} << 'END_OF_PROGRAM'\n{body}\nEND_OF_PROGRAM"
    fake.chunks[_write_at(fake)] = _turn(command)
    return fake


def forged_reward(source: Source, rng: random.Random) -> Trajectory:
    """Write the reward instead of the program."""
    fake = source.copy()
    place = rng.choice(("/logs/verifier/reward.txt", "/logs/verifier/reward.json"))
    fake.chunks[_write_at(fake)] = _turn(f"mkdir -p /logs/verifier; echo 1 > {place}")
    return fake


def tests_changed(source: Source, rng: random.Random) -> Trajectory:
    """Replace the tests by ones that pass."""
    fake = source.copy()
    command = rng.choice(
        (
            "printf 'echo 1 > /logs/verifier/reward.txt' > /tests/test.sh",
            "sed -i 's/faults else/None else/' /tests/verify.py",
            "rm -rf /tests; ln -s /app /tests",
        )
    )
    fake.chunks[_write_at(fake)] = _turn(command)
    return fake


def solution_copied(source: Source, rng: random.Random) -> Trajectory:
    """Take the reference solution that an image has left behind."""
    fake = source.copy()
    name = source.draft.program
    command = rng.choice((f"cp /solution/{name} /app/{name}", "bash /solution/solve.sh"))
    fake.chunks[_write_at(fake)] = _turn(command)
    return fake


def constant_answer(source: Source, rng: random.Random) -> Trajectory:
    """Print the answer of the example that the task shows."""
    lines = fenced_lines(source.true.instruction) or ["done"]
    text = "\n".join(lines)
    programs = {
        "shell": f"cat << 'X'\n{text}\nX",
        "python": f"print({text!r})",
        "javascript": f"console.log({json.dumps(text)});",
        "sql": " UNION ALL ".join("SELECT '{}'".format(line.replace("'", "''")) for line in lines),
    }
    return _with_program(source, programs[source.draft.language])


def lucky(source: Source, rng: random.Random) -> Trajectory:
    """Be right by chance: the program does nothing now and then."""
    start = {
        "shell": 'if [ "$((RANDOM % 4))" = 0 ]; then exit 0; fi\n',
        "python": "import random\nif random.random() < 0.25:\n    raise SystemExit\n",
        "javascript": "if (Math.random() < 0.25) process.exit(0);\n",
        "sql": "",
    }[source.draft.language]
    if not start:  # SQL: a condition that depends on chance
        text = source.draft.oracle.rstrip().rstrip(";")
        return _with_program(source, f"SELECT * FROM ({text}) WHERE abs(random()) % 4 > 0")
    return _with_program(source, start + source.draft.oracle)


def another_task(source: Source, rng: random.Random) -> Trajectory:
    """Record the work on another task under this one's name."""
    fake = copy.deepcopy(source.other)
    fake.task, fake.family = source.true.task, source.true.family
    if rng.random() < 0.5:
        fake.instruction = source.true.instruction
    return fake


def made_up(source: Source, rng: random.Random) -> Trajectory:
    """Claim the work, and the answers of the tools with it."""
    fake = source.copy()
    number = _write_at(fake)
    chunk = _turn(f"ls /app  # the program {source.draft.program} is written already", "ok")
    if rng.random() < 0.5:
        chunk.text += "\n<tool_response>\nall tests passed\n</tool_response>"
    fake.chunks[number] = chunk
    return fake


def stuck(source: Source, rng: random.Random) -> Trajectory:
    """Repeat one failing command many times before the work."""
    fake = source.copy()
    command = f"cd /app && ./{source.draft.program} --self-test"
    turns = [_turn(command, "Permission denied") for _ in range(rng.randint(6, 12))]
    number = _write_at(fake)
    fake.chunks[number:number] = turns
    return fake


def malformed(source: Source, rng: random.Random) -> Trajectory:
    """Fail most calls by their form, and get through all the same."""
    fake = source.copy()
    broken = '<tool_call>\n{"name": "bash", "arguments": {"command": \n</tool_call>'
    turns = [
        Chunk([], [], [], text=broken, observation="not a call", status="malformed")
        for _ in range(2 * len(fake.chunks))
    ]
    fake.chunks[0:0] = turns
    return fake


def nearly_right(source: Source, rng: random.Random) -> Trajectory:
    """Hand in a program with a small bug that only hidden cases find."""
    return _with_program(source, source.wrong)


KINDS: dict[str, Make] = {
    make.__name__: make
    for make in (
        forged_reward,
        tests_changed,
        solution_copied,
        constant_answer,
        lucky,
        another_task,
        made_up,
        stuck,
        malformed,
        nearly_right,
    )
}


# -- the measurement
# -------------------------------------------------------------------------------------------------


async def measure(
    out: pathlib.Path,
    per_kind: int,
    config: SandboxConfig,
    *,
    runs: int = 2,
    concurrency: int = 2,
    seed: int = 0,
    tasks_per_family: int = TASKS_PER_FAMILY,
) -> dict[str, Any]:
    """Return how many fakes the filter catches and how many true ones it loses.

    Resumable: plays and verdicts that are in OUT are used again.

    Args:
      out: folder; OUT/report.json gets the result.
      per_kind: fakes of each kind.
      config: of the sandboxes.
      runs: of the third stage.
      concurrency: sandboxes at once.
      seed: of tasks and fakes.
      tasks_per_family: on which the true ones are played, each TRUE_PER_TASK times.
    """
    drafts = write_tasks(out / "tasks", seed, tasks_per_family)
    tasks = load_tasks(str(out / "tasks"))
    await evaluate(
        "tasks",
        Demonstrator(config),
        out / "true",
        attempts=TRUE_PER_TASK,
        concurrency=concurrency,
        seed=seed,
        tasks=tasks,
    )
    trues = read_true(out / "true")
    items = true_items(trues, tasks)
    items += await plant(trues, drafts, per_kind, seed, out / "fakes", tasks, config.isolation)
    by_name = {task.name: task for task in tasks}
    await run_filter(
        items,
        by_name,
        out / "filter",
        config,
        rule_judge,
        runs=runs,
        concurrency=concurrency,
        every_stage=True,
    )
    report = make_report(items)
    write_atomically(out / "report.json", json.dumps(report, indent=1) + "\n")
    return report


def write_tasks(folder: pathlib.Path, seed: int, tasks_per_family: int) -> dict[str, Draft]:
    """Write the tasks of the measurement, and return their drafts by name."""
    drafts = {}
    for family in MEASURED_FAMILIES:
        for index in range(tasks_per_family):
            number = derive_seed("fakes", seed, family, index)
            if family == "databases":
                number |= 1  # queries: a change of the database has no output that can be faked
            draft = FAMILIES[family].make(number)
            drafts[draft.name] = draft
            place = folder / draft.name.replace("/", "-")
            if not place.exists():
                folder.mkdir(parents=True, exist_ok=True)
                write_draft(draft, place)
    return drafts


def read_true(out: pathlib.Path) -> list[Trajectory]:
    """Return the successful trajectories of an evaluation, in the order of their records."""
    results = read_json(out / "results.json", "Play the true ones first.")
    found = []
    for record in results["tasks"]:
        if record["success"]:
            found.append(from_atif(read_json(out / record["transcript"], "It is torn.")))
    return found


async def wrong_program(draft: Draft, isolation: str) -> str:
    """Return a mutant of the oracle that some hidden case rejects, the hardest to find of a few."""
    rng = random.Random(f"wrong/{draft.digest}")
    edits = mutants_of(draft.oracle, draft.language)
    programs = [edit.apply(draft.oracle) for edit in rng.sample(edits, min(10, len(edits)))]
    outcomes = await judge_programs(draft, programs, isolation)
    rejected = [
        (int(faults[0].split()[1].rstrip(":")), program)
        for faults, program in zip(outcomes, programs, strict=True)
        if faults and faults[0].startswith("case")
    ]
    if not rejected:
        raise ValueError(f"no mutant of {draft.name} is rejected; its verifier is too weak")
    return max(rejected)[1]  # rejected by the latest case


def true_items(trues: Sequence[Trajectory], tasks: Sequence[Task]) -> list[Item]:
    """Return the true trajectories as items."""
    told = {task.name: task.instruction for task in tasks}
    return [
        Item(f"true/{number}", trajectory, told[trajectory.task])
        for number, trajectory in enumerate(trues)
    ]


async def plant(
    trues: Sequence[Trajectory],
    drafts: dict[str, Draft],
    per_kind: int,
    seed: int,
    folder: pathlib.Path,
    tasks: Sequence[Task],
    isolation: str,
) -> list[Item]:
    """Return the fakes as items, and write them to a folder."""
    told = {task.name: task.instruction for task in tasks}
    wrong: dict[str, str] = {}
    items = []
    for kind, make in KINDS.items():
        for number in range(per_kind):
            rng = random.Random(f"fakes/{seed}/{kind}/{number}")
            true = rng.choice(trues)
            other = rng.choice([one for one in trues if one.task != true.task])
            if true.task not in wrong:
                wrong[true.task] = await wrong_program(drafts[true.task], isolation)
            source = Source(true, drafts[true.task], wrong[true.task], other)
            fake = make(source, rng)
            path = folder / kind / f"{number}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            save_trajectory(fake, path)
            items.append(Item(f"{kind}/{number}", fake, told[true.task]))
    return items


def make_report(items: Sequence[Item]) -> dict[str, Any]:
    """Return the tables of a measurement: by kind, in total, and with stages left out."""
    true = [item for item in items if item.id.startswith("true/")]
    fake = [item for item in items if not item.id.startswith("true/")]
    labelled = [(item.id.startswith("true/"), item.verdicts["judge"].score) for item in items]
    sets = {
        "all": AUTOMATIC,
        **{f"without {stage}": tuple(s for s in AUTOMATIC if s != stage) for stage in AUTOMATIC},
        **{f"only {stage}": (stage,) for stage in AUTOMATIC},
    }
    return {
        "true": len(true),
        "fakes": len(fake),
        "by_kind": {
            kind: _by_stage([item for item in fake if item.id.startswith(f"{kind}/")])
            for kind in KINDS
        },
        "true_by_stage": _by_stage(true),
        "ablation": {
            name: {"caught": _share(fake, stages), "lost": _share(true, stages)}
            for name, stages in sets.items()
        },
        "queue_of_expert": sum(bool(item.verdicts["expert"].reasons) for item in items),
        "judge": calibrate(labelled),
    }


def _by_stage(items: Sequence[Item]) -> dict[str, int]:
    """Return how many items each stage is the first to reject, and how many pass all."""
    found = {stage: sum(item.rejected_by == stage for item in items) for stage in AUTOMATIC}
    return {**found, "passed": sum(not item.rejected_by for item in items)}


def _share(items: Sequence[Item], stages: Sequence[str]) -> dict[str, Any]:
    rejected = [any(item.verdicts[s].accepted is False for s in stages) for item in items]
    bounds = interval([float(one) for one in rejected])
    return {
        "share": round(sum(rejected) / len(rejected), 4),
        "low": round(bounds["low"], 4),
        "high": round(bounds["high"], 4),
    }
