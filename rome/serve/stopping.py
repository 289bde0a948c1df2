"""Decides where an answer ends: at a stop token, a stop string, or its length."""

from __future__ import annotations

from typing import Any

from rome.serve.request import Request, TextCodec

SPLIT_CHARACTERS = 3  # that a cut inside of a character leaves: one for each byte of its rest


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
    """Return (number of tokens, place in the text, stop string) of the first match, or None.

    Earlier tokens hold no match, so only the end of the output, `request.tail_ids`, is decoded for
    each token; the place is looked up in the whole text once.
    """
    strings = request.sampling.stop
    tail = request.tail_ids
    for count, token in enumerate(tokens, 1):
        tail.append(token)
        text = decode(tail, tokenizer)
        is_cut = len(tail) < len(request.output_ids) + count
        first = SPLIT_CHARACTERS if is_cut else 0
        if any(text.find(stop, first) >= 0 for stop in strings):
            whole = decode(request.output_ids + tokens[:count], tokenizer)
            matches = [(whole.find(stop), stop) for stop in strings if stop in whole]
            if matches:
                place, matched = min(matches)
                return count, place, matched
        _cut_tail(tail, text, tokenizer, max(map(len, strings)) + 3 * SPLIT_CHARACTERS)
    return None


def _cut_tail(tail: list[int], text: str, tokenizer: TextCodec, needed: int) -> None:
    """Drop the first half of the tail where the rest has the `needed` characters.

    Needed are a stop string, what a cut through a character leaves, and a last character that the
    next token may still complete.
    """
    if len(text) < 4 * needed:
        return
    half = tail[len(tail) // 2 :]
    if len(decode(half, tokenizer)) >= needed:
        tail[:] = half


def decode(ids: list[int], tokenizer: TextCodec, skip_special: bool = False) -> str:
    """Return the text of sampled ids.

    A model's vocabulary may be padded beyond the tokenizer's; such ids have no text.
    """
    known = [one for one in ids if one < tokenizer.vocab_size]
    return tokenizer.decode(known, skip_special=skip_special)
