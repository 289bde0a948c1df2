"""Reads the answers of /generate and joins them into one completion.

A request that a pause aborted is continued by further requests, perhaps on another engine and with
other weights. Each answer adds its tokens, their logprobs, the weight version of each token and,
where they were asked for, the experts that each token was routed to. An answer is checked whole
before anything of it is appended, so another engine can continue what a bad answer interrupted.
"""

from __future__ import annotations

import base64
import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from rome.data.routes import encode_routes
from rome.engine.completion import Completion
from rome.engine.errors import EngineFailed, RequestRejected
from rome.model.config import ModelConfig

FINISH_REASONS = ("stop", "length", "abort")


class Span(NamedTuple):
    """Tokens of an answer that one weight version sampled; `name` is the version as it was sent."""

    version: int
    name: str
    start: int
    end: int


class Answer(NamedTuple):
    """The checked content of one answer.

    Attributes:
      ids: the sampled tokens.
      logprobs: one for each of them, finite.
      finish_reason: "stop", "length" or "abort".
      spans: over `ids`, in order and without gaps.
      cached_tokens: prompt tokens whose keys and values were in the engine's cache.
      meta: `meta_info` of the answer.
    """

    ids: list[int]
    logprobs: list[float]
    finish_reason: str
    spans: list[Span]
    cached_tokens: int
    meta: dict[str, Any]


def parse_answer(
    url: str, answer: dict[str, Any], config: ModelConfig | None, *, max_tokens: int
) -> Answer:
    """Check one answer of /generate and return its content.

    Args:
      url: named in errors.
      answer: as the server sent it, of any shape.
      config: the model that the server runs, where it is known.
      max_tokens: number of tokens that were asked for.

    Raises:
      EngineFailed: the answer is not one that an engine of this protocol gives.
    """
    with blame_engine(url, "/generate"):
        meta = answer["meta_info"]
        ids = _parse_ids(answer["output_ids"], config)
        if len(ids) > max_tokens:
            raise ValueError(f"{len(ids)} tokens, where {max_tokens} were asked for")
        logprobs = parse_logprobs(meta["output_token_logprobs"], ids) if ids else []
        finish = meta["finish_reason"] or {"type": "abort"}
        finish_reason = finish["type"]
        if finish_reason not in FINISH_REASONS:
            raise ValueError(f"finish reason {finish_reason!r}")
        if not ids and finish_reason != "abort":
            raise ValueError(f"finish reason {finish_reason!r} without a token")
        spans = _parse_spans(url, meta, len(ids))
        cached_tokens = int(meta.get("cached_tokens") or 0)
        return Answer(ids, logprobs, finish_reason, spans, cached_tokens, meta)


@contextlib.contextmanager
def blame_engine(url: str, route: str) -> Iterator[None]:
    """Raise EngineFailed where reading an answer of `url` meets an unexpected shape or value."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise EngineFailed(
            f"{url}{route} answered unlike an SGLang server ({type(error).__name__}: {error});"
            " see its log, and whether a proxy or gateway stands before it"
        ) from error


def parse_logprobs(entries: Any, ids: Sequence[int]) -> list[float]:
    """Return the logprobs of SGLang's (logprob, token id, text) entries.

    Raises:
      LookupError, TypeError or ValueError: they are not finite numbers, one for each of `ids`.
    """
    if [entry[1] for entry in entries] != list(ids):
        raise ValueError(
            f"{len(entries)} logprobs for {len(ids)} tokens, or of other tokens; this engine"
            " cannot be trained on"
        )
    logprobs = [entry[0] for entry in entries]
    for place, logprob in enumerate(logprobs):
        if type(logprob) not in (int, float) or not math.isfinite(logprob):
            raise ValueError(f"logprob {logprob!r} of token {place}")
    return [float(logprob) for logprob in logprobs]


def _parse_ids(ids: Any, config: ModelConfig | None) -> list[int]:
    if not isinstance(ids, list):
        raise TypeError(f"output_ids is a {type(ids).__name__}, not a list")
    vocab_size = math.inf if config is None else config.vocab_size
    for token in ids:
        if type(token) is not int or not 0 <= token < vocab_size:
            raise ValueError(f"{token!r} is not a token id of the model")
    return ids


def _parse_spans(url: str, meta: dict[str, Any], length: int) -> list[Span]:
    """Return which weight version sampled which tokens of an answer.

    Servers that do not report spans have one version for the whole answer.
    """
    entries = meta.get("weight_versions")
    if not entries:
        entries = [{"version": meta["weight_version"], "start": 0, "end": length}]
    spans = []
    covered = 0
    for span in entries:
        start = span["start"]
        end = span["end"]
        if type(start) is not int or type(end) is not int or start != covered or end < start:
            raise ValueError(f"the span {span} of a weight version does not follow token {covered}")
        covered = end
        name = span["version"]
        spans.append(Span(parse_version(url, name), name, start, end))
    if covered != length:
        raise ValueError(f"the weight versions of {covered} of {length} tokens")
    return spans


def parse_version(url: str, text: str) -> int:
    """Return a server's weight version as a number; "default", of a server never updated, is 0.

    Raises:
      EngineFailed: the version is another word.
    """
    if text == "default":
        return 0
    try:
        return int(text)
    except (TypeError, ValueError):
        raise EngineFailed(
            f"{url} has weight_version {text!r}, not a number; start it with --weight-version 0"
        ) from None


def append_answer(completion: Completion, answer: Answer) -> None:
    """Append the tokens of one answer, with logprobs and versions, to `completion`."""
    start = len(completion.output_ids)
    if start == 0:
        completion.cached_tokens = answer.cached_tokens
    completion.output_ids += answer.ids
    completion.logprobs += answer.logprobs
    completion.finish_reason = answer.finish_reason
    for span in answer.spans:
        _append_span(completion.versions, span.version, start + span.start, start + span.end)


def _append_span(spans: list[tuple[int, int, int]], version: int, start: int, end: int) -> None:
    """Append a span, joined to the last one if the version is the same; drop an empty span."""
    if end <= start:
        return
    if spans:
        last_version, last_start, last_end = spans[-1]
        if last_version == version and last_end == start:
            spans[-1] = (version, last_start, end)
            return
    spans.append((version, start, end))


def parse_routes(
    url: str,
    config: ModelConfig | None,
    completion: Completion,
    answer: Answer,
    *,
    start: int,
    prompt_length: int,
) -> np.ndarray:
    """Return the routes of the tokens that have none yet, once `answer` is appended.

    A token keeps the routes of the forward pass that its successor was sampled from, even if an
    abort made the server compute that token again.

    Args:
      url: named in errors.
      config: the model that the server runs.
      completion: what was sampled before this answer.
      answer: has at least one token.
      start: position of the first token whose routes were asked for.
      prompt_length: tokens of the prompt.

    Returns:
      [tokens, layers, k] as in `rome.data.routes`.

    Raises:
      ValueError: the model is unknown.
      RequestRejected: the server does not return routes.
      EngineFailed: the routes are not of this model.
    """
    if config is None:
        raise ValueError(
            "routes were asked for, but the model is unknown; make Engine(url, model=config)"
        )
    if not answer.meta.get("routed_experts"):
        raise RequestRejected(
            f"{url} returned no routes; start the SGLang server with"
            " --enable-return-routed-experts (and no gateway before it that drops the field),"
            " or set routing_replay to off or recompute"
        )
    with blame_engine(url, "/generate"):
        data = base64.b64decode(answer.meta["routed_experts"])
        ids = np.frombuffer(data, np.dtype(answer.meta.get("routed_experts_dtype") or "int32"))
        ids_per_token = config.num_layers * config.experts_per_token
        computed_tokens = prompt_length + len(completion.output_ids) + len(answer.ids) - 1
        wanted_tokens = computed_tokens - start - num_routes(completion)
        # Servers that do not know `routed_experts_start_len` send those of the whole sequence.
        if ids.size not in (wanted_tokens * ids_per_token, computed_tokens * ids_per_token):
            raise ValueError(
                f"{ids.size} expert ids; {wanted_tokens} tokens in {config.num_layers} layers"
                f" with {config.experts_per_token} experts each have another number. Does it"
                " serve another model?"
            )
        ids_TLk = ids.reshape(-1, config.num_layers, config.experts_per_token)
        try:
            return encode_routes(ids_TLk[-wanted_tokens:], config)
        except ValueError as error:
            raise ValueError(f"{error}. Does it serve another model?") from error


def append_routes(completion: Completion, routes: np.ndarray) -> None:
    """Append what `parse_routes` returned."""
    if completion.routes is not None:
        routes = np.concatenate([completion.routes, routes])
    completion.routes = routes


def num_routes(completion: Completion) -> int:
    """Return the number of tokens whose routes are known."""
    return 0 if completion.routes is None else len(completion.routes)
