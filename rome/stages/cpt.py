"""Continual pre-training: next-token prediction on plain text, without engines or sandboxes."""

from __future__ import annotations

import pathlib
from typing import Any

import ml_collections

from rome.data.text import Corpus, read_corpus, text_batches
from rome.stages.base import StageContext, TrainingStage
from rome.stages.evaluate import score_held_out_text
from rome.stages.limits import check_text_limits
from rome.stages.players import wait_until_visible
from rome.stages.stream import BatchStream
from rome.train.display import Display
from rome.train.loop import StepData
from rome.train.state import TrainState
from rome.train.team import Team


class CPTStage(TrainingStage):
    """A stage that learns from plain text and is evaluated in bits per byte of held-out text."""

    def __init__(self, context: StageContext) -> None:
        super().__init__(context)
        check_text_limits(self.config, self.model_config)
        self.corpus = open_corpus(self.config, self.display, self.team, self.workdir)
        self._stream = BatchStream(self._open_batches)

    def collect(self, step: int, state: TrainState) -> StepData:
        return self.data_of_rows(step, self._stream.draw(step))

    def write_evaluation(self, step: int, state: TrainState) -> None:
        documents = self.corpus.held_out
        count = min(self.config.eval_documents, len(documents))
        outcomes = score_held_out_text(
            self.learner,
            state,
            [documents[index] for index in range(count)],
            self.tokenizer,
            row_length=self.config.row_length,
            chunks_per_row=self.config.chunks_per_row,
            rows_per_microbatch=self.config.rows_per_microbatch,
        )
        self.team.share(f"evaluation at {step}", lambda: self.write_outcomes(step, outcomes))

    def host_state(self, step: int) -> dict[str, Any]:
        return {
            "stream": self.stream_position(step, self._stream),
            "text": self.corpus.digest,
        }

    def load_host_state(self, step: int, host: dict[str, Any]) -> None:
        if host.get("text") != self.corpus.digest:  # a position in another text means nothing
            raise ValueError(
                f"the text under {self.config.text or 'the standard library'} is not what the"
                f" checkpoint of step {step} was trained on. Bring it back, or give another"
                " --workdir."
            )
        self._stream.go_to(host["stream"])

    def _open_batches(self) -> Any:
        """Return an endless stream of batches of the training documents."""
        return text_batches(
            self.corpus.training,
            self.tokenizer,
            rows=self.config.rows,
            row_length=self.config.row_length,
            chunks_per_row=self.config.chunks_per_row,
            seed=self.config.seed,
            own=self.own_rows.fed,
        )


def open_corpus(
    config: ml_collections.ConfigDict, display: Display, team: Team, workdir: pathlib.Path
) -> Corpus:
    """Return the documents of the config's text, and show how many there are.

    Process 0 reads all of them at the first start and leaves WORKDIR/text.npz. The other processes,
    and later starts, only look whether the files are still the same.
    """
    index = workdir / "text.npz"

    def read() -> Corpus:
        return read_corpus(
            config.text,
            config.held_out_share,
            team.wants_to_stop,
            index,
            writes_index=team.leads,
        )

    def lead() -> tuple[Corpus, None]:
        return read(), None

    corpus, _ = team.share_part("text", lead)
    wait_until_visible(team, "index of the text", [index])
    if corpus is None:
        corpus = read()
    team.require_same("text", corpus.digest)
    text = f"text: {corpus.count} documents to train on, {len(corpus.held_out)} held out"
    if corpus.skipped:
        more = ", ..." if len(corpus.skipped) > 1 else ""
        text += (
            f"; {len(corpus.skipped)} skipped, empty or not UTF-8 text ({corpus.skipped[0]}{more})"
        )
    display.note(text)
    return corpus
