"""Parses the bodies of /generate: SGLang's fields, checked and turned into requests.

A field that this engine does not know is refused, unless it is null, false, zero or empty: then it
asks for nothing.
"""

from __future__ import annotations

import dataclasses
import json
import secrets
import uuid
from collections.abc import Sequence
from typing import Any

from rome.serve.adjusting import MAX_BIASES
from rome.serve.checks import (
    MAX_DIGITS,
    BadRequest,
    check_flag,
    check_integer,
    check_number,
    check_text,
)
from rome.serve.grammar import KINDS, Grammar, make_grammar
from rome.serve.request import Request, SamplingParams, TextCodec

# Far more than a trainer has at once, and longer than its episodes: they bound what a server
# collects that is paused, or that its clients have forgotten.
MAX_QUEUED_REQUESTS = 4096
REQUEST_SECONDS = 3600.0


@dataclasses.dataclass(frozen=True)
class Bounds:
    """Limits of this server.

    Attributes:
      vocab_size: of the model; larger token ids are refused.
      max_context: tokens of prompt and answer together.
      eos_token_ids: each ends an answer, unless the client asks to ignore them.
      max_queued_requests: requests that may wait for a slot; further ones are answered with 503.
      request_seconds: after which a request that has not ended is dropped and answered with 503.
    """

    vocab_size: int
    max_context: int
    eos_token_ids: frozenset[int]
    max_queued_requests: int = MAX_QUEUED_REQUESTS
    request_seconds: float = REQUEST_SECONDS

    def __post_init__(self) -> None:
        if self.max_queued_requests < 0:
            raise ValueError(
                f"--max_queued_requests must be at least 0, got {self.max_queued_requests}"
            )
        if not self.request_seconds > 0:
            raise ValueError(f"--request_seconds must be above 0, got {self.request_seconds}")


_BODY_FIELDS = {
    "text",
    "input_ids",
    "rid",
    "sampling_params",
    "return_logprob",
    "logprob_start_len",
    "stream",
    "return_routed_experts",
    "routed_experts_start_len",
    "cache_salt",
    "extra_key",
    "lora_path",
    "log_metrics",
    "priority",
    "return_text_in_logprobs",
}
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
    "no_stop_trim",
    "sampling_seed",
    "n",
    "frequency_penalty",
    "presence_penalty",
    "repetition_penalty",
    "min_new_tokens",
    "logit_bias",
    *KINDS,
}
# Sampling parameters that are accepted with these values only.
_NEUTRAL = {"spaces_between_special_tokens": True}
MIN_TEMPERATURE = 1e-6
MIN_REPETITION_PENALTY = 1e-6  # a logit divided by less need not be finite
MAX_SAMPLES = 128  # answers to one prompt
MAX_BATCH = 65536  # requests of one body
MAX_BIAS = 100.0  # OpenAI's
SEED_STRIDE = 0x9E3779B97F4A7C15  # between the seeds of the answers to one prompt; odd


# -- requests
# -------------------------------------------------------------------------------------------------


def parse_generate(
    body: Any, bounds: Bounds, tokenizer: TextCodec | None
) -> tuple[list[Request], bool]:
    """Return the requests of a /generate body, and whether it was a batch.

    Args:
      body: parsed JSON.
      bounds: of this server.
      tokenizer: None refuses text and stop strings.

    Raises:
      BadRequest: the body cannot be served.
    """
    if not isinstance(body, dict):
        raise BadRequest(f"the body must be a JSON object, got {type(body).__name__}")
    for name in body.keys() - _BODY_FIELDS:
        if body[name] not in (None, False, 0, -1, "", [], {}):
            raise BadRequest(
                f"field {name!r} = {body[name]!r} is not supported by this engine; leave it out"
            )
    prompts, is_batch = _parse_prompts(body, tokenizer)
    requests: list[Request] = []
    for number, prompt_ids in enumerate(prompts):
        fields = _Fields(body, number if is_batch else None, len(prompts))
        samples = _parse_samples(fields)
        is_batch = is_batch or samples > 1
        if len(requests) + samples > MAX_BATCH:
            raise BadRequest(f"send at most {MAX_BATCH} prompts, times their n, at once")
        for sample in range(samples):
            request = _parse_request(fields, prompt_ids, bounds, tokenizer)
            if samples > 1:
                request.rid = f"{request.rid}_{sample}"
                seed = (request.sampling.seed + sample * SEED_STRIDE) % 2**64
                request.sampling = dataclasses.replace(request.sampling, seed=seed)
            _check_fits(request, bounds)
            requests.append(request)
    _check_rids_differ(requests)
    return requests, is_batch


def _parse_samples(fields: _Fields) -> int:
    """Return how many answers to a prompt are wanted: `n` of its sampling parameters."""
    given = fields.get("sampling_params", {})
    if not isinstance(given, dict):
        raise BadRequest(f"sampling_params must be an object, got {type(given).__name__}")
    n = check_integer("n", 1 if given.get("n") is None else given["n"])
    if not 1 <= n <= MAX_SAMPLES:
        raise BadRequest(f"n must be from 1 to {MAX_SAMPLES}, got {n}")
    return n


@dataclasses.dataclass
class _Fields:
    """The fields of one request of a body; `number` is None for a body that is not a batch."""

    body: dict[str, Any]
    number: int | None
    batch_size: int

    def get(self, name: str, default: Any) -> Any:
        """Return one field; a batch gives one value for all, or a list of one for each."""
        value = self.body.get(name)
        if self.number is not None and isinstance(value, list):
            if len(value) != self.batch_size:
                raise BadRequest(f"{name} has {len(value)} entries for {self.batch_size} prompts")
            value = value[self.number]
        return default if value is None else value

    def flag(self, name: str) -> bool:
        """Return a field that is true or false; false where it is not given."""
        return check_flag(name, self.get(name, False))

    def text(self, name: str) -> str:
        """Return a field that is a string; "" where it is not given."""
        return check_text(name, self.get(name, ""))


def _parse_request(
    fields: _Fields, prompt_ids: list[int], bounds: Bounds, tokenizer: TextCodec | None
) -> Request:
    rid = fields.text("rid") or uuid.uuid4().hex
    if fields.number is not None and not isinstance(fields.body.get("rid"), list):
        rid = f"{rid}_{fields.number}"
    fields.flag("log_metrics")  # there are none to leave out, but it must be a flag
    routes_from = fields.get("routed_experts_start_len", 0)
    sampling = fields.get("sampling_params", {})
    request = Request(
        rid=rid,
        prompt_ids=prompt_ids,
        sampling=_parse_sampling(sampling, bounds, tokenizer),
        grammar=_parse_grammar(sampling, bounds, tokenizer),
        return_logprob=fields.flag("return_logprob"),
        return_routes=fields.flag("return_routed_experts"),
        routes_from=check_integer("routed_experts_start_len", routes_from),
        text_in_logprobs=fields.flag("return_text_in_logprobs"),
        stream=fields.flag("stream"),
        priority=check_integer("priority", fields.get("priority", 0)),
        adapter_name=fields.text("lora_path"),
        salt=json.dumps([fields.text("cache_salt"), fields.text("extra_key")]),
    )
    score_from = check_integer("logprob_start_len", fields.get("logprob_start_len", -1))
    if request.return_logprob and score_from != -1:
        request.score_from = score_from
    return request


def _check_rids_differ(requests: Sequence[Request]) -> None:
    seen = set()
    for request in requests:
        if request.rid in seen:
            raise BadRequest(f"Duplicate request ID detected: {request.rid}")
        seen.add(request.rid)


def _parse_prompts(
    body: dict[str, Any], tokenizer: TextCodec | None
) -> tuple[list[list[int]], bool]:
    """Return the prompts as token ids, and whether they were given as a batch."""
    text = body.get("text")
    ids = body.get("input_ids")
    if text is None and ids is None:
        raise BadRequest("give either input_ids or text")
    if text is not None and ids is not None:
        raise BadRequest("give either input_ids or text, not both")
    if text is not None:
        return _encode_texts(text, tokenizer), isinstance(text, list)
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


def _encode_texts(text: Any, tokenizer: TextCodec | None) -> list[list[int]]:
    if tokenizer is None:
        raise BadRequest(
            "this server has no tokenizer (--skip_tokenizer_init): send input_ids instead of text"
        )
    texts = text if isinstance(text, list) else [text]
    if not texts:
        raise BadRequest("text must be a string or a list of strings; the list is empty")
    return [tokenizer.encode(check_text("text", one), allow_special=True) for one in texts]


def _check_fits(request: Request, bounds: Bounds) -> None:
    """Raise BadRequest for token ids, lengths and positions outside the server's bounds."""
    length = len(request.prompt_ids)
    new = request.sampling.max_new_tokens
    context = bounds.max_context
    if length == 0:
        raise BadRequest("the prompt is empty; this engine needs at least one token")
    if not 0 <= request.routes_from <= length:
        raise BadRequest(
            f"routed_experts_start_len must be from 0 to the {length} tokens of the prompt, got"
            f" {request.routes_from}"
        )
    if request.score_from is not None and not 0 <= request.score_from <= length:
        raise BadRequest(
            f"logprob_start_len must be -1 (output only) or from 0 to the {length} tokens of the"
            f" prompt, got {request.score_from}"
        )
    for token in request.prompt_ids:
        if not 0 <= token < bounds.vocab_size:
            raise BadRequest(f"token id {token} is outside the vocabulary of {bounds.vocab_size}")
    if length > context or (length == context and new):
        raise BadRequest(
            f"the input of {length} tokens is longer than the context of {context};"
            " shorten it or start the server with a larger --max_context"
        )
    if length + new > context:
        raise BadRequest(
            f"the input of {length} tokens and max_new_tokens={new} exceed the context of"
            f" {context}; ask for at most {context - length} or start the server with a larger"
            " --max_context"
        )


# -- sampling parameters
# -------------------------------------------------------------------------------------------------


def _parse_sampling(
    given: dict[str, Any], bounds: Bounds, tokenizer: TextCodec | None
) -> SamplingParams:
    for name, value in given.items():
        is_neutral = value in (None, False, 0, "", [], {}, _NEUTRAL.get(name))
        if name not in _SAMPLING_FIELDS and not is_neutral:
            raise BadRequest(
                f"sampling parameter {name!r} = {value!r} is not supported by this engine; leave"
                " it out"
            )

    def get(name: str, default: Any) -> Any:
        return default if given.get(name) is None else given[name]

    stop_ids = _parse_stop_ids(get("stop_token_ids", [])) | bounds.eos_token_ids
    if check_flag("ignore_eos", get("ignore_eos", False)):
        stop_ids = frozenset()  # as SGLang, which then ignores stop_token_ids too
    seed = check_integer("sampling_seed", get("sampling_seed", secrets.randbits(63)))
    params = SamplingParams(
        max_new_tokens=check_integer("max_new_tokens", get("max_new_tokens", 128)),
        temperature=_parse_temperature(get("temperature", 1.0)),
        top_p=check_number("top_p", get("top_p", 1.0)),
        top_k=min(check_integer("top_k", get("top_k", -1)), bounds.vocab_size),
        min_p=check_number("min_p", get("min_p", 0.0)),
        stop=_parse_stop(get("stop", []), tokenizer),
        stop_ids=stop_ids,
        seed=seed % 2**64,
        skip_special_tokens=check_flag("skip_special_tokens", get("skip_special_tokens", True)),
        no_stop_trim=check_flag("no_stop_trim", get("no_stop_trim", False)),
        frequency_penalty=check_number("frequency_penalty", get("frequency_penalty", 0.0)),
        presence_penalty=check_number("presence_penalty", get("presence_penalty", 0.0)),
        repetition_penalty=check_number("repetition_penalty", get("repetition_penalty", 1.0)),
        min_new_tokens=check_integer("min_new_tokens", get("min_new_tokens", 0)),
        logit_bias=_parse_biases(get("logit_bias", {}), bounds.vocab_size),
    )
    _check_ranges(params)
    return params


def _parse_temperature(value: Any) -> float:
    """Return the temperature; SGLang takes one below MIN_TEMPERATURE for greedy too."""
    temperature = check_number("temperature", value)
    return 0.0 if 0 <= temperature < MIN_TEMPERATURE else temperature


def _parse_stop_ids(ids: Any) -> frozenset[int]:
    if not isinstance(ids, list):
        raise BadRequest(f"stop_token_ids must be a list of token ids, got {ids!r}")
    return frozenset(check_integer("stop_token_ids", one) for one in ids)


def asks_for_grammar(body: Any) -> bool:
    """Return whether a body may ask for a grammar, which can take seconds to read."""
    params = body.get("sampling_params") if isinstance(body, dict) else None
    given = params if isinstance(params, list) else [params]
    return any(isinstance(one, dict) and any(one.get(kind) for kind in KINDS) for one in given)


def _parse_grammar(
    given: dict[str, Any], bounds: Bounds, tokenizer: TextCodec | None
) -> Grammar | None:
    asked = [(kind, check_text(kind, given[kind])) for kind in KINDS if given.get(kind)]
    if len(asked) > 1:
        raise BadRequest(f"give only one of {', '.join(KINDS)}")
    for kind, text in asked:
        return make_grammar(kind, text, tokenizer, bounds.vocab_size, bounds.eos_token_ids)
    return None


def _parse_biases(given: Any, vocab_size: int) -> tuple[tuple[int, float], ...]:
    """Return tokens and what is added to their logits; JSON spells the tokens as text."""
    if not isinstance(given, dict):
        raise BadRequest(f"logit_bias must be an object of token ids and numbers, got {given!r}")
    biases = []
    for token, value in given.items():
        digits = str(token)
        is_number = digits.isascii() and digits.isdecimal() and len(digits) < MAX_DIGITS
        number = int(digits) if is_number else vocab_size
        if number >= vocab_size:
            raise BadRequest(
                f"logit_bias has the key {token!r}; keys must be token ids below {vocab_size}"
            )
        bias = check_number("logit_bias", value)
        if abs(bias) > MAX_BIAS:
            raise BadRequest(f"logit_bias must be from -{MAX_BIAS:g} to {MAX_BIAS:g}, got {bias:g}")
        biases.append((number, bias))
    return tuple(biases)


def _parse_stop(stop: Any, tokenizer: TextCodec | None) -> tuple[str, ...]:
    strings = [stop] if isinstance(stop, str) else stop
    if not isinstance(strings, list) or "" in strings:
        raise BadRequest(
            f"stop must be a string or a list of strings that are not empty, got {stop!r}"
        )
    for one in strings:
        check_text("stop", one)
    if strings and tokenizer is None:
        raise BadRequest(
            "this server has no tokenizer (--skip_tokenizer_init): use stop_token_ids instead of"
            " stop"
        )
    return tuple(strings)


def _check_ranges(params: SamplingParams) -> None:
    """Raise BadRequest with every parameter that is out of its range."""
    faults = []
    if params.max_new_tokens < 0:
        faults.append(f"max_new_tokens must be at least 0, got {params.max_new_tokens}")
    if params.temperature < 0:
        faults.append(f"temperature must be 0 (greedy) or more, got {params.temperature}")
    if not 0 < params.top_p <= 1:
        faults.append(f"top_p must be in (0, 1], got {params.top_p}")
    if params.top_k < 1 and params.top_k != -1:
        faults.append(f"top_k must be -1 (all) or at least 1, got {params.top_k}")
    if not 0 <= params.min_p <= 1:
        faults.append(f"min_p must be in [0, 1], got {params.min_p}")
    for name in ("frequency_penalty", "presence_penalty"):
        if not -2 <= getattr(params, name) <= 2:
            faults.append(f"{name} must be in [-2, 2], got {getattr(params, name)}")
    if not MIN_REPETITION_PENALTY <= params.repetition_penalty <= 2:
        faults.append(
            f"repetition_penalty must be from {MIN_REPETITION_PENALTY:g} to 2, got"
            f" {params.repetition_penalty}"
        )
    if not 0 <= params.min_new_tokens <= max(params.max_new_tokens, 0):
        faults.append(
            f"min_new_tokens must be from 0 to max_new_tokens, got {params.min_new_tokens}"
        )
    biases = len(params.logit_bias) + (len(params.stop_ids) if params.min_new_tokens else 0)
    if biases > MAX_BIASES:
        faults.append(
            f"logit_bias, with the stop tokens that min_new_tokens holds back, may have"
            f" {MAX_BIASES} tokens, got {biases}"
        )
    if faults:
        raise BadRequest("; ".join(faults))
