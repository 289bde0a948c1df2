"""Digests of linear episodes: their files and their rows, as they were before records were trees.

Run it to print the digests: `python -m tests.rome.data.linear_golden`.
"""

import hashlib
import json

import numpy as np

from rome.data.packing import pack
from rome.data.trajectory import Chunk, Trajectory, to_atif


def linear_step() -> list[Trajectory]:
    """Return groups of episodes with every kind and status of a chunk, without branches."""
    rng = np.random.default_rng(7)
    made = []
    for number in range(9):
        chunks = []
        for place in range(int(rng.integers(1, 6))):
            read, acted = int(rng.integers(1, 5)), int(rng.integers(0, 4)) + (place == 0)
            kind = ("context", "rl", "rl", "imitation")[int(rng.integers(0, 4))]
            kind = kind if place else "rl"
            chunks.append(
                Chunk(
                    [1, 2, 3] if place == 0 else rng.integers(0, 99, read).tolist(),
                    rng.integers(0, 99, acted).tolist(),
                    (-rng.random(acted)).tolist(),
                    versions=[(number, 0, acted)] if acted else [],
                    text=f"turn {place}",
                    tool_call={"name": "bash", "arguments": {"n": place}} if place % 2 else None,
                    observation="seen" * (place % 3),
                    status=("ok", "tool_error", "malformed")[place % 3],
                    kind=kind,
                    cached_tokens=place,
                )
            )
        reward = float(number % 3) / 2
        ending = "success" if reward else "failure"
        made.append(
            Trajectory(f"t/{number}", "t", chunks, reward, ending, number // 3, number % 3, number)
        )
    return made


def digests() -> dict[str, str]:
    """Return the digest of the files of the step, and of its rows for each advantage."""
    files = [to_atif(trajectory) for trajectory in linear_step()]
    for document in files:
        document["agent"].pop("version")
    found = {"files": hashlib.sha256(json.dumps(files).encode()).hexdigest()[:16]}
    for advantage in ("normalised", "steps"):
        batch = pack(
            linear_step(),
            row_length=48,
            chunks_per_row=12,
            gamma=0.9,
            failure_reward=-1.0,
            advantage=advantage,
            negative_weight=0.5,
        )
        digest = hashlib.sha256()
        for name, field in batch._asdict().items():
            if field is not None and name != "lines_BC":
                digest.update(f"{name} {field.dtype} {field.shape}".encode() + field.tobytes())
        found[advantage] = digest.hexdigest()[:16]
    return found


if __name__ == "__main__":
    print(digests())
