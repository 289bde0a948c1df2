"""Tasks on log files: the loudest services, busy hours, slow requests, bursts of failures."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import NamedTuple

from envs.tasks.made.draft import Case, Draft, run_program

SERVICES = ["auth", "billing", "cart", "mailer", "queue", "search", "stock"]
USERS = ["ann", "ben", "cai", "dee", "eli", "fay", "gus", "hal"]
LEVELS = ("DEBUG", "INFO", "WARN", "ERROR")
LINES = 60  # of a hidden log
CASES = 8


class Entry(NamedTuple):
    """One line of a log: second of the day, level, service, user, milliseconds."""

    second: int
    level: str
    service: str
    user: str
    took: int

    def __str__(self) -> str:
        hours, rest = divmod(self.second, 3600)
        clock = f"{hours:02}:{rest // 60:02}:{rest % 60:02}"
        return f"2024-03-05 {clock} {self.level} {self.service} user={self.user} took={self.took}ms"


class Question(NamedTuple):
    """A question about a log: its words, a program that answers it, and the answer."""

    words: str
    language: str
    oracle: str
    answer: Callable[[list[Entry]], list[str]]


def make(seed: int) -> Draft:
    """Return the task of a seed."""
    rng = random.Random(f"logs/{seed}")
    kind = list(QUESTIONS)[seed % len(QUESTIONS)]
    question = QUESTIONS[kind](rng)
    program = "logs.sh" if question.language == "shell" else "logs.py"
    run = "bash" if question.language == "shell" else "python3"
    logs = [_log(rng, LINES) for _ in range(CASES)] + [[]]
    cases = [
        Case(
            run_program(question.language, program, "app.log"),
            files={"app.log": _text(log)},
            stdout="\n".join(question.answer(log)),
        )
        for log in logs
    ]
    sample = _log(rng, 14)
    shown = "\n".join(question.answer(sample)) or "(nothing)"
    return Draft(
        name=f"logs/{kind}-{seed}",
        domain="logs",
        family=f"logs-{kind}",
        language=question.language,
        instruction=f"""\
Write /app/{program}. `{run} {program} app.log` reads a log such as /app/app.log, whose lines \
are in the order of time and look like

    {sample[0]}

(date, time, level, service, user, duration), and prints to its standard output {question.words}

For the log in /app that is

```
{shown}
```

The program is run on other logs of one day, among them an empty one.""",
        program=program,
        oracle=question.oracle,
        cases=cases,
        files={"app.log": _text(sample)},
        origin={"seed": seed},
    )


def _log(rng: random.Random, lines: int) -> list[Entry]:
    users = rng.sample(USERS, 5)
    seconds = sorted(rng.randrange(6 * 3600, 15 * 3600) for _ in range(lines))
    # Half of the lines come in bursts.
    seconds = sorted(
        second if rng.random() < 0.4 else seconds[0] + 10 * rng.randrange(90) + rng.randrange(2)
        for second in seconds
    )
    return [
        Entry(
            second,
            rng.choices(LEVELS, (1, 3, 2, 3))[0],
            rng.choice(SERVICES),
            rng.choice(users),
            rng.choice((20, 21, 40, 41, 80, 81, rng.randrange(1, 900))),
        )
        for second in seconds
    ]


def _text(log: list[Entry]) -> str:
    return "".join(f"{entry}\n" for entry in log)


def _loudest(rng: random.Random) -> Question:
    """Count the lines of a level by service or user."""
    levels = rng.sample(LEVELS, rng.choice((1, 2)))
    by_user = rng.random() < 0.5
    top = rng.choice((3, 4))
    least = rng.choice((2, 4, 5))
    field = "user" if by_user else "service"

    def answer(log: list[Entry]) -> list[str]:
        counts: dict[str, int] = {}
        for entry in log:
            if entry.level in levels:
                key = entry.user if by_user else entry.service
                counts[key] = counts.get(key, 0) + 1
        rows = sorted((-count, key) for key, count in counts.items() if count >= least)
        return [f"{-count} {key}" for count, key in rows[:top]]

    key = "substr($5, 6)" if by_user else "$4"
    test = " || ".join(f'$3 == "{level}"' for level in levels)
    oracle = (
        f"awk '{test} {{ count[{key}]++ }}\n"
        f"  END {{ for (key in count) if (count[key] >= {least}) print count[key], key }}'"
        ' "$1" |\n'
        f"  sort -k1nr -k2 | head -n {top}\n"
    )
    words = (
        f"the {top} {field}s with the most lines of level {' or '.join(levels)}: one a line as"
        f" `COUNT NAME`, the largest count first, equal counts by name. A {field} with fewer than"
        f" {least} such lines is left out."
    )
    return Question(words, "shell", oracle, answer)


def _hours(rng: random.Random) -> Question:
    """Sum up the lines of each hour or service."""
    by_hour = rng.random() < 0.6
    level = rng.choice(LEVELS)
    bound = rng.choice((20, 40, 80))
    figure = rng.choice(("sum", "max"))

    def answer(log: list[Entry]) -> list[str]:
        rows: dict[str, list[int]] = {}
        for entry in log:
            if entry.level != level:
                key = f"{entry.second // 3600:02}" if by_hour else entry.service
                rows.setdefault(key, []).append(entry.took)
        found = []
        for key in sorted(rows):
            slow = sum(took > bound for took in rows[key])
            total = sum(rows[key]) if figure == "sum" else max(rows[key])
            found.append(f"{key} {len(rows[key])} {slow} {total}")
        return found

    key = "part[1]" if by_hour else "$4"
    parts = '    split($2, part, ":")\n' if by_hour else ""
    total = "total[key] += took" if figure == "sum" else "if (took > total[key]) total[key] = took"
    oracle = (
        f'awk \'$3 != "{level}" {{\n{parts}    key = {key}\n    took = int(substr($6, 6))\n'
        f"    lines[key]++\n    {total}\n    slow[key] += (took > {bound})\n  }}\n"
        '  END { for (key in lines) print key, lines[key], slow[key], total[key] }\' "$1" |'
        " sort\n"
    )
    group = "hour of the day (two digits)" if by_hour else "service"
    what = "sum of their durations" if figure == "sum" else "longest of their durations"
    words = (
        f"one line for each {group} that has lines of another level than {level}, in order:"
        f" `{'HOUR' if by_hour else 'SERVICE'} LINES SLOW TOTAL`. Lines of level {level} do not"
        f" count. SLOW is the number of lines that took more than {bound} ms, TOTAL the {what}, in"
        " milliseconds."
    )
    return Question(words, "shell", oracle, answer)


def _bursts(rng: random.Random) -> Question:
    """Find users or services with several lines of a level in a short time."""
    count = rng.choice((3, 4))
    window = rng.choice((60, 120, 300))
    level = rng.choice(("ERROR", "INFO"))
    by_user = rng.random() < 0.6

    def answer(log: list[Entry]) -> list[str]:
        times: dict[str, list[int]] = {}
        for entry in log:
            if entry.level == level:
                times.setdefault(entry.user if by_user else entry.service, []).append(entry.second)
        found = []
        for key in sorted(times):
            seconds = times[key]
            runs = [
                index
                for index in range(len(seconds) - count + 1)
                if seconds[index + count - 1] - seconds[index] <= window
            ]
            if runs:
                start = seconds[runs[0]]
                clock = f"{start // 3600:02}:{start % 3600 // 60:02}:{start % 60:02}"
                found.append(f"{key} {clock} {len(runs)}")
        return found

    key = 'words[4].split("=")[1]' if by_user else "words[3]"
    oracle = f"""\
import sys

times = {{}}
for line in open(sys.argv[1]):
    words = line.split()
    if words[2] == "{level}":
        hours, minutes, seconds = map(int, words[1].split(":"))
        second = hours * 3600 + minutes * 60 + seconds
        times.setdefault({key}, []).append((second, words[1]))
for key in sorted(times):
    seen = times[key]
    runs = [old for old, new in zip(seen, seen[{count - 1}:]) if new[0] - old[0] <= {window}]
    if runs:
        print(key, runs[0][1], len(runs))
"""
    name = "user" if by_user else "service"
    words = (
        f"each {name} with a burst, by name: `NAME TIME BURSTS`. A burst is a run of {count}"
        f" successive lines of level {level} of one {name} (lines of others may lie between) whose"
        f" first and last are at most {window} seconds apart; runs may overlap. TIME is that of the"
        " first line of the first burst (HH:MM:SS), BURSTS their number."
    )
    return Question(words, "python", oracle, answer)


def _silences(rng: random.Random) -> Question:
    """Find the longest times without a line."""
    top = rng.choice((1, 2, 3))
    least = rng.choice((120, 300, 600))
    level = rng.choice(LEVELS)

    def answer(log: list[Entry]) -> list[str]:
        seen = [entry.second for entry in log if entry.level != level]
        gaps = [(old - new, old) for old, new in itertools.pairwise(seen)]
        rows = sorted(gap for gap in gaps if -gap[0] >= least)[:top]
        return [
            f"{-gap} {start // 3600:02}:{start % 3600 // 60:02}:{start % 60:02}"
            for gap, start in rows
        ]

    oracle = f"""\
awk '$3 != "{level}" {{
    split($2, part, ":")
    second = part[1] * 3600 + part[2] * 60 + part[3]
    if (seen && second - last >= {least}) print second - last, clock
    last = second
    clock = $2
    seen = 1
  }}' "$1" | sort -k1nr -k2 | head -n {top}
"""
    words = (
        f"the {top} longest silences, longest first, equal ones by time: `SECONDS TIME`. A silence"
        f" is the time between two successive lines, those of level {level} left out; TIME is that"
        f" of its first line. Silences shorter than {least} seconds are left out."
    )
    return Question(words, "shell", oracle, answer)


QUESTIONS: dict[str, Callable[[random.Random], Question]] = {
    "loudest": _loudest,
    "hours": _hours,
    "bursts": _bursts,
    "silences": _silences,
}
