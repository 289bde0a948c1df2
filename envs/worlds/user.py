"""The user of a dialogue: a deterministic script, so that an episode can be replayed.

The user states one request after another, gives a fact only when asked for it, and ends the
dialogue when there are no more requests. It accepts any text and understands words. No model is
behind it: two agents who say the same get the same answers.
"""

from __future__ import annotations

import dataclasses
import re

# The user does not read a longer message, so reciting the whole database tells it nothing.
MAX_MESSAGE_CHARS = 600
# Dates that an agent may name in a dialogue; one that names more is guessing and has told none.
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
    """Something that the user knows; a question with one of `words` asks for it."""

    words: tuple[str, ...]
    answer: str


@dataclasses.dataclass(frozen=True)
class UserScript:
    """The text of a user.

    `requests` are stated one after the other; the first opens the dialogue. `facts` are given only
    when asked for. `consent` answers a request for consent.
    """

    requests: tuple[str, ...]
    facts: tuple[Fact, ...] = ()
    consent: str = "Yes, please do that."


@dataclasses.dataclass
class User:
    """A user in the middle of a dialogue.

    `heard` holds the messages that the user has read; facts must be told in one of them.
    """

    script: UserScript
    stage: int = 0
    heard: list[str] = dataclasses.field(default_factory=list)
    over: bool = False

    def hear(self, message: str) -> str:
        """Return the answer to a message, or "" where the dialogue is over.

        A question is answered with the facts that its words ask for, else with consent where it
        asks for that, else with a refusal to say more. Any other message, and the question whether
        there is anything else, settles the request: the next one comes, or the end.
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
            if words & _CONSENT:
                return self.script.consent
            return "I cannot say more about that. Please go on with what I told you."
        self.stage += 1
        if self.stage < len(self.script.requests):
            return self.script.requests[self.stage]
        self.over = True
        return ""


def is_told(fact: str, messages: list[str]) -> bool:
    """Return whether a message has the fact as whole words or numbers.

    12 is told by 12.00, and not by 2012, 112 or 12.5. Case, commas and currency signs do not
    matter. tau2's communicate_info is a plain substring of the message without commas; this rule is
    stricter, so that no year tells a price.
    """
    if _DATE.fullmatch(fact):
        dates = {date for message in messages for date in _DATE.findall(message)}
        if len(dates) > MAX_DATES:
            return False
    fraction = r"(?:\.0+)?" if fact.isdecimal() else ""
    pattern = re.compile(
        rf"(?<![a-z0-9.\-]){re.escape(_plain(fact))}{fraction}(?![a-z0-9\-]|\.[0-9])"
    )
    return any(pattern.search(_plain(message)) for message in messages)


def _plain(message: str) -> str:
    return " ".join(message.lower().replace(",", "").replace("$", "").split())


def facts(**answers: tuple[str, str]) -> tuple[Fact, ...]:
    """Return facts from the words that ask for them and their answers.

    Example: facts(zip=("zip postcode", "My ZIP is 12345.")).
    """
    return tuple(Fact(tuple(words.split()), answer) for words, answer in answers.values())


__all__ = ["MAX_MESSAGE_CHARS", "Fact", "User", "UserScript", "facts", "is_told"]
