"""Random groups of episodes that begin alike: copies of another one's first chunks, as an anchor
replays them (context) or as two samples that happen to be equal (trained by both), and prompts from
few ids, so that equal beginnings of every length arise.
"""

import dataclasses

import numpy as np

from rome.data.trajectory import Chunk, Trajectory
from rome.data.tree import ROOT


def random_groups(seed, *, episodes=8, vocabulary=3, turns=4, branching=True, routes=None):
    """routes: (tokens) -> routes of a chunk's tokens, for replay."""
    rng = np.random.default_rng(seed)

    def ids(most):
        return [int(one) for one in rng.integers(0, vocabulary, rng.integers(1, most + 1))]

    def new_chunk():
        action_ids = ids(4)
        prompt_ids = ids(5)
        length = len(action_ids)
        return Chunk(
            prompt_ids,
            action_ids,
            [float(one) for one in np.float32(-rng.exponential(1.0, length))],
            versions=[(int(rng.integers(0, 2)), 0, length)],
            routes=None if routes is None else routes(len(prompt_ids) + length),
            status=str(rng.choice(["ok", "ok", "tool_error"])),
            kind=str(rng.choice(["rl", "rl", "rl", "imitation"])),
        )

    def copied(chunk):
        changed = {"logprobs": [float(np.float32(one - rng.random())) for one in chunk.logprobs]}
        if rng.random() < 0.5:
            changed["kind"] = "context"
        if rng.random() < 0.3:
            changed["versions"] = [(2, 0, len(chunk.action_ids))]
        if routes is not None and rng.random() < 0.4:
            changed["routes"] = routes(len(chunk.prompt_ids) + len(chunk.action_ids))
        return dataclasses.replace(chunk, parent=-1, edge="continuation", **changed)

    made = []
    for number in range(episodes):
        source = made[rng.integers(len(made))].chunks if made and rng.random() < 0.8 else []
        copies = [copied(chunk) for chunk in source[: rng.integers(0, len(source) + 1)]]
        fresh = [new_chunk() for _ in range(rng.integers(1, turns))]
        chunks = (copies + fresh)[:turns]
        if branching and rng.random() < 0.4:
            for place, chunk in enumerate(chunks[1:], 1):
                chunk.parent = int(rng.choice([ROOT, *range(place), place - 1]))
        reward = float(rng.choice([0.0, 0.5, 1.0]))
        ending = "success" if reward else "failure"
        made.append(Trajectory("t", "f", chunks, reward, ending, group=number // 4, episode=number))
    return made
