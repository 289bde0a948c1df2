"""Trajectories that a config names: examined before the first step; held-out ones are scored."""

from __future__ import annotations

import json
import math
import pathlib
from typing import Any

import ml_collections
import numpy as np

from rome.data.batch import IMITATION
from rome.data.formats.records import Library, Limits, open_library
from rome.data.index import fingerprint
from rome.data.packing import microbatches, pack
from rome.data.relevance import MASKS, mask_turns
from rome.files import find_shipped, write_atomically
from rome.model.tokenizer import Tokenizer
from rome.stages.players import wait_until_visible
from rome.train.display import Display
from rome.train.state import TrainState
from rome.train.step import Learner
from rome.train.team import Team
from rome.train.workdir import ConfigError


def open_records(
    config: ml_collections.ConfigDict,
    tokenizer: Tokenizer,
    workdir: pathlib.Path,
    display: Display,
    team: Team,
) -> Library:
    """Return the records of `config.trajectories`, and show how many there are.

    Process 0 examines all of them at the first start and leaves WORKDIR/records.npz, and what it
    sets aside in WORKDIR/set_aside.jsonl. The other processes, and later starts, only look whether
    the files are still the same.

    Raises:
      ConfigError: a place is not there, or has nothing to train on.
    """
    index = workdir / "records.npz"

    def read() -> Library:
        try:
            return open_library(
                config.trajectories,
                tokenizer,
                Limits(config.max_context, config.chunks_per_row),
                config.held_out_share,
                settings=_tokenizer_key(config.tokenizer),
                should_stop=team.wants_to_stop,
                index=index,
                writes_index=team.leads,
            )
        except (ValueError, OSError) as error:
            raise ConfigError(f"config.trajectories: {error}") from error

    def lead() -> tuple[Library, None]:
        display.note(f"reading the records of {config.trajectories}")
        library = read()
        lines = [json.dumps(entry) + "\n" for entry in library.set_aside]
        write_atomically(workdir / "set_aside.jsonl", "".join(lines))
        return library, None

    library, _ = team.share_part("records", lead)
    wait_until_visible(team, "index of the records", [index])
    if library is None:
        library = read()
    team.require_same("records", library.digest)
    display.note(_describe(library, workdir))
    return library


def score_held_out_records(
    learner: Learner, state: TrainState, library: Library, config: ml_collections.ConfigDict
) -> dict[str, Any]:
    """Measure how many bits the model needs for a learned token of held-out trajectories.

    Returns:
      {"bits_per_token": float, "tokens": number of these tokens}.

    Raises:
      ConfigError: none of their turns is learned, so there is nothing to measure.
    """
    count = min(config.eval_trajectories, len(library.held_out))
    rows = pack(
        # The same turns whatever the run masks, so that runs can be compared.
        [mask_turns(library.held_out[number], MASKS) for number in range(count)],
        row_length=config.row_length,
        chunks_per_row=config.chunks_per_row,
        gamma=1.0,
        failure_reward=0.0,
        purpose="sft",
    )
    batches = microbatches(rows, config.rows_per_microbatch)
    nats = 0.0
    tokens = 0
    for batch, logp_BT in zip(batches, learner.score(state.params, batches), strict=True):
        learned_BT = batch.kind_BT() == IMITATION
        nats -= float(np.sum(logp_BT, where=learned_BT, dtype=np.float64))
        tokens += int(np.count_nonzero(learned_BT))
    if not tokens:
        raise ConfigError(
            f"none of the turns of the {count} held-out records of {config.trajectories} is"
            f" learned: all are masked ({', '.join(MASKS)}). Raise --config.held_out_share or"
            " --config.eval_trajectories, which needs another --workdir."
        )
    return {"bits_per_token": nats / math.log(2) / tokens, "tokens": tokens}


def _describe(library: Library, workdir: pathlib.Path) -> str:
    text = f"{library.count} records to train on, {len(library.held_out)} held out"
    if library.set_aside:
        first = library.set_aside[0]
        text += (
            f"; {len(library.set_aside)} set aside, such as {first['file']} {first['record']}:"
            f" {first['reason']} (all: {workdir / 'set_aside.jsonl'})"
        )
    return text


def _tokenizer_key(directory: str) -> str:
    """Return a hash of the files of a tokenizer, which decide the ids."""
    folder = find_shipped(directory)
    return fingerprint(sorted(path for path in folder.iterdir() if "token" in path.name), "")
