"""What a client may ask of /generate: SGLang's fields, checked and put into words of our own.

A field that this engine does not know is refused, unless it is null, false, zero or empty: then it
asks for nothing.
"""

from __future__ import annotations

import dataclasses
import math
import secrets
import time
import uuid
from collections.abc import Callable
from typing import Any, Protocol


class BadRequest(ValueError):
    """The client's mistake, in one sentence; answered as HTTP 400."""


class TextCodec(Protocol):
    """What is needed of a tokenizer."""

    vocab_size: int

    def encode(self, text: str, allow_special: bool = False) -> list[int]: ...
    def decode(self, ids: list[int], skip_special: bool = False) -> str: ...


@dataclasses.dataclass(frozen=True)
class Bounds:
    """What fits into this server."""

    vocab_size: int
    max_context: int
    eos_token_id: int


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """SGLang's sampling_params. temperature 0 is greedy; top_k -1 keeps all; seed is 64 bits, drawn
    at random when none was given.
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


@dataclasses.dataclass
class Request:
    """One sequence and its way through the scheduler, which alone changes it after it was
    submitted.

    Args:
      score_from: the logprobs of prompt_ids[score_from:] are wanted too (its prefix is then never
        taken from the cache); None: they are not.
      salt: requests share cached prefixes only with requests of the same salt.
      notify: called from the scheduler's thread with the request, at its end and, for `stream`,
        after each step that brought tokens.
    """

    rid: str
    prompt_ids: list[int]
    sampling: SamplingParams
    return_logprob: bool = False
    score_from: int | None = None
    return_routes: bool = False
    routes_from: int = 0  # the routes of earlier positions are not sent
    stream: bool = False
    salt: str = ""
    notify: Callable[[Request], None] = lambda request: None

    output_ids: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    prompt_logprobs: list[float] = dataclasses.field(default_factory=list)  # of prompt_ids[1:]
    versions: list[list] = dataclasses.field(
        default_factory=list
    )  # [version, start, end] over output_ids
    routes: list[Any] = dataclasses.field(
        default_factory=list
    )  # arrays [tokens, layers, k] of what was put in so far
    cached_tokens: int = 0
    finish: dict[str, Any] | None = None
    created: float = dataclasses.field(default_factory=time.monotonic)
    text_end: int | None = None  # where a matched stop string begins in the text

    # where it stands in the cache; meaningful while it has a slot
    slot: int | None = None
    ids: list[int] = dataclasses.field(
        default_factory=list
    )  # to prefill: the prompt, and the output so far when it starts over
    keys: list[bytes] = dataclasses.field(default_factory=list)  # of the whole chunks of ids
    prefilled: int = 0


_SAMPLING_FIELDS = {
    "max_new_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "stop",
    "stop_token_ids",
    "ignore_eos",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "no_stop_trim",
    "sampling_seed",
}
_NEUTRAL = {
    "n": 1,
    "repetition_penalty": 1.0,
    "spaces_between_special_tokens": True,
}  # accepted with these values only
_BODY_FIELDS = {
    "text",
    "input_ids",
    "rid",
    "sampling_params",
    "return_logprob",
    "logprob_start_len",
    "return_text_in_logprobs",
    "stream",
    "return_routed_experts",
    "routed_experts_start_len",
    "cache_salt",
    "extra_key",
    "priority",
    "log_metrics",
    "routing_key",
    "data_parallel_rank",
}


def parse_generate(
    body: Any, bounds: Bounds, tokenizer: TextCodec | None
) -> tuple[list[Request], bool]:
    """The requests of a /generate body, and whether it was a batch (and is answered by a list).

    Raises BadRequest.
    """
    if not isinstance(body, dict):
        raise BadRequest(f"the body must be a JSON object, got {type(body).__name__}")
    for name in body.keys() - _BODY_FIELDS:
        if body[name] not in (None, False, 0, -1, "", [], {}):
            raise BadRequest(
                f"field {name!r} = {body[name]!r} is not supported by this engine; leave it out"
            )
    prompts, is_batch = _prompts(body, tokenizer)

    def pick(name: str, default: Any, number: int) -> Any:
        """A batch gives one value for all, or a list of one for each."""
        value = body.get(name)
        if is_batch and isinstance(value, list):
            if len(value) != len(prompts):
                raise BadRequest(f"{name} has {len(value)} entries for {len(prompts)} prompts")
            value = value[number]
        return default if value is None else value

    requests = []
    for number, prompt_ids in enumerate(prompts):
        rid = str(pick("rid", uuid.uuid4().hex, number))
        stream = bool(body.get("stream"))
        if stream and is_batch:
            raise BadRequest(
                "stream=true takes one prompt; send the others as requests of their own"
            )
        request = Request(
            rid=rid if not is_batch or isinstance(body.get("rid"), list) else f"{rid}_{number}",
            prompt_ids=prompt_ids,
            sampling=_sampling(pick("sampling_params", {}, number), bounds, tokenizer),
            return_logprob=bool(pick("return_logprob", False, number)),
            return_routes=bool(pick("return_routed_experts", False, number)),
            stream=stream,
            routes_from=_integer(
                "routed_experts_start_len", pick("routed_experts_start_len", 0, number)
            ),
            salt=f"{pick('cache_salt', '', number)}{pick('extra_key', '', number)}",
        )
        start = _integer("logprob_start_len", pick("logprob_start_len", -1, number))
        request.score_from = start if request.return_logprob and start >= 0 else None
        _check_fits(request, bounds)
        requests.append(request)
    return requests, is_batch


def _prompts(body: dict, tokenizer: TextCodec | None) -> tuple[list[list[int]], bool]:
    text, ids = body.get("text"), body.get("input_ids")
    if (text is None) == (ids is None):
        raise BadRequest(
            "give either input_ids or text" + (", not both" if text is not None else "")
        )
    if text is not None:
        if tokenizer is None:
            raise BadRequest(
                "this server has no tokenizer (--skip_tokenizer_init): send input_ids instead of"
                " text"
            )
        is_batch = isinstance(text, list)
        texts = text if is_batch else [text]
        if not texts or not all(isinstance(one, str) for one in texts):
            raise BadRequest("text must be a string or a list of strings")
        return [tokenizer.encode(one, allow_special=True) for one in texts], is_batch
    if not isinstance(ids, list) or not ids:
        raise BadRequest(
            "input_ids must be a list of token ids, or a list of such lists; it must not be empty"
        )
    is_batch = isinstance(ids[0], list)
    prompts = ids if is_batch else [ids]
    for prompt in prompts:
        if not isinstance(prompt, list) or not all(type(one) is int for one in prompt):
            raise BadRequest("input_ids must hold integers only")
    return prompts, is_batch


def _check_fits(request: Request, bounds: Bounds) -> None:
    length, new = len(request.prompt_ids), request.sampling.max_new_tokens
    if not length:
        raise BadRequest("the prompt is empty; this engine needs at least one token")
    if not 0 <= request.routes_from <= length:
        raise BadRequest(
            f"routed_experts_start_len must be from 0 to the {length} tokens of the prompt, got"
            f" {request.routes_from}"
        )
    for one in request.prompt_ids:
        if not 0 <= one < bounds.vocab_size:
            raise BadRequest(f"token id {one} is outside the vocabulary of {bounds.vocab_size}")
    if (length >= bounds.max_context and new) or length > bounds.max_context:
        raise BadRequest(
            f"the input of {length} tokens is longer than the context of {bounds.max_context};"
            " shorten it or start the server with a larger --max_context"
        )
    if length + new > bounds.max_context:
        raise BadRequest(
            f"the input of {length} tokens and max_new_tokens={new} exceed the context of"
            f" {bounds.max_context}; ask for at most {bounds.max_context - length} or start the"
            " server with a larger --max_context"
        )


def _sampling(given: Any, bounds: Bounds, tokenizer: TextCodec | None) -> SamplingParams:
    if not isinstance(given, dict):
        raise BadRequest(f"sampling_params must be an object, got {type(given).__name__}")
    for name, value in given.items():
        neutral = value in (None, False, 0, "", [], {}, _NEUTRAL.get(name))
        if (name not in _SAMPLING_FIELDS or name in _NEUTRAL) and not neutral:
            raise BadRequest(
                f"sampling parameter {name!r} = {value!r} is not supported by this engine; leave"
                " it out"
            )

    def get(name: str, default: Any) -> Any:
        return default if given.get(name) is None else given[name]

    stop = get("stop", [])
    stop = (stop,) if isinstance(stop, str) else tuple(stop)
    if any(not isinstance(one, str) or not one for one in stop):
        raise BadRequest(
            f"stop must be a string or a list of strings that are not empty, got {list(stop)!r}"
        )
    if stop and tokenizer is None:
        raise BadRequest(
            "this server has no tokenizer (--skip_tokenizer_init): use stop_token_ids instead of"
            " stop"
        )
    stop_ids = {_integer("stop_token_ids", one) for one in get("stop_token_ids", [])}
    params = SamplingParams(
        max_new_tokens=_integer("max_new_tokens", get("max_new_tokens", 128)),
        temperature=_number("temperature", get("temperature", 1.0)),
        top_p=_number("top_p", get("top_p", 1.0)),
        top_k=_integer("top_k", get("top_k", -1)),
        min_p=_number("min_p", get("min_p", 0.0)),
        stop=stop,
        stop_ids=frozenset(
            stop_ids if get("ignore_eos", False) else stop_ids | {bounds.eos_token_id}
        ),
        seed=_integer("sampling_seed", get("sampling_seed", secrets.randbits(63))) % 2**64,
        skip_special_tokens=bool(get("skip_special_tokens", True)),
        no_stop_trim=bool(get("no_stop_trim", False)),
    )
    wrong = [
        message
        for message, is_wrong in (
            (
                f"max_new_tokens must be at least 0, got {params.max_new_tokens}",
                params.max_new_tokens < 0,
            ),
            (
                f"temperature must be 0 (greedy) or more, got {params.temperature}",
                params.temperature < 0,
            ),
            (f"top_p must be in (0, 1], got {params.top_p}", not 0 < params.top_p <= 1),
            (
                f"top_k must be -1 (all) or at least 1, got {params.top_k}",
                params.top_k < 1 and params.top_k != -1,
            ),
            (f"min_p must be in [0, 1], got {params.min_p}", not 0 <= params.min_p <= 1),
        )
        if is_wrong
    ]
    if wrong:
        raise BadRequest("; ".join(wrong))
    return params


def _integer(name: str, value: Any) -> int:
    if type(value) is not int:
        raise BadRequest(f"{name} must be an integer, got {value!r}")
    return value


def _number(name: str, value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise BadRequest(f"{name} must be a finite number, got {value!r}")
    return float(value)
