"""From a conversation to a trajectory: ids of the chat template, the assistant's to be learned.

Everything that an assistant did not write (system, tools, users, results of tools, headers of
turns) is prompt. The ids of a turn are those of its text and of `<|im_end|>`, as the model would
have sampled them after the header. Earlier turns stay as they were, thoughts included, as in a
rollout.

Two checks keep out what would be learned in another form than it is read: the pieces joined must be
the ids of the whole text, in which merges may cross the border between a header and a turn; and the
ids of a turn must spell the turn's text.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Sequence

from rome.data.formats.conversation import Call, Conversation, Message, UnfitError
from rome.data.trajectory import Chunk, Trajectory
from rome.model.tokenizer import Chat, Tokenizer


def render(conversation: Conversation, tokenizer: Tokenizer) -> Trajectory:
    """Return the trajectory of a conversation up to the last turn that is learned.

    Raises:
      UnfitError: it cannot be rendered, or the checks fail; the message says why.
      ValueError: nothing can be rendered with this tokenizer's chat template.
    """
    messages = list(conversation.messages)
    spoken = [message for message in messages if message.role != "system"]
    if not spoken or spoken[0].role != "user":
        role = spoken[0].role if spoken else "nobody"
        raise UnfitError(f"it begins with {role}; the first message after the system's is a user's")
    if not any(message.role == "assistant" and message.learned for message in messages):
        raise UnfitError("no message of an assistant is there to be learned")
    chat = Chat(tokenizer, list(conversation.tools) or None)
    try:
        chunks = _render_turns(messages, chat)
    except UnfitError:
        raise
    except ValueError as error:  # of the template
        raise UnfitError(str(error)) from error
    reward = 1.0 if conversation.reward is None else conversation.reward
    ending = "success" if reward > 0 else "failure"
    return Trajectory("", "", chunks, reward, ending, instruction=spoken[0].text)


def _render_turns(messages: Sequence[Message], chat: Chat) -> list[Chunk]:
    """Return a chunk for each turn of the assistant, up to the last that is learned."""
    chunks: list[Chunk] = []
    read: list[dict[str, str]] = []
    for number, message in enumerate(messages, 1):
        if message.role != "assistant":
            read.append({"role": message.role, "content": message.text})
            continue
        if chunks:
            chunks[-1].observation = "\n".join(answer["content"] for answer in read)
        prompt_ids = chat.reply(read) if chunks else chat.render(read, hands_over=True)
        chunks.append(_chunk(message, prompt_ids, chat, f"message {number}"))
        read = []
    while chunks[-1].kind == "context":
        chunks.pop()
    return chunks


def _chunk(message: Message, prompt_ids: list[int], chat: Chat, what: str) -> Chunk:
    text = _turn_text(message, chat)
    if not text.strip():
        raise UnfitError(f"{what}, an assistant's, is empty")
    ids = chat.turn(text)
    _check_spells(text, ids, chat.tokenizer, what)
    _check_border(prompt_ids, ids, chat.tokenizer, what)
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


def _turn_text(message: Message, chat: Chat) -> str:
    """Return what an assistant writes for a message: its thoughts, its text, its calls."""
    text = message.text
    if message.calls:
        parsed = [(call.name, call.parsed()) for call in message.calls]
        whole = [(name, arguments) for name, arguments in parsed if arguments is not None]
        if len(whole) == len(parsed):
            text = chat.say(text, whole)
        else:
            text = "\n".join([text, *map(_broken_call, message.calls)]).removeprefix("\n")
    if message.reasoning:
        thoughts = message.reasoning.strip("\n")
        text = f"<think>\n{thoughts}\n</think>\n\n{text.lstrip(chr(10))}"
    return text


def _broken_call(call: Call) -> str:
    """Return a call whose arguments are no JSON object; it is read and never learned."""
    name = json.dumps(call.name, ensure_ascii=False)
    return f'<tool_call>\n{{"name": {name}, "arguments": {call.arguments}}}\n</tool_call>'


def _check_spells(text: str, ids: list[int], tokenizer: Tokenizer, what: str) -> None:
    """Raise UnfitError where the ids of a turn are not its text again, up to normalisation.

    A template's header may already hold the `<think>` that the text begins with, or the thoughts
    that it lacks end first.
    """
    spelt = tokenizer.decode(ids[:-1])
    wanted = (text, unicodedata.normalize("NFC", text))
    if not any(one.endswith(spelt) or spelt.endswith(one) for one in wanted):
        raise UnfitError(f"the tokens of {what} do not spell its text")


def _check_border(prompt_ids: list[int], ids: list[int], tokenizer: Tokenizer, what: str) -> None:
    """Raise UnfitError where header and turn have other ids as one text.

    Only there can the whole differ from its pieces: all other pieces end with control tokens.
    """
    start = len(prompt_ids) - prompt_ids[::-1].index(tokenizer.im_start)
    header = prompt_ids[start:]
    together = tokenizer.encode_turn(tokenizer.decode([*header, *ids[:-1]]))
    if together != [*header, *ids[:-1]]:
        raise UnfitError(
            f"as a whole it has other tokens than in pieces: {what} begins with blanks that merge"
            " with its header"
        )
