"""The logprobs of pi_old: every sampled token is scored at the weights that sampled it.

B rows, T tokens, L layers, k experts a token.
"""

from __future__ import annotations

import pathlib
from typing import Any, NamedTuple

import numpy as np

from rome.data.batch import RL, Batch
from rome.model.config import ModelConfig
from rome.stages.weights import load_published
from rome.train.state import TrainState
from rome.train.step import Learner


class Score(NamedTuple):
    """One pass over a micro-batch.

    Attributes:
      logp_BT: float32.
      routes_BTLk: the experts that the pass chose or replayed; None without routing replay.
    """

    logp_BT: np.ndarray
    routes_BTLk: np.ndarray | None


class OldLogprobs:
    """Scores micro-batches at the weights that sampled them, and keeps these weights.

    Args:
      learner: scores.
      model_config: of the model.
      weights: directory of the published versions, which a resumed run reads.
      async_ratio: versions before the current one that are kept.
      from_trainer: False takes the engine's own logprobs and scores nothing.
      records_routes: the pass that scores a token also records its experts.
    """

    def __init__(
        self,
        learner: Learner,
        model_config: ModelConfig,
        weights: pathlib.Path,
        *,
        async_ratio: int,
        from_trainer: bool,
        records_routes: bool,
    ) -> None:
        self.past: dict[int, Any] = {}  # version -> parameters as kept by the learner
        self._learner = learner
        self._model_config = model_config
        self._weights = weights
        self._async_ratio = async_ratio
        self._from_trainer = from_trainer
        self._records_routes = records_routes

    def remember(self, state: TrainState) -> None:
        """Keep the weights of `state` for samples that are trained on at a later version."""
        version = int(state.step)
        if not self._async_ratio or not self._from_trainer or version in self.past:
            return
        self.past[version] = self._learner.keep(state.params)
        oldest = version - self._async_ratio
        self.past = {kept: params for kept, params in self.past.items() if kept >= oldest}

    def fill(self, batches: list[Batch], state: TrainState) -> tuple[list[Batch], set[int]]:
        """Fill in logp_old of every micro-batch, and the routes where they are recorded.

        Each sampled token is scored at the weights that sampled it, every other token at the
        weights of `state`.

        Returns:
          The filled micro-batches, and the versions whose weights are lost: their tokens have the
          engine's own logprobs.
        """
        if not self._from_trainer:
            return [batch._replace(logp_old_BT=batch.logp_rollout_BT) for batch in batches], set()
        scores = self._score(state.params, batches)
        filled = [fill_all(batch, score) for batch, score in zip(batches, scores, strict=True)]
        lost: set[int] = set()
        for version in sorted(sampled_versions(batches) - {int(state.step)}):
            params = self._params_of(version)
            if params is None:
                lost.add(version)
            self._fill_version(version, params, batches, filled)
        return filled, lost

    def _fill_version(
        self, version: int, params: dict | None, batches: list[Batch], filled: list[Batch]
    ) -> None:
        """Replace in `filled` what was sampled by `version`, scored at its parameters."""
        masks = [sampled_tokens(batch) & (batch.version_BT == version) for batch in batches]
        places = [place for place, mask_BT in enumerate(masks) if mask_BT.any()]
        chosen = [batches[place] for place in places]
        if params is None:
            scores = [Score(batch.logp_rollout_BT, batch.routes_BTLk) for batch in chosen]
        else:
            scores = self._score(params, chosen)
        for place, score in zip(places, scores, strict=True):
            filled[place] = fill_where(filled[place], score, masks[place])

    def _score(self, params: dict, batches: list[Batch]) -> list[Score]:
        if self._records_routes:
            return [Score(*found) for found in self._learner.score_and_record(params, batches)]
        logprobs = self._learner.score(params, batches)
        return [
            Score(logp_BT, batch.routes_BTLk)
            for batch, logp_BT in zip(batches, logprobs, strict=True)
        ]

    def _params_of(self, version: int) -> dict | None:
        """Return the parameters of an earlier version, from memory or from the published files.

        None where they are lost. That happens to samples beyond the staleness bound, with
        stale_samples=keep.
        """
        if version in self.past:
            return self._learner.recall(self.past[version])
        directory = self._weights / f"step_{version:06d}"
        if not directory.is_dir():
            return None
        return load_published(directory, self._model_config, self._learner.mesh)


def fill_all(batch: Batch, score: Score) -> Batch:
    """Return the batch with the logprobs of its action tokens and the routes of a score."""
    logp_old_BT = np.where(batch.action_mask_BT, score.logp_BT, 0.0)
    return batch._replace(logp_old_BT=logp_old_BT, routes_BTLk=score.routes_BTLk)


def fill_where(batch: Batch, score: Score, where_BT: np.ndarray) -> Batch:
    """Return the batch with a score's logprobs and routes at `where_BT`; elsewhere as it was."""
    logp_old_BT = np.where(where_BT, score.logp_BT, batch.logp_old_BT)
    routes_BTLk = batch.routes_BTLk
    if routes_BTLk is not None and score.routes_BTLk is not None:
        routes_BTLk = np.where(where_BT[..., None, None], score.routes_BTLk, routes_BTLk)
    return batch._replace(logp_old_BT=logp_old_BT, routes_BTLk=routes_BTLk)


def sampled_tokens(batch: Batch) -> np.ndarray:
    """Return [B, T] bool: action tokens of RL chunks, the only ones with a weight version."""
    return batch.kind_BT() == RL


def sampled_versions(batches: list[Batch]) -> set[int]:
    """Return the weight versions that sampled a token of these micro-batches."""
    versions: set[int] = set()
    for batch in batches:
        found = np.unique(batch.version_BT[sampled_tokens(batch)])
        versions.update(int(version) for version in found)
    return versions
