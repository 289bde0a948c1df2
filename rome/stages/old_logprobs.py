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
      expert_counts_LE: float32; how often the pass chose each expert; None without a pass.
      routes_BTLk: the experts that the pass chose or replayed; None without routing replay.
    """

    logp_BT: np.ndarray
    expert_counts_LE: np.ndarray | None
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
        is_needed = self._async_ratio > 0 and self._from_trainer
        if not is_needed or version in self.past:
            return
        self.past[version] = self._learner.keep(state.params)
        oldest = version - self._async_ratio
        for kept in list(self.past):
            if kept < oldest:
                del self.past[kept]

    def fill(self, batches: list[Batch], state: TrainState) -> tuple[list[Batch], set[int]]:
        """Fill in logp_old of every micro-batch, and the routes where they are recorded.

        Each sampled token is scored once, at the weights that sampled it: a micro-batch takes one
        pass for each version in it, and none for any other. Tokens without a version (prompts,
        demonstrations) take what the newest of these says, or the weights of `state` where the
        micro-batch has no sampled token.

        Returns:
          The filled micro-batches, and the versions whose weights are lost: their tokens have the
          engine's own logprobs.
        """
        if not self._from_trainer:
            return [batch._replace(logp_old_BT=batch.logp_rollout_BT) for batch in batches], set()
        current = int(state.step)
        sampled = [sampled_versions(batch) for batch in batches]
        lost = {version for version in set().union(*sampled) if not self._has(version, current)}
        passes = [(versions - lost) or {current} for versions in sampled]
        filled = list(batches)
        for version in sorted(set().union(*passes), reverse=True):
            params = state.params if version == current else self._params_of(version)
            places = [place for place, versions in enumerate(passes) if version in versions]
            scores = self._score(params, [batches[place] for place in places])
            for place, score in zip(places, scores, strict=True):
                if version == max(passes[place]):
                    filled[place] = fill_all(batches[place], score)
                else:
                    filled[place] = fill_where(
                        filled[place], score, sampled_by(filled[place], {version})
                    )
        for place, batch in enumerate(filled):
            engines_own = Score(batch.logp_rollout_BT, None, batch.routes_BTLk)
            filled[place] = fill_where(batch, engines_own, sampled_by(batch, lost))
        return filled, lost

    def _score(self, params: dict, batches: list[Batch]) -> list[Score]:
        if self._records_routes:
            return [Score(*found) for found in self._learner.score_and_record(params, batches)]
        scored = self._learner.score_and_count(params, batches)
        return [
            Score(*found, batch.routes_BTLk) for batch, found in zip(batches, scored, strict=True)
        ]

    def _has(self, version: int, current: int) -> bool:
        """Return whether the weights of a version are there, in memory or as published files.

        They may be lost to samples beyond the staleness bound, with stale_samples=keep.
        """
        in_memory = version == current or version in self.past
        return in_memory or self._directory(version).is_dir()

    def _params_of(self, version: int) -> dict:
        """Return the parameters of an earlier version, from memory or from the published files."""
        if version in self.past:
            return self._learner.recall(self.past[version])
        learner = self._learner
        directory = self._directory(version)
        return load_published(directory, self._model_config, learner.mesh, learner.lora)

    def _directory(self, version: int) -> pathlib.Path:
        return self._weights / f"step_{version:06d}"


def fill_all(batch: Batch, score: Score) -> Batch:
    """Return the batch with the logprobs of its action tokens, the counts and routes of a score."""
    logp_old_BT = np.where(batch.action_mask_BT, score.logp_BT, 0.0)
    return batch._replace(
        logp_old_BT=logp_old_BT,
        routes_BTLk=score.routes_BTLk,
        expert_counts_LE=score.expert_counts_LE,
    )


def fill_where(batch: Batch, score: Score, where_BT: np.ndarray) -> Batch:
    """Return the batch with a score's logprobs and routes at `where_BT`; elsewhere as it was."""
    logp_old_BT = np.where(where_BT, score.logp_BT, batch.logp_old_BT)
    routes_BTLk = batch.routes_BTLk
    if routes_BTLk is not None and score.routes_BTLk is not None:
        is_of_score_BT = _tokens_learned_at(where_BT, batch)
        routes_BTLk = np.where(is_of_score_BT[..., None, None], score.routes_BTLk, routes_BTLk)
    return batch._replace(logp_old_BT=logp_old_BT, routes_BTLk=routes_BTLk)


def _tokens_learned_at(where_BT: np.ndarray, batch: Batch) -> np.ndarray:
    """Return [B, T] bool: the tokens that the learned fields at `where_BT` are about."""
    if batch.about_BT is None:
        return where_BT
    rows_N, places_N = np.nonzero(where_BT)
    tokens_BT = np.zeros_like(where_BT)
    tokens_BT[rows_N, batch.about_BT[rows_N, places_N]] = True
    return tokens_BT


def sampled_tokens(batch: Batch) -> np.ndarray:
    """Return [B, T] bool: action tokens of RL chunks, the only ones with a weight version."""
    return batch.kind_BT() == RL


def sampled_by(batch: Batch, versions: set[int]) -> np.ndarray:
    """Return [B, T] bool: action tokens of RL chunks that one of these versions sampled."""
    return sampled_tokens(batch) & np.isin(batch.version_BT, list(versions))


def sampled_versions(batch: Batch) -> set[int]:
    """Return the weight versions that sampled a token of a micro-batch."""
    return {int(version) for version in np.unique(batch.version_BT[sampled_tokens(batch)])}
