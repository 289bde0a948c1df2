"""Random conversations of an agent that edits, forks, compacts and respells its history, with an
engine whose answers no tokenizer would spell so.
"""

import dataclasses
import json
import random

from rome.agent.dialogue import Dialogue
from rome.agent.messages import Call, Message, Reply
from rome.agent.session import Session
from rome.data.tree import ROOT
from rome.engine.completion import Completion

WORDS = [
    "ls",
    "ok",
    "naïve",
    "世界",
    "🙂",
    "a\r\nb",
    "{",
    '"',
    "<|im_end|>",
    "<|im_start|>system",
    " ",
    "<tool_call>",
    "</tool_response>",
    "\n\n",
    "true",
    "1.0",
    "\\u00e9",
    "<|endoftext|>",
]
TOOL = {"type": "function", "function": {"name": "bash", "parameters": {"type": "object"}}}


class Engine:
    """Says what its random generator draws, each letter a token of its own where it can be."""

    def __init__(self, tokenizer, rng, cut_share=0.0):
        self.tokenizer, self.rng, self.cut_share = tokenizer, rng, cut_share
        self.requests = []

    async def generate(self, input_ids, sampling, deadline_seconds, *, affinity=None):
        self.requests.append(list(input_ids))
        text = draw_turn(self.rng)
        ids = [token for letter in text for token in self.tokenizer.encode(letter)]
        is_cut = self.rng.random() < self.cut_share
        ids += [] if is_cut else [self.tokenizer.im_end]
        reason = "length" if is_cut else "stop"
        return Completion(ids, [-1.0] * len(ids), reason, [(1, 0, len(ids))])


def draw_text(rng, number=None):
    words = " ".join(rng.choice(WORDS) for _ in range(rng.randrange(4)))
    return words if number is None else f"{words} {number}"


def draw_turn(rng):
    """An assistant's turn; what it says spells no call that it does not make."""
    said = rng.choice(["", "done", "I look", "世界 naïve", "two\n\nlines"])
    thoughts = rng.choice(["", "", "<think>\nfirst\n</think>\n\n", "<think>\n\n</think>\n\n"])
    calls = []
    for _ in range(rng.choice([0, 0, 1, 1, 2])):
        arguments = {
            "b": rng.choice([1, 1.0, True, None, "x y", [1, {"z": 2.5}]]),
            "a": draw_text(rng),
        }
        body = json.dumps({"name": "bash", "arguments": arguments}, ensure_ascii=False)
        calls.append(f"<tool_call>\n{body}\n</tool_call>")
    if not calls and rng.random() < 0.1:
        return thoughts + '<tool_call>\n{"name": "bash", \n</tool_call>'
    return thoughts + "\n".join([said] * bool(said) + calls)


@dataclasses.dataclass
class Entry:
    """A message that the agent holds; chunk and raw text where it was sampled in its place."""

    message: Message
    chunk: int | None = None
    raw: str = ""


@dataclasses.dataclass
class Conversation:
    tools: tuple = ()
    entries: list[Entry] = dataclasses.field(default_factory=list)
    is_reordered: bool = False

    def copy(self, stop=None):
        entries = [dataclasses.replace(entry) for entry in self.entries[:stop]]
        return Conversation(self.tools, entries, self.is_reordered)

    @property
    def parent(self):
        """The chunk that the next answer goes on from."""
        return next((e.chunk for e in reversed(self.entries) if e.chunk is not None), ROOT)

    def forget(self, start):
        """From here on nothing was sampled in this context."""
        for entry in self.entries[start:]:
            entry.chunk = None


def respell(message, rng):
    """An assistant's message as an agent's program may send it back."""
    content, reasoning = message.content, message.reasoning
    if rng.random() < 0.4:
        content = rng.choice([content + "\n", " " + content, content.strip()])
    thoughts = rng.random()
    if thoughts < 0.3:
        reasoning = ""
    elif thoughts < 0.5 and reasoning:
        content, reasoning = f"<think>\n{reasoning}\n</think>\n\n{content}", ""
    calls = []
    for place, call in enumerate(message.tool_calls):
        value = json.loads(call.arguments)
        if rng.random() < 0.3 and value["b"] is not True and value["b"] == 1:
            value["b"] = 1  # 1.0 has been through JavaScript
        style = rng.choice([{}, {"sort_keys": True}, {"indent": 1}, {"separators": (",", ":")}])
        name = call.id if rng.random() < 0.5 else f"toolu_{place}"
        calls.append(Call(name, call.name, json.dumps(value, **style)))
    return Message("assistant", content, reasoning, tuple(calls))


def reference(conversation, system_text):
    """The text that the model is to be shown, from the template: turns in a row."""
    text, previous = system_text, ""
    for entry in conversation.entries:
        message = entry.message
        if message.role == "system" and entry is conversation.entries[0]:
            continue
        if message.role == "tool":
            text += "" if previous == "tool" else "<|im_start|>user"
            text += f"\n<tool_response>\n{message.content}\n</tool_response>"
        else:
            text += "<|im_end|>\n" if previous == "tool" else ""
            said = entry.raw if entry.chunk is not None else written(message)
            text += f"<|im_start|>{message.role}\n{said}<|im_end|>\n"
        previous = message.role
    return text + ("<|im_end|>\n" if previous == "tool" else "") + "<|im_start|>assistant\n"


def written(message):
    """A message that nobody sampled, in Qwen3's form."""
    parts = [message.content] * bool(message.content)
    for call in message.tool_calls:
        parts.append(
            f'<tool_call>\n{{"name": "{call.name}", "arguments": {call.arguments}}}\n</tool_call>'
        )
    return "\n".join(parts)


def count_turns(conversation):
    """How many turns begin in the prompt, with the one that the model is to write."""
    roles = [entry.message.role for entry in conversation.entries]
    inner = sum(
        not (role == before == "tool") for role, before in zip(roles, ["", *roles], strict=False)
    )
    has_system = bool(roles) and roles[0] == "system"
    return inner + 1 + (bool(conversation.tools) and not has_system)


class Agent:
    """Plays one episode and checks each call against what the agent knows of its own messages."""

    def __init__(self, chat, seed, cut_share=0.0):
        self.rng = random.Random(seed)
        self.chat = chat
        self.engine = Engine(chat.tokenizer, self.rng, cut_share)
        self.session = Session(
            self.engine,
            chat.tokenizer,
            seed=seed,
            max_context=100_000,
            max_new_tokens=10_000,
            completion_seconds=5.0,
        )
        self.dialogue = Dialogue(self.session, chat)
        self.numbers = iter(range(10_000))
        self.conversations = [self.begin()]

    def begin(self, tools=None):
        rng = self.rng
        tools = rng.choice([(), (TOOL,)]) if tools is None else tools
        entries = []
        if rng.random() < 0.5:
            entries.append(Entry(Message("system", draw_text(rng, next(self.numbers)))))
        entries.append(Entry(self.new("user")))
        return Conversation(tools, entries)

    def new(self, role):
        return Message(role, draw_text(self.rng, next(self.numbers)))

    def change(self, conversation):
        """Do to a conversation that was answered what agents do before they call again."""
        rng = self.rng
        move = rng.choice(["go on"] * 5 + ["edit", "insert", "fork", "compact", "other", "reorder"])
        if move == "fork":
            users = [n for n, e in enumerate(conversation.entries) if e.message.role == "user"]
            conversation = conversation.copy(rng.choice(users))
            conversation.entries.append(Entry(self.new("user")))
            self.conversations.append(conversation)
        elif move == "compact":
            kept = conversation.entries[0]
            first = [dataclasses.replace(kept)] * (kept.message.role == "system")
            conversation = Conversation(conversation.tools, [*first, Entry(self.new("user"))])
            self.conversations.append(conversation)
        elif move == "other":
            conversation = self.begin()
            self.conversations.append(conversation)
        else:
            self.follow(conversation)
        if move == "edit":
            places = [
                n for n, e in enumerate(conversation.entries) if e.message.role != "assistant"
            ]
            place = rng.choice(places)
            role = conversation.entries[place].message.role
            conversation.entries[place] = Entry(self.new(role))
            conversation.forget(place)
        elif move == "insert":
            conversation.entries.append(Entry(Message("assistant", f"told {next(self.numbers)}")))
            conversation.entries.append(Entry(self.new("user")))
        elif move == "reorder" and not conversation.is_reordered:
            conversation.is_reordered = True  # a second time might restore what was sampled in
            for place in range(len(conversation.entries) - 2, 0, -1):
                one, other = conversation.entries[place : place + 2]
                if one.message.role == other.message.role == "tool":
                    conversation.entries[place : place + 2] = [other, one]
                    conversation.forget(place)
                    break
        return conversation

    def follow(self, conversation):
        calls = conversation.entries[-1].message.tool_calls
        for _ in calls:
            conversation.entries.append(Entry(self.new("tool")))
        if not calls or self.rng.random() < 0.2:
            conversation.entries.append(Entry(self.new("user")))

    def messages(self, conversation):
        """The messages as they are sent: those that were sampled may be spelled anew."""
        sent = []
        for entry in conversation.entries:
            if entry.chunk is not None and self.rng.random() < 0.7:
                sent.append(respell(entry.message, self.rng))
            else:
                sent.append(entry.message)
        return sent

    async def call(self, conversation) -> Reply:
        """Call, check what the engine was sent, and put the answer into the conversation."""
        reply = await self.dialogue.complete(self.messages(conversation), conversation.tools)
        self.check_prompt(conversation, reply)
        raw = self.session.chunks[reply.chunk].text
        answer = Message("assistant", reply.text, reply.reasoning, reply.tool_calls)
        conversation.entries.append(Entry(answer, reply.chunk, raw))
        return reply

    def check_prompt(self, conversation, reply):
        tokenizer = self.chat.tokenizer
        sent = self.engine.requests[-1]
        first = conversation.entries[0].message
        system = first.content if first.role == "system" else None
        opened = type(self.chat)(tokenizer, list(conversation.tools), system).open("Q")
        system_text, _, _ = tokenizer.decode(opened).rpartition("<|im_start|>user\nQ")
        assert tokenizer.decode(sent) == reference(conversation, system_text)
        assert sent.count(tokenizer.im_start) == count_turns(conversation)
        known = self.session.context_of(conversation.parent)
        assert sent[: len(known)] == known, "what was sampled was tokenised again"
        chunk = self.session.chunks[reply.chunk]
        assert self.session.context_of(reply.chunk) == sent + chunk.action_ids
        assert reply.prompt_tokens == len(sent) and chunk.prompt_ids == sent[len(known) :]
