"""The learner as a library: the weights of a directory, one's own loss, one's own rows."""

import jax
import numpy as np
import optax
import pytest

from rome.data.packing import microbatches, pack
from rome.data.trajectory import Chunk, Trajectory
from rome.losses import count_denominators
from rome.model.hf.checkpoint import save_hf
from rome.own_code import OwnCodeError
from rome.train.library import open_learner
from tests.rome.model.small import CONFIG, random_params
from tests.rome.stages.own import Clipped


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A checkpoint of a small random model."""
    path = tmp_path_factory.mktemp("checkpoint")
    save_hf(random_params(CONFIG), CONFIG, path)
    return path


def rows():
    episodes = [
        Trajectory("t", "f", [Chunk([1, 2], [3 + number], [-3.5])], reward, "success", 0, number)
        for number, reward in enumerate((1.0, 0.0))
    ]
    return pack(episodes, row_length=32, chunks_per_row=4, gamma=1.0, failure_reward=0.0)


@pytest.mark.long
def test_a_directory_becomes_a_learner_that_updates_its_weights_with_a_loss_of_ones_own(directory):
    learner, state = open_learner(directory, Clipped(ceiling=2.0), optax.sgd(0.1))
    jax.tree.map(np.testing.assert_array_equal, random_params(CONFIG), jax.device_get(state.params))
    batches = microbatches(rows(), learner.mesh.size)
    before = learner.score(state.params, batches)[0]
    batches = [batches[0]._replace(logp_old_BT=before)]
    state, metrics = learner.update(state, batches, count_denominators(batches))
    after = learner.score(state.params, batches)[0]
    assert float(metrics["max_ratio"]) == pytest.approx(1.0)
    assert after[0, 2] > before[0, 2]  # the token that was rewarded


def test_rows_that_do_not_divide_over_the_devices_are_refused_with_the_remedy(directory):
    learner, state = open_learner(directory, "grpo", optax.sgd(0.1))
    batch = rows()
    assert learner.mesh.size > batch.num_rows == 1
    with pytest.raises(ValueError, match=r"has 1 rows, .*microbatches\(batch, 8\)"):
        learner.update(state, [batch], count_denominators([batch]))


def test_an_unknown_loss_is_refused(directory):
    with pytest.raises(OwnCodeError, match=r"'grpp' is unknown. Choose one of ipa"):
        open_learner(directory, "grpp", optax.sgd(0.1))
