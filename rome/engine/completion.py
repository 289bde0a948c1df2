"""What an engine is asked for and what it gives: sampling parameters in SGLang's form, and a
completion with the versions that made it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How to sample.

    The defaults are what RL needs: the plain distribution at temperature 1, every token of which
    has a logprob.

    Args:
      temperature: 0 is greedy.
      top_k: -1 keeps all tokens.
      seed: same seed and same prompt, same tokens; None samples anew each time.
      routes_from: the routes of the tokens from this position on are wanted too; None: no routes.
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
        """SGLang's sampling_params, all of them: a server's own defaults would slip into every
        field that is left out.
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
        return fields if self.seed is None else fields | {"sampling_seed": self.seed}


@dataclasses.dataclass
class Completion:
    """What was sampled, stop token included.

    Args:
      logprobs: of each output id under softmax(logits / temperature).
      finish_reason: "stop" or "length".
      versions: (weight version, start, end) over output_ids, in order and without gaps.
      cached_tokens: prompt tokens whose keys and values were in the engine's cache.
      routes: [prompt + output - 1 - routes_from, layers, k] as in `rome.data.routes`, where they
        were asked for. The last token has none: it was drawn, but not run.
    """

    output_ids: list[int]
    logprobs: list[float]
    finish_reason: str
    versions: list[tuple[int, int, int]]
    cached_tokens: int = 0
    routes: np.ndarray | None = None
