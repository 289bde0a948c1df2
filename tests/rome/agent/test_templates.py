"""Appended ids of a conversation are those of the whole conversation rendered anew: by Qwen3's own
chat template, and by the renderers that other trainers use.
"""

import asyncio
import json
import random

import pytest

from rome.agent.dialogue import Dialogue
from rome.agent.messages import Message
from rome.agent.session import Session
from rome.engine.completion import Completion
from rome.model.tokenizer import Chat, Tokenizer
from tests.paths import shared_data
from tests.rome.agent.talk import TOOL

WORDS = [
    "ls",
    "naïve",
    "世界",
    "🙂",
    "a\r\nb",
    "{",
    '"',
    "\n\n",
    "  ",
    "true",
    "1.0",
    "e\u0301",
    "\t",
]
CONVERSATIONS = 1000


class Speaker:
    """Samples the turns that it is told, spelled as the tokenizer spells them."""

    def __init__(self, chat):
        self.chat, self.said, self.asked = chat, "", []

    async def generate(self, input_ids, sampling, deadline_seconds, *, affinity=None):
        self.asked = list(input_ids)
        ids = self.chat.turn(self.said)
        return Completion(ids, [-1.0] * len(ids), "stop", [(1, 0, len(ids))])


def draw(rng):
    return "x" + "".join(rng.choice(WORDS) for _ in range(rng.randrange(6)))


def draw_answer(rng):
    calls = []
    for _ in range(rng.choice([0, 1, 1, 2, 3])):
        arguments = {draw(rng): rng.choice([1, 2.5, None, True, draw(rng), [draw(rng)]])}
        body = json.dumps({"name": "bash", "arguments": arguments}, ensure_ascii=False)
        calls.append(f"<tool_call>\n{body}\n</tool_call>")
    said = rng.choice(["", "I look", "世界\nnaïve"]) if calls else "done"
    return "\n".join([said] * bool(said) + calls)


def plain(message):
    """The message as the template takes it."""
    calls = [
        {"id": c.id, "type": "function", "function": {"name": c.name, "arguments": c.arguments}}
        for c in message.tool_calls
    ]
    document = {"role": message.role, "content": message.content}
    return document | ({"tool_calls": calls} if calls else {})


async def compare(chat, seed, render):
    """Play a conversation; before each answer the appended ids must be the rendered ones."""
    rng = random.Random(seed)
    engine = Speaker(chat)
    session = Session(
        engine,
        chat.tokenizer,
        seed=seed,
        max_context=100_000,
        max_new_tokens=9000,
        completion_seconds=5.0,
    )
    dialogue = Dialogue(session, chat)
    tools = rng.choice([[], [TOOL], [TOOL, TOOL | {"note": draw(rng)}]])
    messages = [Message("system", draw(rng))] if rng.random() < 0.5 else []
    messages.append(Message("user", draw(rng)))
    turns = 0
    for _ in range(rng.randrange(1, 7)):
        engine.said = draw_answer(rng)
        reply = await dialogue.complete(messages, tools)
        documents = [plain(message) for message in messages]
        assert engine.asked == render(documents, tools), (seed, messages)
        turns += 1
        messages.append(Message("assistant", reply.text, tool_calls=reply.tool_calls))
        messages += [Message("tool", draw(rng)) for _ in reply.tool_calls]
        if not reply.tool_calls:
            messages.append(Message("user", draw(rng)))
    return turns


def compare_all(render, chat):
    turns = sum(asyncio.run(compare(chat, seed, render)) for seed in range(CONVERSATIONS))
    assert turns > 2 * CONVERSATIONS


@pytest.mark.slow
def test_appended_ids_are_those_of_qwen3s_chat_template():
    sandbox = pytest.importorskip("jinja2.sandbox")
    folder = shared_data("qwen3_tokenizer")
    chat = Chat(Tokenizer.load(folder))
    environment = sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    source = json.loads((folder / "tokenizer_config.json").read_text())["chat_template"]
    template = environment.from_string(source)

    def render(messages, tools):
        text = template.render(messages=messages, tools=tools, add_generation_prompt=True)
        return chat.tokenizer.encode(text, allow_special=True)

    compare_all(render, chat)


@pytest.mark.live
@pytest.mark.slow
def test_appended_ids_are_those_of_the_renderers_package():
    qwen3 = pytest.importorskip(
        "renderers.qwen3", reason="needs renderers, tests/requirements-live.txt"
    )
    chat = Chat(Tokenizer.load(shared_data("qwen3_tokenizer")))

    class Theirs:
        """What the package asks of a tokenizer."""

        unk_token_id = None

        def convert_tokens_to_ids(self, token):
            return chat.tokenizer.id_of(token)

        def encode(self, text, add_special_tokens=False):
            return chat.tokenizer.encode(text, allow_special=True)

    renderer = qwen3.Qwen3Renderer(Theirs())

    def render(messages, tools):
        return renderer.render_ids(messages, tools=tools or None, add_generation_prompt=True)

    compare_all(render, chat)
