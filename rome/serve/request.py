"""A request's way through the engine: what was asked for, and what was sampled so far."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from rome.serve.adapters import Adapter
from rome.serve.pages import Node


class Grammar(Protocol):
    """What an answer must be, as `rome.serve.grammar.Grammar`."""

    def allowed(self) -> np.ndarray: ...
    def take(self, tokens: Sequence[int]) -> str: ...
    @property
    def is_complete(self) -> bool: ...


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
      frequency_penalty: subtracted from a token's logit for each time that the answer has it.
      presence_penalty: subtracted from a token's logit if the answer has it.
      repetition_penalty: divides the logit of a token that the answer has, or multiplies it where
        it is negative; 1 changes nothing.
      min_new_tokens: stop tokens are not drawn before so many others.
      logit_bias: tokens and what is added to their logits.
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
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    min_new_tokens: int = 0
    logit_bias: tuple[tuple[int, float], ...] = ()

    @property
    def has_penalties(self) -> bool:
        """Whether logits depend on what was drawn before."""
        return bool(
            self.frequency_penalty or self.presence_penalty or self.repetition_penalty != 1.0
        )


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
      text_in_logprobs: whether the entries of logprobs have the texts of their tokens.
      stream: whether the client gets each step's tokens at once.
      priority: requests with a higher one run before others that wait.
      salt: requests share cached prefixes only with requests of the same salt.
      adapter_name: of the adapter that samples; "": none.
      grammar: that the answer follows; None: any answer will do.
      notify: called from the scheduler's thread with the request, at its end and, for `stream`,
        after each step that brought tokens.

      output_ids: sampled tokens.
      logprobs: of output_ids.
      prompt_logprobs: of prompt_ids[1:].
      versions: [weight version, start, end] over output_ids.
      routes: experts [tokens, layers, k] of the tokens computed so far, if return_routes; as long
        as the request may become, so what lies beyond them means nothing.
      cached_tokens: prompt tokens that were taken from the cache.
      finish: SGLang's finish_reason; None while the request runs.
      created: time.monotonic() of its arrival.
      first_token: time.monotonic() of the first sampled token; None before it.
      text_end: where a matched stop string begins in the text.
      tail_ids: the last tokens, in which a stop string may have begun.
      adapter: that samples, from its arrival to its end.

      ids: prompt and output; those before `computed` are in the cache. The fields below have a
        meaning while it runs.
      computed: number of tokens that are in the cache.
      root: of the tree that it shares prefixes in; None if it shares none.
      path: the pages of the tree that it holds, in order.
      pages: numbers of all its pages, in order: those of the path, then its own.
    """

    rid: str
    prompt_ids: list[int]
    sampling: SamplingParams
    return_logprob: bool = False
    score_from: int | None = None
    return_routes: bool = False
    routes_from: int = 0
    text_in_logprobs: bool = False
    stream: bool = False
    priority: int = 0
    salt: str = ""
    adapter_name: str = ""
    grammar: Grammar | None = None
    notify: Callable[[Request], object] = lambda request: None

    output_ids: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    prompt_logprobs: list[float] = dataclasses.field(default_factory=list)
    versions: list[list[Any]] = dataclasses.field(default_factory=list)
    routes: np.ndarray | None = None
    cached_tokens: int = 0
    finish: dict[str, Any] | None = None
    created: float = dataclasses.field(default_factory=time.monotonic)
    first_token: float | None = None
    text_end: int | None = None
    tail_ids: list[int] = dataclasses.field(default_factory=list)
    adapter: Adapter | None = None

    ids: list[int] = dataclasses.field(default_factory=list)
    computed: int = 0
    root: Node | None = None
    path: list[Node] = dataclasses.field(default_factory=list)
    pages: list[int] = dataclasses.field(default_factory=list)

    @property
    def is_decoding(self) -> bool:
        """Whether all but the token that was drawn last are computed."""
        return bool(self.output_ids) and self.computed == len(self.ids) - 1

    @property
    def adjusts_logits(self) -> bool:
        """Whether tokens are drawn from other logits than the model's."""
        params = self.sampling
        biased = params.min_new_tokens or params.logit_bias
        return bool(params.has_penalties or biased or self.grammar is not None)

    @property
    def last_position(self) -> int:
        """The place of the last token of the longest answer: it is drawn, and never computed."""
        return len(self.prompt_ids) + self.sampling.max_new_tokens - 1

    @property
    def wants_scores(self) -> bool:
        """Whether logprobs of the prompt are still to be computed."""
        return self.score_from is not None and self.computed < len(self.prompt_ids)

    def note_routes(self, routes_NLk: np.ndarray) -> None:
        """Record the experts of the tokens from `computed` on."""
        count, *rest = routes_NLk.shape
        if self.routes is None:
            length = len(self.prompt_ids) + self.sampling.max_new_tokens
            self.routes = np.zeros((length, *rest), np.int32)
        self.routes[self.computed : self.computed + count] = routes_NLk
