"""The user of a dialogue: a script that answers, deterministic, so that an episode can be replayed.

It states one request after another, says a fact only when it is asked for it, and ends the dialogue
when its requests are through. What it hears is any text; what it understands is words. There is no
model behind it: two agents who say the same get the same answers.
"""

from __future__ import annotations

import dataclasses
import re

# a longer message is not read: pouring the whole database over the user tells nothing
MAX_MESSAGE_CHARS = 600
# that an agent may name in a dialogue: one that names more is guessing, and has told no date
MAX_DATES = 12
_WORD = re.compile(r"[a-z]+")
_QUESTION = re.compile(r"[^.!?\n]*\?")
_DATE = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")
_CLOSING = re.compile(
    r"\b(any|some)thing else\b|\b(further|more) (help|assistance|questions?)\b|\bhelp you"
    r" with\b|\bassist you\b"
)
_CONSENT = frozenset(
    ["confirm", "confirmed", "proceed", "agree", "ok", "okay", "shall", "should", "may", "want"]
)


@dataclasses.dataclass(frozen=True)
class Fact:
    """Something that the user knows. `words`: a question with one of them asks for it."""

    words: tuple[str, ...]
    answer: str


@dataclasses.dataclass(frozen=True)
class UserScript:
    """requests: what the user says, one after the other; the first opens the dialogue. facts: what
    it says only when asked. consent: what it says to a request for consent.
    """

    requests: tuple[str, ...]
    facts: tuple[Fact, ...] = ()
    consent: str = "Yes, please do that."


@dataclasses.dataclass
class User:
    """A user in the middle of a dialogue.

    `heard`: the messages that it read, which is where facts have to be told.
    """

    script: UserScript
    stage: int = 0
    heard: list[str] = dataclasses.field(default_factory=list)
    over: bool = False

    def hear(self, message: str) -> str:
        """The answer to a message; "" where the dialogue is over.

        A question is answered: with the facts that its words ask for, else with consent where it
        asks for that, else with not knowing. Anything else, and the question whether there is
        anything else, is taken for "done": the next request comes, or the end.
        """
        if len(message) > MAX_MESSAGE_CHARS:
            return (
                f"That is too long for me ({len(message)} characters). Please tell me in at most"
                f" {MAX_MESSAGE_CHARS}."
            )
        self.heard.append(message)
        asked = " ".join(_QUESTION.findall(message.lower()))
        words = set(_WORD.findall(asked))
        if known := [fact.answer for fact in self.script.facts if words & set(fact.words)]:
            return " ".join(known)
        if asked and not _CLOSING.search(asked):
            return (
                self.script.consent
                if words & _CONSENT
                else "I cannot say more about that. Please go on with what I told you."
            )
        self.stage += 1
        if self.stage < len(self.script.requests):
            return self.script.requests[self.stage]
        self.over = True
        return ""


def is_told(fact: str, messages: list[str]) -> bool:
    """Whether a message has the fact as whole words or numbers: 12 is not told by 2012, 112 or
    12.5.

    Case, commas and currency signs do not matter.

    tau2's communicate_info is a plain substring of the message without commas; this asks for more,
    so that no year tells a price.
    """
    if (
        _DATE.fullmatch(fact)
        and len({date for message in messages for date in _DATE.findall(message)}) > MAX_DATES
    ):
        return False
    pattern = re.compile(rf"(?<![a-z0-9.\-]){re.escape(_plain(fact))}(?![a-z0-9\-]|\.[0-9])")
    return any(pattern.search(_plain(message)) for message in messages)


def _plain(message: str) -> str:
    return " ".join(message.lower().replace(",", "").replace("$", "").split())


def facts(**answers: tuple[str, str]) -> tuple[Fact, ...]:
    """facts(zip=("zip postcode", "My ZIP is 12345.")): words that ask, and the answer."""
    return tuple(Fact(tuple(words.split()), answer) for words, answer in answers.values())


__all__ = ["MAX_MESSAGE_CHARS", "Fact", "User", "UserScript", "facts", "is_told"]
