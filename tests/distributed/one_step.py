"""A process of test_step_over_processes: one update on each mesh; process 0 writes what came out.

python -m tests.distributed.one_step OUT.npz '[{"fsdp": 8}, ...]'
"""

import dataclasses
import json
import sys

import jax
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from rome.data.batch import Batch
from rome.losses import LOSSES, LossConfig, count_denominators
from rome.model.sharding import make_mesh
from rome.train.distributed import check_mesh_spans, choose, start
from rome.train.step import Learner
from rome.train.team import Team
from tests.rome.train import test_step

MODEL = dataclasses.replace(test_step.MODEL, num_layers=1)  # a second one only compiles longer


def one_update(mesh_shape: dict[str, int], team: Team) -> dict[str, np.ndarray]:
    """By name: the scores, the metrics, and the parameters after one step of plain SGD, which shows
    the whole gradient.
    """
    mesh = make_mesh(mesh_shape, MODEL)
    check_mesh_spans(mesh)
    learner = Learner(MODEL, LOSSES["ipa"], LossConfig(), optax.sgd(1.0), mesh)
    state = learner.init(seed=0)
    batches = test_step.packed(8)
    team.meet("state")
    scores = learner.score(state.params, batches)
    # A little off the scores, so that no ratio lies on the edge of a clip, where rounding would
    # decide.
    off = [
        (score + 0.05 * np.sin(1.0 + batch.positions_BT)).astype(np.float32)
        for batch, score in zip(batches, scores, strict=True)
    ]
    batches = [batch._replace(logp_old_BT=old) for batch, old in zip(batches, off, strict=True)]
    everywhere = jax.jit(lambda tree: tree, out_shardings=NamedSharding(mesh, PartitionSpec()))
    denominators, work = count_denominators(batches), learner.count_work(batches)
    own = [only_own_rows(batch, learner) for batch in batches]
    state, metrics = learner.update(state, own, denominators, work)
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(everywhere(state.params)))
    flat = {"/".join(str(key.key) for key in path): leaf for path, leaf in leaves}
    return (
        {f"score {number}": score for number, score in enumerate(scores)}
        | {name: np.asarray(value) for name, value in metrics.items()}
        | flat
    )


def only_own_rows(batch: Batch, learner: Learner) -> Batch:
    """Return the batch with zeros in the rows that other processes feed."""
    fed = learner.own_rows(batch.num_rows, batch.num_rows).fed

    def keep(field: np.ndarray) -> np.ndarray:
        kept = np.zeros_like(field)
        kept[fed] = field[fed]
        return kept

    return batch.map(keep)


def main() -> None:
    team = start(choose("", -1, -1), stop=lambda: False, errors=())
    try:
        found = {}
        for mesh in json.loads(sys.argv[2]):
            found |= {
                f"{json.dumps(mesh)} {name}": value
                for name, value in one_update(mesh, team).items()
            }
        if team.leads:
            np.savez(sys.argv[1], **found)
    except BaseException as error:
        team.part(error)
        raise
    finally:
        team.close()


if __name__ == "__main__":
    main()
