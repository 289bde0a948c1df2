"""The answers of /generate, in SGLang's form."""

from __future__ import annotations

import base64
import time
from typing import Any

import numpy as np

from rome.serve.request import Request, TextCodec
from rome.serve.stopping import decode


def make_answer(request: Request, version: str, tokenizer: TextCodec | None) -> dict[str, Any]:
    """Return the answer for what a request has so far.

    The scheduler may append tokens meanwhile; all parts of the answer cover the same tokens.

    Args:
      request: running or finished.
      version: weight version of an answer without tokens.
      tokenizer: None leaves out the text.
    """
    finish = request.finish  # first: what ended it is then among the tokens
    count = len(request.output_ids)
    ids = request.output_ids[:count]
    spans = [
        {"version": span_version, "start": start, "end": min(end, count)}
        for span_version, start, end in request.versions
        if start < count
    ]
    meta: dict[str, Any] = {
        "id": request.rid,
        "finish_reason": finish,
        "prompt_tokens": len(request.prompt_ids),
        "completion_tokens": count,
        "cached_tokens": request.cached_tokens,
        "weight_version": spans[-1]["version"] if spans else version,
        "weight_versions": spans,
        "e2e_latency": time.monotonic() - request.created,
    }
    if request.return_logprob:
        texts = tokenizer if request.text_in_logprobs else None
        meta["output_token_logprobs"] = _entries(request.logprobs[:count], ids, texts)
        if request.score_from is not None and finish is not None:
            scores = [None, *request.prompt_logprobs]
            # A request that was aborted early has fewer scores than prompt tokens.
            entries = _entries(scores, request.prompt_ids[: len(scores)], texts)
            meta["input_token_logprobs"] = entries[request.score_from :]
    if request.return_routes and finish is not None and request.routes is not None:
        meta["routed_experts"] = _encode_routes(request, count)
    answer: dict[str, Any] = {}
    if tokenizer is not None:
        answer["text"] = make_text(request, ids, finish or {}, tokenizer)
    answer["output_ids"] = ids
    answer["meta_info"] = meta
    return answer


def _entries(logprobs: list[Any], ids: list[int], texts: TextCodec | None) -> list[list[Any]]:
    """Return SGLang's triples of logprob, token id and text; None for a text that nobody wants."""
    return [
        [logprob, token, None if texts is None else decode([token], texts)]
        for logprob, token in zip(logprobs, ids, strict=True)
    ]


def _encode_routes(request: Request, count: int) -> str:
    """Return the experts of each token from `routes_from` on, as base64 of int32.

    The last token has none: nothing was sampled after it.
    """
    assert request.routes is not None
    end = min(len(request.prompt_ids) + count - 1, request.computed)
    routes = request.routes[request.routes_from : end]
    return base64.b64encode(np.ascontiguousarray(routes, np.int32).tobytes()).decode()


def make_text(
    request: Request, ids: list[int], finish: dict[str, Any], tokenizer: TextCodec
) -> str:
    """Return the text, without the stop token or string unless no_stop_trim asks for it."""
    params = request.sampling
    if not params.no_stop_trim:
        if request.text_end is not None:
            return _before_stop(request.text_end, ids, tokenizer, params.skip_special_tokens)
        if finish.get("type") == "stop" and finish.get("matched") is not None:
            ids = ids[:-1]
    return decode(ids, tokenizer, skip_special=params.skip_special_tokens)


def _before_stop(end: int, ids: list[int], tokenizer: TextCodec, skip_special: bool) -> str:
    """Return the text before a stop string.

    Args:
      end: where the stop string begins, in the text with all special tokens.
      ids: of the answer so far.
      tokenizer: of the model.
      skip_special: whether special tokens before the stop string are left out.
    """
    text = decode(ids, tokenizer)[:end]
    if not skip_special or decode(ids, tokenizer, skip_special=True).startswith(text):
        return text
    for count in range(len(ids), -1, -1):
        kept = decode(ids[:count], tokenizer)
        if text.startswith(kept):  # the token after these has the stop string's first character
            break
    return decode(ids[:count], tokenizer, skip_special=True) + text[len(kept) :]
