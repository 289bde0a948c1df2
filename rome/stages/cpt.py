"""Continual pre-training: next-token prediction on plain text, without engines or sandboxes."""

from __future__ import annotations

from typing import Any

import ml_collections

from rome.data.text import Corpus, read_corpus, text_batches
from rome.stages.base import StageContext, TrainingStage
from rome.stages.evaluate import score_held_out_text
from rome.train.display import Display
from rome.train.loop import StepData
from rome.train.state import TrainState


class CPTStage(TrainingStage):
    """A stage that learns from plain text and is evaluated in bits per byte of held-out text."""

    def __init__(self, context: StageContext) -> None:
        super().__init__(context)
        self.corpus = open_corpus(self.config, self.display)
        self._stream: Any = None  # of batches, with a position

    def collect(self, step: int, state: TrainState) -> StepData:
        if self._stream is None:
            self._stream = self._open_stream()
        return self.data_of_rows(step, next(self._stream))

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
        stream = None if self._stream is None else self._stream.get_state()
        return {"stream": stream, "text": self.corpus.digest}

    def load_host_state(self, step: int, host: dict[str, Any]) -> None:
        if host.get("text") != self.corpus.digest:  # a position in another text means nothing
            raise ValueError(
                f"the text under {self.config.text or 'the standard library'} is not what the"
                f" checkpoint of step {step} was trained on. Bring it back, or give another"
                " --workdir."
            )
        if host["stream"] is not None:
            self._stream = self._open_stream()
            self._stream.set_state(host["stream"])

    def _open_stream(self) -> Any:
        """Return an endless stream of batches of the training documents."""
        batches = text_batches(
            self.corpus.training,
            self.tokenizer,
            rows=self.config.rows,
            row_length=self.config.row_length,
            chunks_per_row=self.config.chunks_per_row,
            seed=self.config.seed,
        )
        return iter(batches)


def open_corpus(config: ml_collections.ConfigDict, display: Display) -> Corpus:
    """Return the documents of the config's text, and show how many there are."""
    corpus = read_corpus(config.text, config.held_out_share)
    text = f"text: {len(corpus.training)} documents to train on, {len(corpus.held_out)} held out"
    if corpus.skipped:
        more = ", ..." if len(corpus.skipped) > 1 else ""
        text += (
            f"; {len(corpus.skipped)} skipped, empty or not UTF-8 text ({corpus.skipped[0]}{more})"
        )
    display.note(text)
    return corpus
