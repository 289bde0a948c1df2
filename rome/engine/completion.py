"""Sampling parameters, and completions with the weight versions that sampled them."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Parameters of sampling.

    The defaults are what RL needs: the unmodified distribution at temperature 1, so that the
    logprob of each token is the one that it was sampled with.

    Args:
      max_new_tokens: number of tokens after which the answer is cut.
      temperature: divisor of the logits; 0 is greedy.
      top_p: nucleus of the distribution that is kept; 1 keeps all tokens.
      top_k: number of most likely tokens that are kept; -1 keeps all.
      min_p: least probability of a kept token, as a share of the most likely one's.
      stop: strings that end the answer.
      stop_token_ids: tokens that end the answer. They are part of it.
      seed: the same seed and prompt give the same tokens; None samples anew each time.
      routes_from: position of the first token whose routes are wanted too; None for no routes.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    seed: int | None = None
    routes_from: int | None = None

    def to_json(self, already: int = 0) -> dict[str, Any]:
        """Return SGLang's `sampling_params`.

        Every field is sent: a field that is left out would take the server's own default.

        Args:
          already: tokens that earlier, aborted answers brought.
        """
        fields = {
            "max_new_tokens": self.max_new_tokens - already,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "min_p": self.min_p,
            "stop": list(self.stop),
            "stop_token_ids": list(self.stop_token_ids),
            "ignore_eos": False,
            "skip_special_tokens": False,
            "no_stop_trim": True,
            "min_new_tokens": 0,
            "n": 1,
            "frequency_penalty": 0.0,
            "presence_penalty": 0.0,
            "repetition_penalty": 1.0,
        }
        if self.seed is not None:
            fields["sampling_seed"] = self.seed
        return fields


@dataclasses.dataclass
class Completion:
    """A sampled continuation of a prompt, its stop token included.

    Attributes:
      output_ids: the sampled tokens.
      logprobs: log-probability of each of them under softmax(logits / temperature).
      finish_reason: "stop" or "length"; "abort" while it is unfinished.
      versions: (weight version, start, end) over output_ids, in order and without gaps.
      cached_tokens: prompt tokens whose keys and values were in the engine's cache.
      routes: [prompt + output - 1 - routes_from, layers, k] as in `rome.data.routes`, or None where
        they were not asked for. The last token has no routes: it was sampled, but not computed.
      seconds_held: for which it waited while engines took new weights.
    """

    output_ids: list[int]
    logprobs: list[float]
    finish_reason: str
    versions: list[tuple[int, int, int]]
    cached_tokens: int = 0
    routes: np.ndarray | None = None
    seconds_held: float = dataclasses.field(default=0.0, compare=False)

    @classmethod
    def unfinished(cls) -> Completion:
        """Return a completion without tokens, to which answers are appended."""
        return cls([], [], "abort", [])
