"""A train step whose mesh spans several processes is the step of one process: any mix of FSDP,
experts, tensor and sequence.
"""

import json

import jax
import numpy as np
import optax
import pytest

from rome.train.state import init_state
from rome.train.team import Team
from tests.distributed.one_step import MODEL, one_update
from tests.distributed.processes import run_job

MIXED = {"fsdp": 2, "expert": 2, "tensor": 2}
MESHES = [
    {"fsdp": 8},
    {"expert": 8},
    {"replica": 2, "expert": 2, "sequence": 2},
    {"fsdp": 4, "tensor": 2},
    MIXED,
]


def require_equal(count: int, meshes: list[dict], tmp_path, seconds: float) -> None:
    job = run_job(
        count,
        8 // count,
        ["-m", "tests.distributed.one_step", str(tmp_path / "out.npz"), json.dumps(meshes)],
        tmp_path,
        seconds,
    )
    assert job.statuses == [0] * count, job.output()
    together, names = np.load(tmp_path / "out.npz"), []
    for mesh in meshes:
        for name, expected in one_update(mesh, Team()).items():  # 8 devices of this one process
            names.append(f"{json.dumps(mesh)} {name}")
            np.testing.assert_allclose(
                together[names[-1]], expected, rtol=2e-4, atol=2e-6, err_msg=names[-1]
            )
    assert sorted(names) == sorted(together.files)


@pytest.mark.long
@pytest.mark.timeout(900)  # it takes seconds, but on a busy machine compilation crawls
def test_scores_metrics_and_gradients_over_two_processes_equal_those_of_one(tmp_path):
    require_equal(2, [MIXED], tmp_path, 840)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("count", [2, 4])
def test_every_mix_of_axes_over_processes_equals_one(count, tmp_path):
    require_equal(count, MESHES, tmp_path, 1700)


@pytest.mark.long
def test_the_compared_step_moves_every_parameter():
    start = jax.tree_util.tree_leaves_with_path(init_state(MODEL, optax.sgd(1.0), seed=0).params)
    after = one_update(MIXED, Team())
    for path, leaf in start:
        name = "/".join(str(key.key) for key in path)
        assert np.abs(after[name] - leaf).max() > 1e-5, name
