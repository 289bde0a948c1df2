"""A request's way through the engine: what was asked for, and what was sampled so far."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

NO_SLOT = -1


class TextCodec(Protocol):
    """The methods of a tokenizer that the engine uses."""

    vocab_size: int

    def encode(self, text: str, allow_special: bool = False) -> list[int]: ...
    def decode(self, ids: list[int], skip_special: bool = False) -> str: ...


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """SGLang's sampling_params.

    Attributes:
      max_new_tokens: 0 scores the prompt only.
      temperature: 0 is greedy.
      top_p: 1 keeps all tokens.
      top_k: -1 keeps all tokens.
      min_p: 0 keeps all tokens.
      stop: strings that end the answer.
      stop_ids: tokens that end the answer.
      seed: 64 bits.
      skip_special_tokens: whether the answer's text leaves out special tokens.
      no_stop_trim: whether the answer's text keeps the stop token or string that ended it.
    """

    max_new_tokens: int = 128
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    stop: tuple[str, ...] = ()
    stop_ids: frozenset[int] = frozenset()
    seed: int = 0
    skip_special_tokens: bool = True
    no_stop_trim: bool = False


@dataclasses.dataclass(eq=False)
class Request:
    """One sequence. Only the scheduler changes it after it was submitted.

    Attributes:
      rid: its id, by which it can be aborted.
      prompt_ids: tokens of the prompt.
      sampling: how to continue it.
      return_logprob: whether the answer has the logprobs of the output.
      score_from: the logprobs of prompt_ids[score_from:] are wanted too (the prompt is then never
        taken from the cache); None if not.
      return_routes: whether the answer has the experts that each token was routed to.
      routes_from: the routes of earlier positions are not sent.
      stream: whether the client gets each step's tokens at once.
      salt: requests share cached prefixes only with requests of the same salt.
      notify: called from the scheduler's thread with the request, at its end and, for `stream`,
        after each step that brought tokens.

      output_ids: sampled tokens.
      logprobs: of output_ids.
      prompt_logprobs: of prompt_ids[1:].
      versions: [weight version, start, end] over output_ids.
      routes: arrays [tokens, layers, k] of the tokens computed so far, if return_routes.
      cached_tokens: prompt tokens that were taken from the cache.
      finish: SGLang's finish_reason; None while the request runs.
      created: time.monotonic() of its arrival.
      text_end: where a matched stop string begins in the text.
      tail_ids: the last tokens, in which a stop string may have begun.

      slot: its place in the cache, or NO_SLOT. The fields below have a meaning while it has one.
      ids: tokens to prefill: the prompt, and the output so far if it starts over.
      keys: prefix keys of the complete chunks of ids.
      prefilled: how many of ids are in the cache.
      owns_prefix: whether its slot is known to hold this request's prefix, and nothing else.
    """

    rid: str
    prompt_ids: list[int]
    sampling: SamplingParams
    return_logprob: bool = False
    score_from: int | None = None
    return_routes: bool = False
    routes_from: int = 0
    stream: bool = False
    salt: str = ""
    notify: Callable[[Request], object] = lambda request: None

    output_ids: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    prompt_logprobs: list[float] = dataclasses.field(default_factory=list)
    versions: list[list[Any]] = dataclasses.field(default_factory=list)
    routes: list[np.ndarray] = dataclasses.field(default_factory=list)
    cached_tokens: int = 0
    finish: dict[str, Any] | None = None
    created: float = dataclasses.field(default_factory=time.monotonic)
    text_end: int | None = None
    tail_ids: list[int] = dataclasses.field(default_factory=list)

    slot: int = NO_SLOT
    ids: list[int] = dataclasses.field(default_factory=list)
    keys: list[bytes] = dataclasses.field(default_factory=list)
    prefilled: int = 0
    owns_prefix: bool = False
