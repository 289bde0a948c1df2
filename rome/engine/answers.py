"""Reads the answers of /generate and joins them into one completion.

A request that a pause aborted is continued by further requests, perhaps on another engine and with
other weights. Each answer adds its tokens, their logprobs, the weight version of each token and,
where they were asked for, the experts that each token was routed to.
"""

from __future__ import annotations

import base64
from typing import Any

import numpy as np

from rome.data.routes import encode_routes
from rome.engine.completion import Completion
from rome.engine.errors import EngineError
from rome.model.config import ModelConfig


def version_spans(meta: dict[str, Any], length: int) -> list[dict[str, Any]]:
    """Return which weight version sampled which tokens of an answer.

    Args:
      meta: `meta_info` of the answer.
      length: number of tokens in the answer.

    Returns:
      [{"version": text, "start": first token, "end": token after the last}]. Servers that do not
      report spans have one version for the whole answer.
    """
    spans = meta.get("weight_versions")
    if spans:
        return spans
    return [{"version": meta["weight_version"], "start": 0, "end": length}]


def parse_version(url: str, text: str) -> int:
    """Return a server's weight version as a number; "default", of a server never updated, is 0.

    Raises:
      EngineError: the version is another word.
    """
    if text == "default":
        return 0
    try:
        return int(text)
    except ValueError:
        raise EngineError(
            f"{url} has weight_version {text!r}, not a number; start it with --weight-version 0"
        ) from None


def append_answer(url: str, completion: Completion, answer: dict[str, Any]) -> None:
    """Append the tokens of one answer, with logprobs and versions, to `completion`.

    Raises:
      EngineError: the logprobs are not those of the tokens.
    """
    meta = answer["meta_info"]
    start = len(completion.output_ids)
    ids = list(answer["output_ids"])
    entries = meta["output_token_logprobs"] if ids else []  # (logprob, token id, text)
    if [entry[1] for entry in entries] != ids:
        raise EngineError(
            f"{url} returned {len(entries)} logprobs for {len(ids)} tokens, or of other tokens;"
            " this engine cannot be trained on"
        )
    if start == 0:
        completion.cached_tokens = int(meta.get("cached_tokens", 0))
    completion.output_ids += ids
    completion.logprobs += [float(entry[0]) for entry in entries]
    finish = meta["finish_reason"] or {}
    completion.finish_reason = finish.get("type", "abort")
    for span in version_spans(meta, len(ids)):
        version = parse_version(url, span["version"])
        _append_span(completion.versions, version, start + span["start"], start + span["end"])


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


def append_routes(
    url: str,
    config: ModelConfig | None,
    completion: Completion,
    meta: dict[str, Any],
    *,
    start: int,
    prompt_length: int,
) -> None:
    """Append the routes of the tokens that have none yet.

    A token keeps the routes of the forward pass that its successor was sampled from, even if an
    abort made the server compute that token again.

    Args:
      url: named in errors.
      config: the model that the server runs.
      completion: tokens of this answer are already appended.
      meta: `meta_info` of the answer.
      start: position of the first token whose routes were asked for.
      prompt_length: tokens of the prompt.

    Raises:
      ValueError: the model is unknown.
      EngineError: the routes are missing, or are not of this model.
    """
    if config is None:
        raise ValueError(
            "routes were asked for, but the model is unknown; make Engine(url, model=config)"
        )
    if not meta.get("routed_experts"):
        raise EngineError(
            f"{url} returned no routes; start the SGLang server with"
            " --enable-return-routed-experts (and no gateway before it that drops the field),"
            " or set routing_replay to off or recompute"
        )
    data = base64.b64decode(meta["routed_experts"])
    ids = np.frombuffer(data, np.dtype(meta.get("routed_experts_dtype") or "int32"))
    ids_per_token = config.num_layers * config.experts_per_token
    computed_tokens = prompt_length + len(completion.output_ids) - 1
    wanted_tokens = computed_tokens - start - num_routes(completion)
    # Servers that do not know `routed_experts_start_len` send the routes of the whole sequence.
    if ids.size not in (wanted_tokens * ids_per_token, computed_tokens * ids_per_token):
        raise EngineError(
            f"{url} returned {ids.size} expert ids; {wanted_tokens} tokens in {config.num_layers}"
            f" layers with {config.experts_per_token} experts each have another number. Does it"
            " serve another model?"
        )
    ids_TLk = ids.reshape(-1, config.num_layers, config.experts_per_token)
    try:
        routes = encode_routes(ids_TLk[-wanted_tokens:], config)
    except ValueError as error:
        raise EngineError(f"routes from {url}: {error}. Does it serve another model?") from error
    if completion.routes is not None:
        routes = np.concatenate([completion.routes, routes])
    completion.routes = routes


def num_routes(completion: Completion) -> int:
    """Return the number of tokens whose routes are known."""
    return 0 if completion.routes is None else len(completion.routes)
