"""Decides where an answer ends: at a stop token, a stop string, or its length."""

from __future__ import annotations

from typing import Any

from rome.serve.request import Request, TextCodec


def find_end(
    request: Request, tokens: list[int], tokenizer: TextCodec | None
) -> tuple[int, dict[str, Any] | None]:
    """Return how many of the new tokens belong to the answer, and why it ends there.

    Sets `request.text_end` if a stop string matched.

    Args:
      request: that the tokens were sampled for; they are not in its output yet.
      tokens: newly sampled.
      tokenizer: needed for stop strings only.

    Returns:
      The number of tokens, the one that ends the answer included, and SGLang's finish_reason (None
      if the answer continues).
    """
    params = request.sampling
    room = params.max_new_tokens - len(request.output_ids)
    candidates = tokens[:room]
    by_stop_token = None  # number of tokens up to the first stop token
    for count, token in enumerate(candidates, 1):
        if token in params.stop_ids:
            by_stop_token = count
            break
    taken = len(candidates) if by_stop_token is None else by_stop_token
    if params.stop:
        assert tokenizer is not None, "requests with stop strings are refused without a tokenizer"
        by_string = _find_stop_string(request, tokens[:taken], tokenizer)
        if by_string is not None:
            count, request.text_end, matched = by_string
            return count, {"type": "stop", "matched": matched}
    if by_stop_token is not None:
        return taken, {"type": "stop", "matched": tokens[taken - 1]}
    if taken == room:
        return taken, {"type": "length", "length": params.max_new_tokens}
    return taken, None


def _find_stop_string(
    request: Request, tokens: list[int], tokenizer: TextCodec
) -> tuple[int, int, str] | None:
    """Return (number of tokens, place in the text, stop string) of the first match, or None."""
    for count in range(1, len(tokens) + 1):
        text = decode(request.output_ids + tokens[:count], tokenizer)
        matches = [(text.find(stop), stop) for stop in request.sampling.stop if stop in text]
        if matches:
            place, matched = min(matches)
            return count, place, matched
    return None


def decode(ids: list[int], tokenizer: TextCodec, skip_special: bool = False) -> str:
    """Return the text of sampled ids.

    A model's vocabulary may be padded beyond the tokenizer's; such ids have no text.
    """
    known = [one for one in ids if one < tokenizer.vocab_size]
    return tokenizer.decode(known, skip_special=skip_special)
