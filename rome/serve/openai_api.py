"""OpenAI's completions and chat completions: bodies turned into those of /generate, and answers.

Pure functions. What this engine does not do it refuses by name. SGLang's additions (top_k, min_p,
stop_token_ids, ignore_eos, rid, cache_salt, priority, ...) are taken as /generate takes them.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from envs.gem.tool_call import OPEN, ToolCallError, iterate_tool_calls
from rome.model.tokenizer import Chat, Tokenizer
from rome.serve.answer import make_text
from rome.serve.checks import BadRequest, check_flag, check_integer, check_text
from rome.serve.grammar import KINDS
from rome.serve.request import Request
from rome.serve.required_calls import required_name
from rome.serve.stopping import decode

DEFAULT_MAX_TOKENS = 16  # of a text completion; a chat goes on to the end of the context
ROLES = ("system", "developer", "user", "assistant", "tool")
BROKEN_CHARACTER = "\ufffd"
# As /generate takes them.
_SAMPLING = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "n",
    "stop",
    "stop_token_ids",
    "ignore_eos",
    "skip_special_tokens",
    "no_stop_trim",
    "frequency_penalty",
    "presence_penalty",
    "repetition_penalty",
    "logit_bias",
    "min_new_tokens",
    *KINDS,
)
_BODY = ("rid", "cache_salt", "extra_key", "priority", "stream", "lora_path")
_OWN = (
    "model",
    "seed",
    "max_tokens",
    "min_tokens",
    "response_format",
    "logprobs",
    "stream_options",
    "return_token_ids",
)
_OF_CHAT = ("messages", "tools", "tool_choice", "max_completion_tokens")
_OF_TEXT = ("prompt",)
# They say something about the client, and ask for nothing.
_IGNORED = (
    "user",
    "metadata",
    "store",
    "service_tier",
    "parallel_tool_calls",
    "safety_identifier",
    "prompt_cache_key",
)
# Fields that are accepted with these values only.
_NEUTRAL: Mapping[str, Any] = {
    "best_of": 1,
    "modalities": ["text"],
}


# -- requests
# -------------------------------------------------------------------------------------------------


def to_generate(body: dict[str, Any], adapters: Collection[str], is_chat: bool) -> dict[str, Any]:
    """Return the body of /generate for an OpenAI body, without its prompt.

    Args:
      body: parsed JSON.
      adapters: names that `model` may give; any other model is the one that is served.
      is_chat: whether it came to the chat route.

    Raises:
      BadRequest: it asks for what this engine does not do.
    """
    own = _OF_CHAT if is_chat else _OF_TEXT
    known = {*_SAMPLING, *_BODY, *_OWN, *_IGNORED, *own}
    for name, value in body.items():
        is_neutral = value in (None, False, 0, "", [], {}) or value == _NEUTRAL.get(name)
        if name not in known and not is_neutral:
            raise BadRequest(
                f"{name!r} = {json.dumps(value)[:200]} is not supported by this engine; leave it"
                " out"
            )
    sampling = {name: body[name] for name in _SAMPLING if body.get(name) is not None}
    if body.get("min_tokens") is not None:  # SGLang's name here
        sampling["min_new_tokens"] = body["min_tokens"]
    if body.get("seed") is not None:
        sampling["sampling_seed"] = body["seed"]
    schema = _schema_of(body.get("response_format"))
    if schema is not None:
        sampling["json_schema"] = schema
    limit = _max_tokens(body, is_chat)
    if limit is not None:
        sampling["max_new_tokens"] = limit
    asked = {name: body[name] for name in _BODY if body.get(name) is not None}
    model = check_text("model", body.get("model") or "")
    if model in adapters:
        asked.setdefault("lora_path", model)
    asked["sampling_params"] = sampling
    asked["return_logprob"] = wants_logprobs(body, is_chat)
    return asked


def _schema_of(given: Any) -> str | None:
    """Return the JSON schema of a response_format as text; None where any text will do."""
    kind = given.get("type") if isinstance(given, dict) else None
    if given is None or kind == "text":
        return None
    if kind == "json_object":
        return json.dumps({"type": "object"})
    wrapped = given.get("json_schema") if kind == "json_schema" else None
    schema = wrapped.get("schema") if isinstance(wrapped, dict) else None
    if not isinstance(schema, dict):
        raise BadRequest(
            f"response_format={json.dumps(given)[:200]} is not supported; give type text,"
            " json_object, or json_schema with a schema"
        )
    return json.dumps(schema)


def _max_tokens(body: Mapping[str, Any], is_chat: bool) -> int | None:
    for name in ("max_completion_tokens", "max_tokens"):
        if body.get(name) is not None:
            return check_integer(name, body[name])
    return None if is_chat else DEFAULT_MAX_TOKENS


def wants_logprobs(body: Mapping[str, Any], is_chat: bool) -> bool:
    """Return whether logprobs of the sampled tokens are asked for.

    Raises:
      BadRequest: those of other tokens are, too.
    """
    given = body.get("logprobs")
    if is_chat:
        return check_flag("logprobs", given or False)
    if given is None or given is False:
        return False
    if check_integer("logprobs", given) > 1:
        raise BadRequest(
            f"logprobs={given} asks for the likeliest tokens, which this engine does not give; ask"
            " for 0 or 1: those of the sampled tokens"
        )
    return True


def wants_usage(body: Mapping[str, Any]) -> bool:
    """Return whether a stream shall end with the numbers of tokens."""
    options = body.get("stream_options") or {}
    if not isinstance(options, dict):
        raise BadRequest(f"stream_options must be an object, got {options!r}")
    return check_flag("stream_options.include_usage", options.get("include_usage") or False)


def prompt_of(body: Mapping[str, Any]) -> dict[str, Any]:
    """Return the field of /generate for the prompt of a text completion."""
    prompt = body.get("prompt")
    if isinstance(prompt, str) or (
        isinstance(prompt, list) and prompt and isinstance(prompt[0], str)
    ):
        return {"text": prompt}
    if isinstance(prompt, list) and prompt:
        return {"input_ids": prompt}
    raise BadRequest("prompt must be a text, a list of texts, token ids, or a list of such lists")


def chat_ids(body: Mapping[str, Any], tokenizer: Tokenizer) -> list[int]:
    """Return the ids of a chat, up to the header of the assistant's turn.

    Raises:
      BadRequest: the messages or the tools cannot be rendered.
    """
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise BadRequest("messages must be a list of messages; it must not be empty")
    read = [_read_message(one, f"messages[{place}]") for place, one in enumerate(messages)]
    tools = read_tools(body)
    try:
        json.dumps([read, tools], ensure_ascii=False).encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can spell
        raise BadRequest("the messages or tools are not valid Unicode") from None
    try:
        return Chat(tokenizer, tools or None).render(read, hands_over=True)
    except ValueError as error:
        raise BadRequest(str(error)) from None


def read_tools(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the tools that the model may call.

    Raises:
      BadRequest: they are none, or tool_choice is.
    """
    choice = body.get("tool_choice")
    required_name(choice)  # it is one of those that are known
    tools = body.get("tools") or []
    if not isinstance(tools, list):
        raise BadRequest("tools must be a list")
    for place, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, dict) else None
        name = function.get("name") if isinstance(function, dict) else None
        if tool_type(tool) != "function" or not isinstance(name, str) or not name:
            raise BadRequest(f'tools[{place}] must be {{"type": "function", "function": {{"name"')
    return [] if choice == "none" else tools


def tool_type(tool: Any) -> Any:
    """Return the type of a tool's description."""
    return tool.get("type", "function") if isinstance(tool, dict) else None


def _read_message(message: Any, where: str) -> dict[str, Any]:
    role = message.get("role") if isinstance(message, dict) else None
    if role not in ROLES:
        raise BadRequest(f"{where} has role {role!r}; known: {', '.join(ROLES)}")
    read = {"role": "system" if role == "developer" else role}
    read["content"] = _text_of(message.get("content"), where)
    calls = message.get("tool_calls") or []
    if not isinstance(calls, list):
        raise BadRequest(f"{where}.tool_calls must be a list")
    for call in calls:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise BadRequest(f"{where}.tool_calls has a call without a function's name")
        if not isinstance(function.get("arguments", "{}"), (str, dict)):
            raise BadRequest(f"{where}.tool_calls has arguments that are no text and no object")
    if calls:
        read["tool_calls"] = [
            {"type": "function", "function": {"arguments": "{}", **call["function"]}}
            for call in calls
        ]
    return read


def _text_of(content: Any, where: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return check_text(f"{where}.content", content)
    if not isinstance(content, list):
        raise BadRequest(f"{where}.content is neither text nor a list of parts")
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            raise BadRequest(f"{where}.content has a part of type {kind!r}; this model reads text")
        texts.append(check_text(f"{where}.content", part["text"]))
    return "".join(texts)


# -- answers
# -------------------------------------------------------------------------------------------------


class Answers:
    """The answers to one OpenAI body, whole or as the chunks of a stream.

    Args:
      body: that was asked.
      requests: its requests; a choice each, in order.
      tokenizer: of the model; None for a server that gives token ids only (text completions).
      model: name that is given back.
      is_chat: which of the two forms.
    """

    def __init__(
        self,
        body: Mapping[str, Any],
        requests: Sequence[Request],
        tokenizer: Tokenizer | None,
        model: str,
        is_chat: bool,
    ):
        self._requests = requests
        self._tokenizer = tokenizer
        self._is_chat = is_chat
        self._has_tools = is_chat and bool(read_tools(body))
        self._gives_ids = check_flag("return_token_ids", body.get("return_token_ids") or False)
        self._head = {
            "id": ("chatcmpl-" if is_chat else "cmpl-") + uuid.uuid4().hex,
            "created": int(time.time()),
            "model": model,
        }
        self._sent = {request: _Sent() for request in requests}

    def whole(self) -> dict[str, Any]:
        """Return the answer of requests that have all ended."""
        kind = "chat.completion" if self._is_chat else "text_completion"
        choices = [self._choice(place, one) for place, one in enumerate(self._requests)]
        return {**self._head, "object": kind, "choices": choices, "usage": self.usage()}

    def usage(self) -> dict[str, Any]:
        """Return the numbers of tokens. A prompt with several answers counts for each."""
        prompts = sum(len(request.prompt_ids) for request in self._requests)
        cached = sum(request.cached_tokens for request in self._requests)
        sampled = sum(len(request.output_ids) for request in self._requests)
        return {
            "prompt_tokens": prompts,
            "completion_tokens": sampled,
            "total_tokens": prompts + sampled,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    def usage_chunk(self) -> dict[str, Any]:
        """Return the last chunk of a stream that wants usage."""
        return {**self._head, "object": self._chunk_kind, "choices": [], "usage": self.usage()}

    def chunks(self, request: Request) -> list[dict[str, Any]]:
        """Return what is new of a request since the last call."""
        sent = self._sent[request]
        finish = request.finish
        count = len(request.output_ids)
        text = self._text(request, count, finish)
        calls: list[dict[str, Any]] = []
        if finish is None:
            text = text[: self._safe_end(request, text)]
        elif self._has_tools:
            text, calls = read_calls(text, request.rid)
        extra: dict[str, Any] = {}
        if request.return_logprob and count > sent.tokens:
            extra["logprobs"] = self._logprobs(request, sent.tokens, count)
        if self._gives_ids:
            extra["token_ids"] = request.output_ids[sent.tokens : count]
        new = text[sent.characters :]
        deltas = []
        if new or extra or not sent.began:
            deltas.append(self._delta(new, sent) | extra)
        if calls:
            indexed = [{"index": number, **call} for number, call in enumerate(calls)]
            deltas.append({"delta": {"tool_calls": indexed}})
        if finish is not None:
            last = {"delta": {}} if self._is_chat else {"text": ""}
            deltas.append(last | {"finish_reason": _reason(finish, bool(calls))})
        sent.began = True
        sent.tokens = count
        sent.characters = max(sent.characters, len(text))
        place = self._requests.index(request)
        head = {**self._head, "object": self._chunk_kind}
        blank = {"index": place, "logprobs": None, "finish_reason": None}
        return [{**head, "choices": [blank | delta]} for delta in deltas]

    @property
    def _chunk_kind(self) -> str:
        return "chat.completion.chunk" if self._is_chat else "text_completion"

    def _delta(self, new: str, sent: _Sent) -> dict[str, Any]:
        if not self._is_chat:
            return {"text": new}
        role = {} if sent.began else {"role": "assistant"}
        return {"delta": {**role, "content": new}}

    def _choice(self, place: int, request: Request) -> dict[str, Any]:
        finish = request.finish or {}
        count = len(request.output_ids)
        text = self._text(request, count, finish)
        choice: dict[str, Any] = {"index": place}
        calls: list[dict[str, Any]] = []
        if self._has_tools:
            text, calls = read_calls(text, request.rid)
        if self._is_chat:
            message: dict[str, Any] = {"role": "assistant", "content": text}
            if calls:
                message["content"] = text or None
                message["tool_calls"] = calls
            choice["message"] = message
        else:
            choice["text"] = text
        choice["logprobs"] = self._logprobs(request, 0, count) if request.return_logprob else None
        choice["finish_reason"] = _reason(finish, bool(calls))
        choice["matched_stop"] = finish.get("matched")
        if self._gives_ids:
            choice["prompt_token_ids"] = request.prompt_ids
            choice["token_ids"] = request.output_ids[:count]
        return choice

    def _text(self, request: Request, count: int, finish: Mapping[str, Any] | None) -> str:
        if self._tokenizer is None:
            return ""
        return make_text(request, request.output_ids[:count], dict(finish or {}), self._tokenizer)

    def _safe_end(self, request: Request, text: str) -> int:
        """Return up to where a text stays as it is, whatever is sampled next.

        A character may be incomplete, a stop string may have begun, and so may a tool call.
        """
        end = len(text.rstrip(BROKEN_CHARACTER))
        marks = [*request.sampling.stop, *map(self._without_special, request.sampling.stop)]
        if self._has_tools:
            for mark in _CALL_MARKS:
                if mark in text:
                    end = min(end, len(text[: text.index(mark)].rstrip()))
            marks += _CALL_MARKS
            end = min(end, len(text[:end].rstrip()))  # spaces before a call are not content
        for mark in marks:
            for length in range(min(len(mark), len(text)), 0, -1):
                if text.endswith(mark[:length]):
                    end = min(end, len(text) - length)
                    break
        return end

    def _without_special(self, stop: str) -> str:
        """Return a stop string as a text shows it that leaves out special tokens."""
        if self._tokenizer is None:
            return stop
        ids = self._tokenizer.encode(stop, allow_special=True)
        return self._tokenizer.decode(ids, skip_special=True)

    def _logprobs(self, request: Request, start: int, end: int) -> dict[str, Any]:
        pairs = list(zip(request.output_ids[start:end], request.logprobs[start:end], strict=True))
        texts = [self._token_text(token) for token, _ in pairs]
        if not self._is_chat:
            return {"tokens": texts, "token_logprobs": [logprob for _, logprob in pairs]}
        content = [
            {
                "token": text,
                "logprob": logprob,
                "bytes": list(text.encode()),
                "top_logprobs": [],
            }
            for text, (_, logprob) in zip(texts, pairs, strict=True)
        ]
        return {"content": content, "refusal": None}

    def _token_text(self, token: int) -> str:
        if self._tokenizer is None:
            return f"token_id:{token}"
        return decode([token], self._tokenizer)


class _Sent:
    """What a stream has sent of a request."""

    def __init__(self) -> None:
        self.began = False
        self.tokens = 0
        self.characters = 0


_CALL_MARKS = (OPEN, "<function=")


def read_calls(text: str, rid: str) -> tuple[str, list[dict[str, Any]]]:
    """Return what a turn says before its tool calls, and the calls.

    A turn with a call that cannot be read has none: the client sees all of its text.
    """
    try:
        calls = [call for call, _ in iterate_tool_calls(text)]
    except ToolCallError:
        return text, []
    if not calls:
        return text, []
    mark = OPEN if OPEN in text else "<function="
    made = [
        {
            "id": f"call_{rid}_{number}",
            "type": "function",
            "function": {
                "name": call.name,
                "arguments": json.dumps(call.arguments, ensure_ascii=False),
            },
        }
        for number, call in enumerate(calls)
    ]
    return text[: text.index(mark)].rstrip(), made


def _reason(finish: Mapping[str, Any], has_calls: bool) -> str:
    if has_calls and finish.get("type") == "stop":
        return "tool_calls"
    return str(finish.get("type") or "stop")
