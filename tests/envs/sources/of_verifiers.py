"""Environments as authors write them for the package `verifiers`."""

import verifiers as vf
from datasets import Dataset


def exact(completion, answer, **_):
    """Return 1 where the last message is the answer."""
    return float(completion[-1]["content"].strip() == answer)


def load_environment():
    """Return an environment of one turn: additions."""
    rows = [
        {"question": f"What is {one} + {other}?", "answer": str(one + other)}
        for one in range(6)
        for other in range(6)
    ]
    rubric = vf.Rubric(funcs=[exact])
    return vf.SingleTurnEnv(dataset=Dataset.from_list(rows), rubric=rubric, system_prompt="Add.")


def with_tools():
    """Return an environment with a tool."""

    def double(x: int) -> int:
        """Double a number."""
        return 2 * x

    rows = [{"question": f"Double {one}.", "answer": str(2 * one)} for one in range(12)]
    rubric = vf.Rubric(funcs=[exact])
    return vf.ToolEnv(dataset=Dataset.from_list(rows), rubric=rubric, tools=[double], max_turns=4)
