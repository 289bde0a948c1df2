"""Families about numbers in files: the largest or smallest, a sum, the file with the largest."""

from __future__ import annotations

from envs.tasks.terminal.task import Demonstration, Draw, TaskDraft, family, holds, lines


def _distinct(draw: Draw, count: int) -> list[int]:
    """Draw different numbers, either all of one digit or all of two.

    Numbers of two digits are harder to copy for a model that reads digit by digit.
    """
    return draw.rng.sample(draw.rng.choice([range(1, 10), range(10, 100)]), count)


@family("extreme")
def extreme(draw: Draw) -> TaskDraft:
    source = draw.input()
    which = draw.choose("largest", "smallest")
    numbers = _distinct(draw, 4)
    answer = max(numbers) if which == "largest" else min(numbers)

    def demonstrator() -> Demonstration:
        ordered = yield f"sort {'-nr' if which == 'largest' else '-n'} {source}"
        yield f"echo {ordered.split()[0]} > out.txt"

    instruction = draw.choose(
        f"Write the {which} number in {source} to out.txt.",
        f"Which number in {source} is the {which}? Write it to out.txt.",
    )
    return TaskDraft(
        instruction,
        {source: lines(*map(str, numbers))},
        [holds("out.txt", str(answer))],
        demonstrator,
    )


@family("sum")
def add(draw: Draw) -> TaskDraft:
    one, two = draw.names(2)
    a, b = (draw.number(1, 9), draw.number(2, 9))

    def demonstrator() -> Demonstration:
        first, second = (yield f"cat {one} {two}").split()[:2]
        yield f"echo $(({first}+{second})) > out.txt"

    instruction = draw.choose(
        f"Add the numbers in {one} and {two}. Write the sum to out.txt.",
        f"Write the sum of the numbers in {one} and {two} to out.txt.",
    )
    return TaskDraft(
        instruction,
        {one: lines(str(a)), two: lines(str(b))},
        [holds("out.txt", str(a + b))],
        demonstrator,
    )


@family("largest_file")
def largest_file(draw: Draw) -> TaskDraft:
    files = {
        name: lines(str(number))
        for name, number in zip(draw.names(3), _distinct(draw, 3), strict=True)
    }
    answer = max(files, key=lambda name: int(files[name]))

    def demonstrator() -> Demonstration:
        ordered = yield "sort -nr *.txt"
        found = yield f"grep -l {ordered.split()[0]} *.txt"
        yield f"echo {found} > out.txt"

    instruction = draw.choose(
        "Which file has the largest number? Write its name to out.txt.",
        "Write the name of the file with the largest number to out.txt.",
    )
    return TaskDraft(instruction, files, [holds("out.txt", answer)], demonstrator)
