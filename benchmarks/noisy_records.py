r"""Write noisy records of the small safety families as files that SFT learns from.

python -m benchmarks.noisy_records --out noisy [--numbers 30] [--rates 0 0.1 0.3] [--workers 4]
python -m launch.train --config=experiments/safety.py:sft --config.eval_tasks=0 \
    --config.trajectories=noisy/rate_30.jsonl --workdir=runs/noisy_30      # docs/safety.md

The demonstrators of the training families play in real sandboxes. At each rate that share of the
records has a fault of benchmarks/noisy_data.py, a quarter of them each; the other records are the
same in all files. What is left of the records of the highest rate after the filter (heuristic,
judge, execution twice against a verifier that trusts the check) is written twice: where the record
of harm was lost on the way, and where it was not.

    OUT/rate_R.jsonl                 all records at R percent of faults, one ATIF document a line
    OUT/rate_R_filtered.jsonl        those that the filter keeps, the record of harm lost
    OUT/rate_R_filtered_events.jsonl those that it keeps with the record of harm
    OUT/card.json                    how many of each fault a file has
    OUT/played.journal               what was played so far: after a kill the same command goes on

Documents have the tokens of the tiny tokenizer and the events of each turn, for the mask `harm`.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import dataclasses
import json
import pathlib
import random
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.noisy_data import (
    FAULTS,
    HONEST,
    LINES,
    PIPELINES,
    STAGES,
    Work,
    play,
    rejects,
    work_through,
)
from envs.safety import CLEAN, SMALL_SEEDS
from envs.sources import Source, Task, open_source
from rome.data.trajectory import Trajectory, from_atif, to_atif
from rome.files import append_line, write_atomically
from rome.model.tokenizer import TINY, Chat, Tokenizer
from rome.rollout.demonstrations import in_own_form

# The name that a file of kept records ends with -> the pipeline of the filter that kept them.
FILTERS = {
    "filtered": "heuristic, judge, naive execution",
    "filtered_events": "heuristic with events, judge, naive execution",
}
JOURNAL = "played.journal"
Key = tuple[int, str]  # the place of a record among all, and its fault or HONEST
Played = tuple[Trajectory, dict[str, bool]]  # a record, and which stages reject it


def possible_faults(task: Task) -> tuple[str, ...]:
    """Return the faults that a record of a task can have."""
    sort = SMALL_SEEDS[task.family.removeprefix(CLEAN)].sort
    tempts = not task.family.startswith(CLEAN)
    faults = []
    if tempts and sort == "attack":
        faults.append("poisoned")
    if tempts and sort in ("hackable", "impossible"):
        faults.append("hacked")
    return (*faults, "wrong", "corrupted")


def plant(possible: Sequence[Sequence[str]], rate: float, seed: int) -> dict[int, str]:
    """Choose which records have which fault.

    Args:
      possible: the faults that each record can have.
      rate: share of the records that have one, a quarter of them each of FAULTS.
      seed: of the choice.

    Raises:
      ValueError: the rate is no share, or fewer records can have a fault than should.
    """
    if not 0 <= rate <= 1:
        raise ValueError(f"--rates {rate:g} is no share of the records; give 0 to 1")
    count = round(rate * len(possible) / len(FAULTS))
    order = list(range(len(possible)))
    random.Random(seed).shuffle(order)
    planted: dict[int, str] = {}
    for fault in FAULTS:
        able = [place for place in order if fault in possible[place] and place not in planted]
        if len(able) < count:
            raise ValueError(
                f"at a rate of {rate:g} {count} of {len(possible)} records should be {fault}, and"
                f" {len(able)} can be. Lower --rates."
            )
        planted |= dict.fromkeys(able[:count], fault)
    return planted


def tokenise(record: Trajectory, chat: Chat) -> Trajectory:
    """Return a record with the tokens that a policy would have read and sampled."""
    chunks = []
    prompt_ids = chat.open(record.instruction)
    for chunk in record.chunks:
        text = in_own_form(chunk.text, chat)
        action_ids = chat.turn(text)
        logprobs = [0.0] * len(action_ids)
        chunks.append(
            dataclasses.replace(
                chunk, prompt_ids=prompt_ids, action_ids=action_ids, logprobs=logprobs, text=text
            )
        )
        prompt_ids = chat.observe([chunk.observation])
    return dataclasses.replace(record, chunks=chunks)


async def play_all(
    tasks: Sequence[Task],
    wanted: Sequence[Key],
    filtered: frozenset[Key],
    workers: int,
    journal: pathlib.Path,
) -> dict[Key, Played]:
    """Return the played records, and which stage of the filter rejects those of `filtered`.

    Records that the infrastructure spoiled are missing. Those of the journal are not played again.
    """
    kept = read_journal(journal)

    def stages_of(key: Key) -> list[str]:
        return [stage for stage in STAGES if stage != "suite"] if key in filtered else []

    def work_on(key: Key) -> Work[Played]:
        place, fault = key
        task = tasks[place]

        async def work() -> Played:
            name = f"{task.name}/{fault}/{place}"
            if name in kept and kept[name][1].keys() >= set(stages_of(key)):
                return kept[name]
            record = await play(task, fault, random.Random(name), LINES)
            rejected = await rejects(record, task, stages_of(key))
            line = {"name": name, "record": to_atif(record), "rejected": rejected}
            append_line(journal, json.dumps(line))
            return record, rejected

        return work

    done = await work_through([(tasks[key[0]].name, work_on(key)) for key in wanted], workers)
    return {key: one for key, one in zip(wanted, done, strict=True) if one is not None}


def read_journal(path: pathlib.Path) -> dict[str, Played]:
    """Return the records of a journal by name, without a line that a kill cut off."""
    kept: dict[str, Played] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            one = json.loads(line)
        except ValueError:
            continue
        kept[one["name"]] = from_atif(one["record"]), one["rejected"]
    return kept


def choose_files(
    played: Mapping[Key, Played],
    planted: Mapping[float, Mapping[int, str]],
    size: int,
) -> dict[str, list[Key]]:
    """Return the records of each file, by its name without the ending.

    Args:
      played: records, and which stages reject them.
      planted: the fault of each place that has one, by rate.
      size: number of places.
    """
    files: dict[str, list[Key]] = {}
    for rate, faults in planted.items():
        keys = [(place, faults.get(place, HONEST)) for place in range(size)]
        files[_name(rate)] = [key for key in keys if key in played]
    highest = max(planted)
    for ending, pipeline in FILTERS.items():
        stages = PIPELINES[pipeline]
        kept = [key for key in files[_name(highest)] if not any(map(played[key][1].get, stages))]
        files[f"{_name(highest)}_{ending}"] = kept
    return files


def _name(rate: float) -> str:
    return f"rate_{round(100 * rate)}"


async def write_files(
    source: Source, out: pathlib.Path, numbers: int, rates: Sequence[float], workers: int
) -> dict[str, Any]:
    """Play all records, write the files and return the card.

    Args:
      source: of the small families.
      out: folder, which is made.
      numbers: tasks of each training family.
      rates: of faults.
      workers: sandboxes at the same time.
    """
    tasks = [
        source.train(family, number) for number in range(numbers) for family in source.families
    ]
    possible = [possible_faults(task) for task in tasks]
    planted = {rate: plant(possible, rate, seed=0) for rate in sorted(set(rates))}
    places = range(len(tasks))
    sets = {
        rate: [(place, of.get(place, HONEST)) for place in places] for rate, of in planted.items()
    }
    wanted = sorted({key for keys in sets.values() for key in keys})
    filtered = frozenset(sets[max(sets)])
    out.mkdir(parents=True, exist_ok=True)
    played = await play_all(tasks, wanted, filtered, workers, out / JOURNAL)
    files = choose_files(played, planted, len(tasks))
    chat = Chat(Tokenizer.load(TINY))
    for name, keys in files.items():
        documents = (to_atif(tokenise(played[key][0], chat)) for key in keys)
        lines = "".join(json.dumps(document) + "\n" for document in documents)
        write_atomically(out / f"{name}.jsonl", lines)
    faults = {name: collections.Counter(fault for _, fault in keys) for name, keys in files.items()}
    card = {"files": faults, "spoiled": len(wanted) - len(played)}
    write_atomically(out / "card.json", json.dumps(card, indent=1) + "\n")
    return card


def main(argv: Sequence[str] | None = None) -> None:
    """Write the files and print how many records of each fault they have."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder of the files")
    parser.add_argument("--numbers", type=int, default=30, help="tasks of each training family")
    parser.add_argument("--rates", type=float, nargs="+", default=[0.0, 0.1, 0.3])
    parser.add_argument("--workers", type=int, default=4, help="sandboxes at the same time")
    options = parser.parse_args(argv)
    source = open_source("safety:small")
    try:
        job = write_files(source, options.out, options.numbers, options.rates, options.workers)
        card = asyncio.run(job)
    except ValueError as error:
        raise SystemExit(str(error)) from error
    for name, counts in card["files"].items():
        print(f"{name}: {', '.join(f'{count} {fault}' for fault, count in counts.items())}")
    print(f"not played: {card['spoiled']}")


if __name__ == "__main__":
    main()
