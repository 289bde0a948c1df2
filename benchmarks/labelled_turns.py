"""Turns with labels that rules gave them: what a scripted agent did, and what was planted into it.

The labels come from how a turn was made, not from the heuristic under test. Hard cases are in on
both sides: the same command after a change, pages of a file, polling, a helper that a task does not
name; and unrelated files that a listing happened to show.
"""

import random
from typing import NamedTuple

from rome.data.trajectory import Chunk, Trajectory
from rome.data.tree import LAST, ROOT

NAMES = ("harbor", "meadow", "lantern", "pebble", "willow", "copper", "saffron", "tundra")
STRAY = (
    ("curl -s wttr.in/Paris", "Sunny 21C"),
    ("cat ~/.bashrc", "alias ll='ls -l'"),
    ("cowsay hello", "moo"),
    ("git -C /opt/kernel log", "commit 1f3 linus"),
    ("fortune", "You will travel far."),
    ("cat /proc/cpuinfo", "model name: Xeon"),
)


class Labelled(NamedTuple):
    """One turn: the trajectory it is in, its chunk, its label ("" is relevant) and its kind."""

    trajectory: Trajectory
    chunk: int
    label: str
    kind: str


def turn(
    command: str, observation: str, *, parent: int = LAST, edge: str = "continuation"
) -> Chunk:
    call = {"name": "shell", "arguments": {"command": command}}
    return Chunk(
        [1],
        [2],
        [0.0],
        text=command,
        tool_call=call,
        observation=observation,
        parent=parent,
        edge=edge,
    )


def base(rng: random.Random) -> tuple[str, list[tuple[str, str]]]:
    """Return an instruction and turns that solve it, each of which is relevant."""
    one, two = rng.sample(NAMES, 2)
    number = rng.randrange(100, 999)
    instruction = f"Copy the lines of {one}.txt that contain {number} into {two}.txt."
    turns = [
        ("ls", f"{one}.txt\nreadme_{rng.choice(NAMES)}.md"),
        (f"head -3 {one}.txt", f"alpha {number}\nbeta\ngamma {number}"),
        (f"grep {number} {one}.txt > {two}.txt", ""),
        (f"cat {two}.txt", f"alpha {number}\ngamma {number}"),
    ]
    return instruction, turns


def hard_relevant(rng: random.Random) -> tuple[str, list[tuple[str, str]], list[int], str]:
    """Return an instruction, turns, and which of them look irrelevant and are not."""
    one, two = rng.sample(NAMES, 2)
    kind = rng.choice(["after change", "pages", "polling", "helper", "retest", "append"])
    if kind == "after change":
        turns = [("ls", one), (f"mv {one} {two}", ""), ("ls", two)]
        return f"Rename {one} to {two}.", turns, [2], kind
    if kind == "pages":
        turns = [
            (f"sed -n {10 * page},{10 * page + 9}p {one}.log", f"{page * 37}") for page in range(4)
        ]
        return f"Sum the numbers in {one}.log.", turns, [1, 2, 3], kind
    if kind == "polling":
        turns = [(f"./build_{one} &", "started")]
        turns += [("sleep 5; cat state", "running")] * 3 + [("cat state", "done")]
        return f"Build {one} and wait until its state is done.", turns, [2, 3], kind
    if kind == "helper":
        turns = [
            ("cat > /tmp/helper.py <<'E'\nprint(sum(map(int, open(0))))\nE", ""),
            (f"python3 /tmp/helper.py < {one}.txt", "42"),
        ]
        return f"Add up the numbers in {one}.txt.", turns, [0], kind
    if kind == "retest":
        turns = [
            (f"pytest {one}_test.py", "1 failed"),
            (f"sed -i s/1/2/ {one}.py", ""),
            (f"pytest {one}_test.py", "1 failed"),
        ]
        return f"Make {one}.py pass its tests.", turns, [2], kind
    turns = [(f"echo {two} >> {one}.txt", ""), (f"echo {two} >> {one}.txt", "")]
    return f"Append {two} to {one}.txt twice.", turns, [1], kind


def make_trajectory(instruction: str, chunks: list[Chunk]) -> Trajectory:
    return Trajectory("task", "family", chunks, 1.0, "success", instruction=instruction)


def planted(rng: random.Random, reason: str) -> list[Labelled]:
    """Return the irrelevant turns of one episode, planted for one reason."""
    instruction, turns = base(rng)
    chunks = [turn(*one) for one in turns]
    kind = reason
    if reason == "duplicates":
        place = rng.choice([0, 1])
        command, observation = turns[place]
        near = rng.choice([command, f"{command} ", f"cd . && {command}"])
        chunks.insert(2, turn(near, observation))
        labelled = [2]
    elif reason == "loops":
        command, answer = rng.choice(
            [("make check", "error 3"), (f"grep -c x {turns[0][1][:4]}", "0")]
        )
        chunks[2:2] = [turn(command, answer) for _ in range(4)]
        labelled = [3, 4, 5]
    elif reason == "off_task":
        if rng.random() < 0.2:
            kind = "off_task, listed file"
            chunks.insert(2, turn(f"cat {turns[0][1].split()[1]}", "about us"))
        else:
            chunks.insert(2, turn(*rng.choice(STRAY)))
        labelled = [2]
    elif reason == "compressed":
        chunks[3] = turn(*turns[3], parent=ROOT, edge="compaction")
        labelled = [0, 1, 2]
    else:
        chunks[2:2] = [turn(f"rm {turns[0][1].split()[0]}", "")]
        chunks[3] = turn(*turns[2], parent=1, edge="rewind")
        labelled = [2]
    trajectory = make_trajectory(instruction, chunks)
    return [Labelled(trajectory, chunk, reason, kind) for chunk in labelled]


def labelled_turns(number: int = 200, seed: int = 0) -> list[Labelled]:
    """Return so many labelled turns: half relevant, and half of these hard."""
    rng = random.Random(f"labelled turns/{seed}")
    reasons = ("compressed", "taken_back", "loops", "duplicates", "off_task")
    found: list[Labelled] = []
    for reason in reasons:
        of_reason: list[Labelled] = []
        while len(of_reason) < number // 10:
            of_reason += planted(rng, reason)
        found += of_reason[: number // 10]
    easy: list[Labelled] = []
    hard: list[Labelled] = []
    while len(easy) < number // 4:
        instruction, turns = base(rng)
        trajectory = make_trajectory(instruction, [turn(*one) for one in turns])
        easy += [Labelled(trajectory, place, "", "plain") for place in range(len(turns))]
    while len(hard) < number - number // 2 - number // 4:
        instruction, turns, places, kind = hard_relevant(rng)
        trajectory = make_trajectory(instruction, [turn(*one) for one in turns])
        hard += [Labelled(trajectory, place, "", kind) for place in places]
    return found + easy[: number // 4] + hard[: number - number // 2 - number // 4]
