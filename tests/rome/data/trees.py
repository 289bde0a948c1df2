"""Random episodes with branches, and their oracle: every path is walked from its own leaf."""

from hypothesis import strategies as st

from rome.data.trajectory import Chunk, Trajectory
from rome.data.tree import LAST, ROOT


@st.composite
def shapes(draw, most=7):
    """Parents and edges of some chunks."""
    made = []
    for number in range(draw(st.integers(1, most))):
        parent = draw(st.sampled_from([LAST, LAST, ROOT, *range(number)]))
        is_root = parent == ROOT or (parent == LAST and number == 0)
        edges = ["continuation", "compaction", "subagent"] + ["rewind"] * (not is_root)
        made.append((parent, draw(st.sampled_from(edges))))
    return made


@st.composite
def episodes(draw, most=7, kinds=("rl", "rl", "rl", "context"), may_be_silent=True):
    """An episode with branches; each action token has an id of its own from 1,000 on."""
    ids = iter(range(1000, 10_000))
    chunks = []
    for number, (parent, edge) in enumerate(draw(shapes(most))):
        starts = parent == ROOT or number == 0
        acted = draw(st.integers(0 if may_be_silent and not starts else 1, 3))
        action_ids = [next(ids) for _ in range(acted)]
        chunks.append(
            Chunk(
                draw(st.lists(st.integers(1, 99), min_size=1, max_size=3)),
                action_ids,
                [-token / 1000 for token in action_ids],
                versions=[(number, 0, acted)] if acted else [],
                kind=draw(st.sampled_from(kinds)),
                parent=parent,
                edge=edge,
            )
        )
    reward = draw(st.sampled_from([0.0, 0.5, 1.0]))
    return Trajectory("t", "f", chunks, reward, "success" if reward else "failure")


def ancestors(trajectory: Trajectory, number: int) -> list[int]:
    """Return the chunks from the root to a chunk, itself included."""
    path = [number]
    while True:
        parent = trajectory.chunks[path[0]].parent
        if parent == LAST:
            parent = path[0] - 1 if path[0] else ROOT
        if parent == ROOT:
            return path
        path.insert(0, parent)


def leaf_paths(trajectory: Trajectory) -> list[list[int]]:
    """Return the path to each chunk that no other path goes through."""
    paths = [ancestors(trajectory, number) for number in range(len(trajectory.chunks))]
    return [path for path in paths if not any(path[-1] in other[:-1] for other in paths)]


def credit_of(trajectory: Trajectory, number: int, credit: dict[str, float]) -> float:
    """Return the weight of a chunk's credit, from the definition."""
    chunks = trajectory.chunks
    path = ancestors(trajectory, number)
    weight = 1.0
    for place in path:
        if chunks[place].edge in ("compaction", "subagent"):
            weight *= credit.get(chunks[place].edge, 1.0)
    for later in range(number + 1, len(chunks)):
        if chunks[later].edge != "rewind":
            continue
        goes_on_from = ancestors(trajectory, later)[-2]
        if goes_on_from in path[:-1]:
            return weight * credit.get("rewind", 1.0)
    return weight
