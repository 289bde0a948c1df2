"""From a conversation to a trajectory: ids of the chat template, the assistant's to be learned.

Everything that an assistant did not write (system, tools, users, results of tools, headers of
turns) is prompt. The ids of a turn are those of its text and of `<|im_end|>`, as the model would
have sampled them after the header.

Two checks keep out what would be learned in another form than it is read: the pieces joined must be
the ids of the whole conversation, in which merges may cross the border between a header and a turn;
and the ids of a turn must be the turn's text again.
"""

from __future__ import annotations

import itertools
import unicodedata
from collections.abc import Sequence

from rome.data.formats.conversation import Conversation, Message, UnfitError
from rome.data.trajectory import Chunk, Trajectory
from rome.model.tokenizer import Chat, Tokenizer


def render(conversation: Conversation, tokenizer: Tokenizer) -> Trajectory:
    """Return the trajectory of a conversation; its last turn is the last that is read.

    Raises:
      UnfitError: it cannot be rendered, or the checks fail; the message says why.
    """
    system, messages = _split_system(conversation.messages)
    if not messages or messages[0].role != "user":
        role = messages[0].role if messages else "nobody"
        raise UnfitError(f"it begins with {role}; the first message after the system's is a user's")
    if not any(message.role == "assistant" and message.learned for message in messages):
        raise UnfitError("no message of an assistant is there to be learned")
    chat = Chat(tokenizer, list(conversation.tools) or None, system)
    chunks = _render_pieces(messages, chat)
    whole = _render_whole(messages, chat)
    pieces = [number for chunk in chunks for number in (*chunk.prompt_ids, *chunk.action_ids)]
    if pieces != whole[: len(pieces)]:
        place = next(
            n for n, pair in enumerate(zip(pieces, whole, strict=False)) if len({*pair}) > 1
        )
        raise UnfitError(
            f"as a whole it has other tokens than in pieces, from token {place} on: a turn begins"
            " with blanks that merge with its header"
        )
    reward = 1.0 if conversation.reward is None else conversation.reward
    return Trajectory(
        "",
        "",
        chunks,
        reward,
        "success" if reward > 0 else "failure",
        instruction=messages[0].text,
    )


def turn_text(message: Message) -> str:
    """Return what an assistant writes for a message: its thoughts, its text, its calls."""
    text = message.text
    if message.reasoning:
        thoughts = message.reasoning.strip("\n")
        text = f"<think>\n{thoughts}\n</think>\n\n{text.lstrip(chr(10))}"
    for number, call in enumerate(message.calls):
        separator = "\n" if text or number else ""
        text += (
            f'{separator}<tool_call>\n{{"name": "{call.name}", "arguments": {call.arguments}}}'
            "\n</tool_call>"
        )
    return text


def _split_system(messages: Sequence[Message]) -> tuple[str | None, list[Message]]:
    if messages and messages[0].role == "system":
        return messages[0].text, list(messages[1:])
    return None, list(messages)


# -- in pieces: a chunk for each turn
# -------------------------------------------------------------------------------------------------


def _render_pieces(messages: Sequence[Message], chat: Chat) -> list[Chunk]:
    chunks: list[Chunk] = []
    read: list[Message] = []
    for number, message in enumerate(messages, 1):
        if message.role != "assistant":
            read.append(message)
            continue
        prompt_ids = _opening(read, chat) if not chunks else _answer(read, chat)
        chunks.append(_chunk(message, prompt_ids, chat, number))
        read = []
    while chunks[-1].kind == "context":  # nothing after it is learned
        chunks.pop()
    return chunks


def _chunk(message: Message, prompt_ids: list[int], chat: Chat, number: int) -> Chunk:
    text = turn_text(message)
    if not text.strip():
        raise UnfitError(f"message {number}, an assistant's, is empty")
    ids = chat.turn(text)
    if chat.tokenizer.decode(ids[:-1]) not in (text, unicodedata.normalize("NFC", text)):
        raise UnfitError(f"the tokens of message {number} do not spell its text")
    arguments = [call.parsed() for call in message.calls]
    first = message.calls[0] if message.calls else None
    return Chunk(
        prompt_ids,
        ids,
        [0.0] * len(ids),
        text=text,
        tool_call=None if first is None else {"name": first.name, "arguments": arguments[0] or {}},
        status="malformed" if None in arguments else "ok",
        kind="imitation" if message.learned else "context",
    )


def _opening(read: Sequence[Message], chat: Chat) -> list[int]:
    """Return the ids before the first turn; the first message is a user's."""
    first, *others = read
    ids = chat.open(first.text)
    return ids if not others else [*_cut(ids, chat), *_after(others, chat)]


def _answer(read: Sequence[Message], chat: Chat) -> list[int]:
    """Return the ids between two turns."""
    newline = chat.tokenizer.encode("\n")
    return [*newline, *_after(read, chat)]


def _after(read: Sequence[Message], chat: Chat) -> list[int]:
    """Return the ids of messages up to the header of a turn."""
    ids: list[int] = []
    for role, group in itertools.groupby(read, lambda message: message.role):
        texts = [message.text for message in group]
        if role == "tool":
            newline = chat.tokenizer.encode("\n")
            ids += _cut(chat.observe(texts), chat)[len(newline) :]
            continue
        for text in texts:
            ids += _message_ids(role, text, chat.tokenizer)
    return [*ids, *_header(chat.tokenizer)]


def _cut(ids: list[int], chat: Chat) -> list[int]:
    """Return ids without the header of a turn at their end."""
    return ids[: -len(_header(chat.tokenizer))]


def _header(tokenizer: Tokenizer) -> list[int]:
    return tokenizer.join([tokenizer.im_start, "assistant\n"])


def _message_ids(role: str, text: str, tokenizer: Tokenizer) -> list[int]:
    return tokenizer.join([tokenizer.im_start, f"{role}\n{text}", tokenizer.im_end, "\n"])


# -- as a whole
# -------------------------------------------------------------------------------------------------


def _render_whole(messages: Sequence[Message], chat: Chat) -> list[int]:
    """Return the ids of the conversation, each message encoded as one text."""
    tokenizer = chat.tokenizer
    ids = chat.begin()
    for role, group in itertools.groupby(messages, lambda message: message.role):
        if role == "tool":
            ids += _results_ids([message.text for message in group], tokenizer)
            continue
        for message in group:
            if role == "assistant":
                turn = tokenizer.encode_turn(f"assistant\n{turn_text(message)}")
                ids += [tokenizer.im_start, *turn, tokenizer.im_end, *tokenizer.encode("\n")]
            else:
                ids += _message_ids(role, message.text, tokenizer)
    return ids


def _results_ids(texts: Sequence[str], tokenizer: Tokenizer) -> list[int]:
    opening = tokenizer.id_of("<tool_response>")
    closing = tokenizer.id_of("</tool_response>")
    parts: list[str | int] = [tokenizer.im_start, "user"]
    for text in texts:
        parts += ["\n", opening, "\n", text, "\n", closing]
    return tokenizer.join([*parts, tokenizer.im_end, "\n"])
