"""The agents' work where a model does it: ideas, drafts and audits, by an endpoint.

What a model writes is data: it is parsed strictly, runs only in sandboxes, and passes the same
gates as everything else.
"""

from __future__ import annotations

import dataclasses
import json
import re
import time
from typing import Any

from envs.rock import SandboxError
from envs.tasks.made import Case, Draft
from envs.tasks.made.draft import IMAGES, INTERPRETERS
from envs.tasks.made.prove import outputs_of
from rome.agent.endpoint import ChatEndpoint, EndpointError
from rome.agent.session import ContextFull
from rome.data.seeds import derive_seed
from rome.synth.build import UNUSABLE, Built
from rome.synth.explore import Seed

DOMAINS = ("data", "logs", "text", "files", "dates", "parsing", "algorithms", "formats")
MAX_FIELD = 20_000
_FENCE = re.compile(r"```(?:json)?\s*(.*?)```", re.DOTALL)
_IDEA = """\
Name {count} small, precise command-line programming tasks of the domain "{domain}", each solved \
by one script that reads standard input and prints to standard output. Answer with a JSON list of \
texts of at most 200 characters."""
_DRAFT = """\
Make a task of this idea: {idea}

Answer with one JSON object: "language" ({languages}), "instruction" (complete and unambiguous: \
formats, order, edge cases), "solution" (a correct program that reads standard input and \
prints the result) and "inputs" (at least 8 different texts for its standard input, edge cases \
included)."""
_AUDIT = """\
Task:
{instruction}

Reference solution:
{oracle}

Does the solution do exactly what the task says, and does the task say everything that one needs \
to know? Answer with one JSON object: "ok" (true or false) and "reason" (one sentence)."""


@dataclasses.dataclass(frozen=True)
class Endpoints:
    """The model of the agents.

    Attributes:
      chat: for Explore, Instance Builder and Review.
      tokens_per_unit: that one unit of work may cost at most, its prompts included.
      api_key: of the Trajectory agent's own connection.
    """

    chat: ChatEndpoint
    tokens_per_unit: int = 32_768
    api_key: str | None = dataclasses.field(default=None, repr=False)


class AnswerError(ValueError):
    """The model's answer is not of the form that was asked for.

    Attributes:
      tokens: that the answer cost all the same.
    """

    def __init__(self, message: str, tokens: int = 0) -> None:
        super().__init__(message)
        self.tokens = tokens


async def ask_json(endpoints: Endpoints, prompt: str, seed: int) -> tuple[Any, int]:
    """Return the JSON value of an answer, and the tokens that it cost.

    Raises:
      AnswerError: the answer holds no JSON, or cost more than the budget.
      EndpointError, ContextFull: there is no answer.
    """
    answer = await endpoints.chat.ask(
        [{"role": "user", "content": prompt}], seed=seed, max_tokens=endpoints.tokens_per_unit // 2
    )
    tokens = sum(
        amount
        for name in ("prompt_tokens", "completion_tokens")
        if isinstance(amount := answer.usage.get(name), int)
    )
    text = answer.choice["message"].get("content") or ""
    match = _FENCE.search(text)
    try:
        return json.loads(match[1] if match else text), tokens
    except (ValueError, RecursionError) as error:
        raise AnswerError(f"no JSON: {text[:100]!r}", tokens) from error


async def think_of_ideas(
    endpoints: Endpoints, count: int, seed: int, trace: Any, out: Any
) -> list[Seed]:
    """Return seeds of kind "idea", `count` of each domain at most; those of the trace are kept."""
    seeds = []
    for domain in DOMAINS:
        entry = trace.done("explore", domain)
        if entry is None:
            began = time.monotonic()
            fault = ""
            ideas: list[str] = []
            tokens = 0
            try:
                prompt = _IDEA.format(count=count, domain=domain)
                answer, tokens = await ask_json(endpoints, prompt, derive_seed(seed, domain))
                ideas = [one[:300] for one in answer if isinstance(one, str)][:count]
            except (EndpointError, ContextFull) as error:
                fault = str(error)
            except AnswerError as error:
                tokens = error.tokens
            except TypeError:  # the answer is no list: there are no ideas in it
                pass
            entry = trace.add(
                "explore", domain, time.monotonic() - began, fault, ideas=ideas, tokens=tokens
            )
        seeds += [Seed("idea", domain, idea) for idea in entry["ideas"]]
    return seeds


async def write_draft_of_idea(
    endpoints: Endpoints, seed: Seed, run_seed: int, isolation: str = "best_available"
) -> Built:
    """Return the draft that a model writes of an idea; what its own solution prints is expected."""
    prompt = _DRAFT.format(idea=seed.value, languages=", ".join(INTERPRETERS))
    tokens = 0
    try:
        answer, tokens = await ask_json(endpoints, prompt, derive_seed(run_seed, seed.id))
        built = await with_expectations(read_draft(seed, answer), isolation)
    except (EndpointError, ContextFull, SandboxError) as error:
        return Built([], str(error), tokens, is_fault=True)
    except UNUSABLE as error:
        return Built([], str(error)[:500], getattr(error, "tokens", 0) or tokens)
    return dataclasses.replace(built, tokens=tokens)


def read_draft(seed: Seed, answer: Any) -> Draft:
    """Return the draft of a model's answer, without expected outputs yet.

    Raises:
      AnswerError: a field is missing, of another kind, or too long.
    """
    if not isinstance(answer, dict):
        raise AnswerError(f"a {type(answer).__name__} instead of an object")
    language = answer.get("language")
    if language not in INTERPRETERS or language not in IMAGES:
        raise AnswerError(f"language {language!r} is none of {', '.join(INTERPRETERS)}")
    for name in ("instruction", "solution"):
        value = answer.get(name)
        if not isinstance(value, str) or not 0 < len(value) <= MAX_FIELD:
            raise AnswerError(f"{name} is no text of 1 to {MAX_FIELD} characters")
    inputs = answer.get("inputs")
    if not isinstance(inputs, list) or len(inputs) < 8:
        raise AnswerError("inputs is no list of 8 texts or more")
    if not all(isinstance(one, str) and len(one) <= MAX_FIELD for one in inputs):
        raise AnswerError(f"an input is no text of at most {MAX_FIELD} characters")
    suffix = {"python": "py", "javascript": "js", "shell": "sh"}[language]
    program = f"answer.{suffix}"
    argv = (*INTERPRETERS[language], f"{{app}}/{program}")
    return Draft(
        name=f"idea/{seed.name}-{derive_seed(seed.id)}",
        domain=seed.name,
        family="idea",
        language=language,
        instruction=f"{answer['instruction']}\n\nWrite the program /app/{program}.",
        program=program,
        oracle=answer["solution"],
        cases=[Case(argv, stdin=one) for one in inputs[:16]],
        origin={"idea": seed.value},
    )


async def with_expectations(draft: Draft, isolation: str) -> Built:
    """Return the draft with what its oracle prints in a sandbox, twice alike, as expectation."""
    first = await outputs_of(draft, isolation)
    if first != await outputs_of(draft, isolation):
        return Built([], "its solution prints different things for the same input")
    if len(set(first)) < len(first) // 2:
        return Built([], "its solution prints the same for most inputs")
    cases = [
        dataclasses.replace(case, stdout=output)
        for case, output in zip(draft.cases, first, strict=True)
    ]
    return Built([dataclasses.replace(draft, cases=cases)])


async def audit_draft(endpoints: Endpoints, draft: Draft) -> tuple[str, int]:
    """Return (why a model rejects a draft, or "", tokens of its answer).

    No answer is no objection: the gates decide.
    """
    prompt = _AUDIT.format(instruction=draft.instruction[:8000], oracle=draft.oracle[:8000])
    try:
        answer, tokens = await ask_json(endpoints, prompt, derive_seed(draft.digest))
    except (AnswerError, EndpointError, ContextFull) as error:
        return "", getattr(error, "tokens", 0)
    if isinstance(answer, dict) and answer.get("ok") is False:
        return f"the audit: {str(answer.get('reason'))[:200]}", tokens
    return "", tokens
