"""Dialogue: a conversation in messages, as agents send it, on the token ids of a session.

An agent sends all messages so far with each call. The dialogue keeps them as a tree: tools and
system text at the root, one node a message. An answer that comes back is the sampled chunk, byte
for byte, whatever the agent changed in its spelling (`counts` says how often which change was
seen), and only the messages after it are tokenised. They are context, never trained, as is every
message that nobody sampled in its place. So the record is what the engine sampled in the contexts
that it sampled it in, also where an agent edits, compacts or forks its history.

A call that repeats the newest one of its place is a retry and gets the same answer, as long as the
conversation did not go on from there; it is no branch. Two calls that are open at the same time are
two calls. Where the agent's client says whether it retries, that decides. A call whose caller went
away goes on, and its retry waits for it.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

from rome.agent.message_tree import (
    Limits,
    Node,
    OpenCall,
    answer_to_repeat,
    call_to_join,
    retrieve,
    root_of,
    wait_for,
)
from rome.agent.messages import (
    Message,
    Reply,
    Tool,
    differences,
    following_ids,
    opening_ids,
    read_answer,
    readable,
)
from rome.agent.session import ContextFull, Session, SessionError
from rome.data.tree import ROOT, Edge
from rome.model.tokenizer import Chat

MAX_NODES = 8192  # messages of one episode, those of all branches together
MAX_CHARACTERS = 32 << 20  # of them
LONG = 1 << 14  # characters; a longer text is tokenised beside the event loop
# Composing letters with their marks leaves at least one of so many characters.
MOST_COMPOSED = 4
Reason = Literal["messages", "truncated", "context_full", "too_many_messages", "closed"]


class DialogueError(ValueError):
    """A call that cannot be answered, through no fault of the engine.

    Attributes:
      reason: "messages" (there are none, the last one is an assistant's, or a limit is no limit),
        "truncated" (it goes on from an answer that was cut at its limit), "context_full",
        "too_many_messages" (or too long ones) or "closed" (the episode is over).
    """

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclasses.dataclass(frozen=True)
class Question:
    """A call whose place in the tree is known.

    Attributes:
      messages: the whole conversation, as the agent sent it.
      tools: their schemas.
      parent: number of the chunk that it goes on from, or ROOT.
      prompt_ids: of the messages since then, up to where the model begins to write.
      edge: how the answer follows.
      max_new_tokens: of the answer; None for no limit of its own.
      temperature: of the answer; None for none of its own.
    """

    messages: Sequence[Message]
    tools: Sequence[Tool]
    parent: int
    prompt_ids: list[int]
    edge: Edge
    max_new_tokens: int | None
    temperature: float | None


class Answered(NamedTuple):
    """An answer: the number of its chunk, what it says, and whether a call in it is malformed."""

    chunk: int
    message: Message
    is_malformed: bool


class Dialogue:
    """The conversations of one episode.

    Args:
      session: owns the tokens.
      chat: of the model. Tools and system text come from the messages of a call, not from it.
      max_nodes: messages that the episode may have, over all branches.

    Attributes:
      counts: "calls", "retries", "context_answers" (assistants' messages that nobody sampled in
        their place), answers that came back "exact", and those that came back with other "spaces",
        without "thoughts", with other "call_ids" or "arguments" written in another way.
    """

    def __init__(self, session: Session, chat: Chat, *, max_nodes: int = MAX_NODES) -> None:
        self.session = session
        self.counts: collections.Counter[str] = collections.Counter()
        self._tokenizer = chat.tokenizer
        self._max_nodes = max_nodes
        self._nodes = 0
        self._characters = 0
        self._roots: dict[tuple[str, str], Node] = {}
        self._tasks: set[asyncio.Task[Reply]] = set()
        self._followers: collections.Counter[int] = collections.Counter()  # by chunk, open ones too
        self._first_root: Node | None = None  # of the first call
        self._is_closed = False

    async def complete(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool] = (),
        *,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        retry: bool | None = None,
        edge: Edge | None = None,
        admit: Callable[[], None] = lambda: None,
    ) -> Reply:
        """Answer a conversation.

        Args:
          messages: all of it. A first system message belongs to the root.
          tools: their schemas.
          max_new_tokens: of the answer; None is the session's.
          temperature: of the answer; None is the session's.
          retry: whether the client says that it repeats a call; None: it does not say.
          edge: how the answer follows what was there; None finds it out (`_edge`).
          admit: called before a new answer is begun; what it raises ends the call. Retries are
            answered without.

        Raises:
          DialogueError: the call cannot be answered; `reason` says why.
          EngineError: the engine did not answer.
        """
        if self._is_closed:
            raise DialogueError("closed", "this episode is over; begin another one")
        node = self._find(messages, tools)
        limits = (max_new_tokens, temperature)
        if retry is not False:
            answered = answer_to_repeat(node, limits)
            if answered is not None:
                self.counts["retries"] += 1
                return answered
        call = None if retry is False else call_to_join(node, limits, retry)
        if call is None:
            admit()
            self.counts["calls"] += 1
            call = self._begin(node, messages, tools, limits, edge)
        else:
            self.counts["retries"] += 1
        return await wait_for(call)

    async def answer(self, question: Question) -> Answered:
        """Sample the answer to a question, and read it; a subclass may get it elsewhere.

        Raises:
          SessionError: the question cannot be answered.
          EngineError: the engine did not answer.
        """
        number = await self.session.sample(
            question.parent,
            question.prompt_ids,
            edge=question.edge,
            max_new_tokens=question.max_new_tokens,
            temperature=question.temperature,
        )
        return Answered(number, *read_answer(self.session.chunks[number].text, number))

    @property
    def open_calls(self) -> int:
        """Return the number of answers that are being sampled."""
        return sum(not task.done() for task in self._tasks)

    def count_tokens(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> int:
        """Return how many tokens a conversation has that nobody sampled; it is not recorded.

        Raises:
          DialogueError: it cannot fit into the context.
        """
        self._require_room(_size(messages, tools), ROOT)
        rest = list(messages)
        has_system = bool(rest) and rest[0].role == "system"
        system = readable(rest.pop(0).content) if has_system else None
        chat = Chat(self._tokenizer, _shown(tools), system)
        return len(opening_ids(rest, chat))

    async def aclose(self) -> None:
        """End the episode: calls that are still open are cancelled."""
        self._is_closed = True
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # -- the tree
    # ---------------------------------------------------------------------------------------------

    def _find(self, messages: Sequence[Message], tools: Sequence[Tool]) -> Node:
        """Return the node of the last message; those that are new are added."""
        system = ""
        rest = list(messages)
        if rest and rest[0].role == "system":
            system = rest.pop(0).content
        if not rest or rest[-1].role == "assistant":
            raise DialogueError(
                "messages",
                "the conversation needs a last message that is not an assistant's; add the user's"
                " or a tool's",
            )
        node = self._root(tools, system, has_system=len(rest) < len(messages))
        for message in rest:
            node = self._below(node, message)
        return node

    def _root(self, tools: Sequence[Tool], system: str, *, has_system: bool) -> Node:
        key = (json.dumps(list(tools), sort_keys=True), repr((has_system, system)))
        if key not in self._roots:
            self._count_node(len(key[0]) + len(system))
            chat = Chat(self._tokenizer, _shown(tools), readable(system) if has_system else None)
            self._roots[key] = Node(None, None, chat)
        return self._roots[key]

    def _below(self, node: Node, message: Message) -> Node:
        """Return the node of a message that follows another one."""
        if message.role == "assistant":
            answer = self._answer_of(node, message)
            if answer is not None:
                return answer
        found = node.children.get(message.key)
        if found is None:
            self._count_node(message.size)
            self.counts["context_answers"] += message.role == "assistant"
            found = node.children[message.key] = Node(message, node)
        return found

    def _answer_of(self, node: Node, message: Message) -> Node | None:
        """Return the sampled answer that came back as `message`: the one that changed least."""
        found = []
        for place, answer in enumerate(node.answers):
            assert answer.message is not None
            changes = differences(answer.message, message)
            if changes is not None:
                found.append((len(changes), place, changes))
        if not found:
            return None
        _, place, changes = min(found, key=lambda one: one[:2])
        answer = node.answers[place]
        if changes not in answer.changes:
            answer.changes.add(changes)
            self.counts.update(changes or ["exact"])
        if answer.reply is not None and answer.reply.finish_reason == "length":
            raise DialogueError(
                "truncated",
                f"the answer of {answer.reply.completion_tokens} tokens was cut at its limit, so"
                " the conversation cannot go on from it; ask again with more tokens",
            )
        answer.is_followed = True
        return answer

    def _count_node(self, characters: int) -> None:
        if self._nodes >= self._max_nodes:
            raise DialogueError(
                "too_many_messages",
                f"this episode has {self._max_nodes} messages, the most that it may have",
            )
        if self._characters + characters > MAX_CHARACTERS:
            raise DialogueError(
                "too_many_messages",
                f"the messages of this episode have more than {MAX_CHARACTERS} characters",
            )
        self._nodes += 1
        self._characters += characters

    # -- one call
    # ---------------------------------------------------------------------------------------------

    def _begin(
        self,
        node: Node,
        messages: Sequence[Message],
        tools: Sequence[Tool],
        limits: Limits,
        edge: Edge | None,
    ) -> OpenCall:
        """Start to get an answer below a node."""
        parent, since = self._since(node)
        if edge is None:
            edge = self._edge(node, parent)
        self._first_root = self._first_root or root_of(node)
        self._followers[parent] += 1
        question = Question(messages, tools, parent, [], edge, *limits)
        answering = self._reply_to(question, node, since)
        call = OpenCall(asyncio.get_running_loop().create_task(answering), limits)
        node.open.append(call)
        self._tasks.add(call.task)
        call.task.add_done_callback(self._tasks.discard)
        call.task.add_done_callback(lambda _: node.open.remove(call))
        call.task.add_done_callback(retrieve)
        return call

    async def _reply_to(self, question: Question, node: Node, since: list[Message]) -> Reply:
        try:
            chat = root_of(node).chat
            assert chat is not None
            prompt_ids = await self._prompt_ids(question, since, chat)
            question = dataclasses.replace(question, prompt_ids=prompt_ids)
            answered = await self.answer(question)
        except BaseException as error:
            self._followers[question.parent] -= 1
            if isinstance(error, SessionError):
                reason: Reason = "context_full" if isinstance(error, ContextFull) else "messages"
                raise DialogueError(reason, str(error)) from error
            raise
        limits = (question.max_new_tokens, question.temperature)
        return self._record(node, answered, limits)

    def _record(self, node: Node, answered: Answered, limits: Limits) -> Reply:
        """Put an answer into the tree, and what it says into its chunk."""
        number, message, is_malformed = answered
        chunk = self.session.chunks[number]
        is_truncated = self.session.is_truncated(number)
        if is_malformed:
            chunk.status = "malformed"
        if message.tool_calls:
            first = message.tool_calls[0]
            chunk.tool_call = {"name": first.name, "arguments": json.loads(first.arguments)}
        finish: Literal["stop", "tool_calls"] = "tool_calls" if message.tool_calls else "stop"
        completion_tokens = len(chunk.action_ids)
        reply = Reply(
            text=message.content,
            reasoning=message.reasoning,
            tool_calls=message.tool_calls,
            finish_reason="length" if is_truncated else finish,
            prompt_tokens=self.session.tokens_of(number) - completion_tokens,
            completion_tokens=completion_tokens,
            chunk=number,
        )
        self._nodes += 1
        answer = Node(message, node, chunk=number, reply=reply, limits=limits)
        node.answers.append(answer)
        return reply

    def _since(self, node: Node) -> tuple[int, list[Message]]:
        """Return the chunk that a node's conversation goes on from, and the messages since then."""
        since: list[Message] = []
        place = node
        while place.message is not None and place.chunk is None and place.above is not None:
            since.append(place.message)
            place = place.above
        since.reverse()
        if place.chunk is None:
            return ROOT, since
        chunk = self.session.chunks[place.chunk]
        if not chunk.observation:
            chunk.observation = "\n".join(message.content for message in since)
        return place.chunk, since

    def _require_room(self, characters: int, parent: int) -> None:
        """Raise DialogueError where so many characters after a chunk cannot fit."""
        room = self.session.max_context - self.session.tokens_of(parent)
        fits = characters <= MOST_COMPOSED * self._tokenizer.longest * max(room, 0)
        if not fits and self.session.max_context:  # 0: without a limit
            raise DialogueError(  # in the session's words, so that every player notes the same
                "context_full", f"no room left in a context of {self.session.max_context} tokens"
            )

    async def _prompt_ids(
        self, question: Question, since: Sequence[Message], chat: Chat
    ) -> list[int]:
        """Return the ids of the messages since a chunk, up to where the model begins to write.

        Raises:
          DialogueError: they do not fit, or the chat template cannot write them.
        """
        parent = question.parent
        is_whole = parent == ROOT  # tools and system text included
        characters = _size(question.messages, question.tools) if is_whole else _size(since)
        self._require_room(characters, parent)

        def encode() -> list[int]:
            if parent == ROOT:
                return opening_ids(since, chat)
            return following_ids(self.session.chunks[parent].action_ids, since, chat)

        try:
            return await asyncio.to_thread(encode) if characters > LONG else encode()
        except (ValueError, RecursionError) as error:
            said = "they are nested too deep" if isinstance(error, RecursionError) else str(error)
            raise DialogueError("messages", f"the messages cannot be shown: {said}") from error

    def _edge(self, node: Node, parent: int) -> Edge:
        """Return how a call follows what was there.

        Going on from where another call went on is a rewind. A new context with the tools and the
        system text of the first one is a compaction of it; with others, a sub-agent.
        """
        if self._first_root is None:
            return "continuation"
        if parent != ROOT:
            return "rewind" if self._followers[parent] else "continuation"
        return "compaction" if root_of(node) is self._first_root else "subagent"


def _size(messages: Sequence[Message], tools: Sequence[Tool] = ()) -> int:
    """Return the characters of messages and of tools."""
    return sum(message.size for message in messages) + (
        len(json.dumps(list(tools))) if tools else 0
    )


def _shown(tools: Sequence[Tool]) -> list[Any]:
    """Return the schemas of tools as the chat template may show them."""
    shown: list[Any] = json.loads(readable(json.dumps(list(tools), ensure_ascii=False)))
    return shown
