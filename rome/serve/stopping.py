"""Where a request ends: a stop token, a stop string, or its length."""

from __future__ import annotations

from typing import Any

from rome.serve.protocol import Request, TextCodec


def find_end(
    request: Request, tokens: list[int], tokenizer: TextCodec | None
) -> tuple[int, dict[str, Any] | None]:
    """How many of the drawn tokens belong to the request, and why it ends there (None: it goes on).

    The token that ends it is counted in. Sets `request.text_end` when a stop string matched.
    """
    params = request.sampling
    room = params.max_new_tokens - len(request.output_ids)
    ends = [count for count, token in enumerate(tokens[:room], 1) if token in params.stop_ids]
    taken = ends[0] if ends else min(len(tokens), room)
    if params.stop:
        for count in range(1, taken + 1):
            text = decode(request.output_ids + tokens[:count], tokenizer)
            matches = [(text.find(stop), stop) for stop in params.stop if stop in text]
            if matches:
                request.text_end, matched = min(matches)
                return count, {"type": "stop", "matched": matched}
    if ends:
        return taken, {"type": "stop", "matched": tokens[taken - 1]}
    if taken == room:
        return taken, {"type": "length", "length": params.max_new_tokens}
    return taken, None


def decode(ids: list[int], tokenizer: TextCodec, skip_special: bool = False) -> str:
    """Text of sampled ids.

    A model's vocabulary may be padded beyond the tokenizer's; such ids have no text.
    """
    return tokenizer.decode(
        [one for one in ids if one < tokenizer.vocab_size], skip_special=skip_special
    )
