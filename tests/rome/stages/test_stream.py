"""A run goes on at the batch that was interrupted, wherever in an epoch that was."""

import hashlib
import itertools
import json

import jax.numpy as jnp
import numpy as np
import pytest

from rome.data import sources, text
from rome.data.sources import endless_order, sft_batches
from rome.data.text import read_corpus, text_batches
from rome.data.trajectory import Chunk, Trajectory
from rome.model.tokenizer import TINY, Tokenizer
from rome.stages import cpt
from rome.stages.config import load_config
from rome.stages.experiment import run_stages
from rome.stages.stream import BatchStream
from rome.train.step import Learner
from rome.train.team import Team

SHAPE = {"rows": 2, "row_length": 24, "chunks_per_row": 4}
BATCHES = 13  # several epochs


@pytest.fixture(autouse=True, scope="module")
def few_open_rows():
    """Fill two rows at a time, so that a few batches end some of them and begin others."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "ROWS_OPEN", 2)
        patch.setattr(text, "ROWS_OPEN", 2)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Documents whose held-out share is not empty."""
    folder = tmp_path_factory.mktemp("text")
    for number in range(30):
        text = f"document {number} says " + " ".join(str(number + word) for word in range(number))
        (folder / f"{number}.txt").write_text(text)
    return folder


def open_text(folder):
    corpus = read_corpus(str(folder), 0.2)
    return text_batches(corpus.training, Tokenizer.load(TINY), seed=0, **SHAPE)


def open_demonstrations(folder):
    chunks = [Chunk([n, 500], [501] * (n % 7 + 1), [0.0] * (n % 7 + 1)) for n in range(1, 14)]
    trajectories = [Trajectory(f"t{n}", "f", [one], 1.0, "success") for n, one in enumerate(chunks)]
    return sft_batches(endless_order([(trajectories, 1.0)], seed=0), **SHAPE)


@pytest.fixture(scope="module", params=[open_text, open_demonstrations])
def opened(request, folder):
    """How a stream is opened, and its first batches."""
    batches = list(itertools.islice(request.param(folder), BATCHES))
    return lambda: request.param(folder), batches


def same(left, right):
    return all(np.array_equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.long
@pytest.mark.parametrize("steps", [0, 1, 5, 10])
@pytest.mark.parametrize("is_trained", [True, False])
def test_a_checkpoint_has_the_position_of_what_was_trained(opened, steps, is_trained):
    open_batches, batches = opened
    stream = BatchStream(open_batches)
    for step in range(steps + 1):
        assert same(stream.draw(step), batches[step])
    reached = steps + 1 if is_trained else steps
    for _ in range(2):  # interrupted, resumed and interrupted again
        position = json.loads(json.dumps(stream.position(reached)))
        stream = BatchStream(open_batches)
        stream.go_to(position)
        assert same(stream.draw(reached), batches[reached])
    assert same(stream.draw(reached + 1), batches[reached + 1])


def digest(tokens_BT):
    return hashlib.sha256(tokens_BT.tobytes()).hexdigest()


class Interrupted(Exception):
    pass


class Updates:
    """Takes the place of the learner's update; it notes what it is given.

    fails_at: number of the update at which it is interrupted; -1: none.
    """

    def __init__(self, monkeypatch):
        self.trained = []
        self.fails_at = -1
        monkeypatch.setattr(Learner, "update", self.update)
        monkeypatch.setattr(cpt.CPTStage, "write_evaluation", self.write_evaluation)

    def update(self, state, microbatches, denominators, work):
        if len(self.trained) == self.fails_at:
            raise Interrupted
        rows = np.concatenate([batch.tokens_BT for batch in microbatches])
        self.trained.append(digest(rows))
        return state, {"loss": jnp.float32(len(self.trained))}

    @staticmethod
    def write_evaluation(stage, step, state):
        stage.write_outcomes(step, {"bits_per_byte": 8.0, "bytes": 100})


@pytest.mark.slow
def test_a_run_whose_updates_are_interrupted_trains_on_each_batch_once(
    folder, tmp_path, monkeypatch
):
    config = load_config("experiments/cpt.py", "smoke")
    config.text = str(folder)
    config.held_out_share = 0.2
    config.steps = 4
    updates = Updates(monkeypatch)
    for updates.fails_at in (1, 3):
        with pytest.raises(Interrupted):
            run_stages(config, tmp_path / "run", "none", Team())
    updates.fails_at = -1
    assert run_stages(config, tmp_path / "run", "none", Team())
    batches = text_batches(
        read_corpus(config.text, config.held_out_share).training,
        Tokenizer.load(TINY),
        rows=config.rows,
        row_length=config.row_length,
        chunks_per_row=config.chunks_per_row,
        seed=config.seed,
    )
    expected = [digest(batch.tokens_BT) for batch in itertools.islice(iter(batches), config.steps)]
    assert updates.trained == expected and len(set(expected)) == 4
