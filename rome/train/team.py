"""Several processes that train one model, and what they tell each other.

Process 0 leads: it alone plays episodes, evaluates and writes. The others take part in every jitted
function and learn everything else by `share`. Small JSON documents travel through the key-value
store of jax.distributed's coordinator, so no device waits while a step's episodes are played;
arrays never do.

An error that every process raises is handled as in one process. An error that only some processes
can know of ends all of them within seconds, because the others would wait in a collective for ever.
A process that is killed is missed by jax.distributed's heartbeat, which ends the others.

A wish to stop that one process hears is told to all of them. Waits for process 0 end by the Stopped
that it shares, at one place. Before training begins there is nothing to save: a process that reads
its own files leaves at once, and the others with it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

from rome.data.batch import Batch
from rome.stopping import POLL_SECONDS, Stopped, raise_if_stopped

Local = TypeVar("Local")

WAIT_MILLISECONDS = 1000  # of one look at the store; between two of them Python hears signals
WATCH_SECONDS = 0.5
MEET_SECONDS = 3600.0
MEET_POLL_SECONDS = 0.05
WAS_STOPPED = "was stopped before it had anything to save"
# Our keys in the store that JAX and orbax also use.
TURNS = "rome/turns"
NEWS = "rome/news"
ARRIVALS = "rome/arrivals"
PARTS = "rome/parts"
STOPPED_STATUS = 130  # of a process that a signal stopped
LEAVING_SECONDS = 3.0  # process 0 holds the store: it leaves last, after the others read the reason


class LeaderError(RuntimeError):
    """An error that process 0 raised, in another process that does not know its type."""


class Team:
    """The processes of one job, seen from one of them.

    A single process is a team too: then `share` is a call and nothing is sent.

    Args:
      index: the number of this process; 0 leads.
      count: how many processes there are.
      client: the key-value store of jax.distributed; None in a single process.
      stop: whether this process was asked to stop (a signal).
      errors: types that followers raise as the leader did, each made from its message alone; other
        types become LeaderError.
    """

    def __init__(
        self,
        index: int = 0,
        count: int = 1,
        client: Any = None,
        *,
        stop: Callable[[], bool] = lambda: False,
        errors: tuple[type[Exception], ...] = (),
    ) -> None:
        self.index = index
        self.count = count
        self.leads = index == 0
        self._client = client
        self._stop = stop
        self._errors = {kind.__name__: kind for kind in errors}
        self._turn = 0
        self._raised_by_all: BaseException | None = None
        self._others_stop: str | None = None
        self._closed = threading.Event()
        if count > 1:
            threading.Thread(target=self._watch, name="team", daemon=True).start()

    def share(self, what: str, make: Callable[[], Any]) -> Any:
        """Call `make` in process 0 and return its result in every process.

        All processes call this in the same order.

        Args:
          what: the name of this turn. A process that is at another turn is an error.
          make: returns a JSON document. An exception that it raises is raised in all processes.
        """
        if self.count == 1:
            return make()
        self._turn += 1  # old turns stay in the store: a few hundred bytes each
        key = f"{TURNS}/{self._turn:09d}"
        if self.leads:
            return self._lead(key, what, make)
        return self._follow(key, what)

    def share_part(
        self, what: str, make: Callable[[], tuple[Local, Any]]
    ) -> tuple[Local | None, Any]:
        """Call `make` in process 0, which keeps the first part of the result; share the second.

        Returns:
          (local, document): `local` is None in the other processes, `document` is the same in all.
        """
        kept: list[Local] = []

        def keep_local_part() -> Any:
            local, document = make()
            kept.append(local)
            return document

        document = self.share(what, keep_local_part)
        return (kept[0] if kept else None), document

    def meet(
        self,
        what: str,
        is_ready: Callable[[], bool] = lambda: True,
        seconds: float = MEET_SECONDS,
        remedy: str = "",
    ) -> None:
        """Wait until all processes have called this and are ready.

        Use it before the first collective after work that takes some processes longer than others.
        No barrier of JAX is used: no signal is heard while one waits at it.

        Args:
          what: the name of this turn.
          is_ready: polled in each process until it returns True.
          seconds: deadline of the wait.
          remedy: ends the message where it is missed.

        Raises:
          Stopped: in all processes, where one of them was asked to stop.
          LeaderError: in all processes, where some have not come in time; the message names them.
        """
        if self.count == 1:
            return
        place = f"{ARRIVALS}/{self._turn + 1:09d}"
        arriving = threading.Thread(target=self._arrive, args=(place, is_ready), daemon=True)
        arriving.start()
        self.share(what, lambda: self._wait_for_all(place, what, seconds, remedy))

    def gather(self, what: str, document: Any) -> list[Any] | None:
        """Return the documents of all processes, by their numbers, in process 0; None elsewhere.

        Args:
          what: the name of this turn.
          document: of this process; JSON.
        """
        if self.count == 1:
            return [document]
        place = self._hand_in(document)
        documents, _ = self.share_part(what, lambda: (self._take_parts(place), None))
        return documents

    def total(self, what: str, numbers: Sequence[float]) -> list[float]:
        """Return the sums over all processes of each of the numbers.

        Args:
          what: the name of this turn.
          numbers: of this process; as many in each.
        """
        if self.count == 1:
            return list(numbers)
        place = self._hand_in(list(numbers))

        def add() -> list[float]:
            columns = zip(*self._take_parts(place), strict=True)
            return [sum(column) for column in columns]

        return self.share(what, add)

    def require_same(self, what: str, value: str) -> None:
        """Raise LeaderError where this process has another value than process 0."""
        theirs = self.share(what, lambda: value)
        if theirs != value:
            raise LeaderError(
                f"{what}: process {self.index} has {value[-16:]}, process 0 {theirs[-16:]}; do all"
                " hosts see one workdir, one code and one config?"
            )

    def require_same_rows(self, step: int, batch: Batch) -> None:
        """Raise LeaderError where processes have packed different rows for this step.

        Each process packs for itself and feeds only its own rows, so nothing else would notice.
        Routes are left out: each process has those of its own rows only.
        """
        if self.count == 1:
            return
        digest = hashlib.sha256()
        for field in batch._replace(routes_BTLk=None):
            if field is not None:
                digest.update(np.ascontiguousarray(field).tobytes())
        self.require_same(f"rows of step {step}", digest.hexdigest())

    def wants_to_stop(self) -> bool:
        """Return whether any process was asked to stop, as far as this one has heard.

        Processes may answer differently for a moment: use it in waits that only process 0 does, or
        before training begins.
        """
        return self._stop() or self._others_stop is not None

    def should_stop(self) -> bool:
        """Return whether the user asked to stop; the answer is the same in every process."""
        return self.share("stop", self.wants_to_stop)

    def part(self, error: BaseException) -> None:
        """End all processes, unless all of them raise `error` and can handle it in step.

        The reason is printed here and sent to the others, which end within seconds.
        """
        if self.count == 1 or error is self._raised_by_all:
            return
        if isinstance(error, Stopped):
            reason = f"process {self.index} of {self.count} {WAS_STOPPED}"
        else:
            text = f"process {self.index} of {self.count} failed: {type(error).__name__}: {error}"
            reason = " ".join(text.split())
            if os.environ.get("ROME_DEBUG"):
                sys.excepthook(type(error), error, error.__traceback__)
        with contextlib.suppress(RuntimeError):  # the coordinator is gone, and the others know it
            self._tell("failed", reason)
        self._closed.set()  # the reason is printed once
        self._leave(reason)

    def close(self) -> None:
        """Stop watching the other processes; call it before jax.distributed ends."""
        self._closed.set()

    def _lead(self, key: str, what: str, make: Callable[[], Any]) -> Any:
        try:
            document = json.dumps({"what": what, "value": make()})
        except BaseException as error:
            self._raised_by_all = error
            failure = {"what": what, "error": [type(error).__name__, str(error)]}
            self._client.key_value_set(key, json.dumps(failure))
            raise
        self._client.key_value_set(key, document)
        return json.loads(document)["value"]  # as the others get it: a tuple is a list for all

    def _follow(self, key: str, what: str) -> Any:
        document = json.loads(self._wait_for(key))
        if document["what"] != what:
            raise LeaderError(
                f"process 0 is at {document['what']!r}, process {self.index} at {what!r}; do they"
                " run the same code and config?"
            )
        if "error" in document:
            self._raised_by_all = self._error_of_leader(*document["error"])
            raise self._raised_by_all
        return document["value"]

    def _hand_in(self, document: Any) -> str:
        """Put this process's part of the next turn into the store, and return its place there."""
        place = f"{PARTS}/{self._turn + 1:09d}"
        self._client.key_value_set(f"{place}/{self.index}", json.dumps(document))
        return place

    def _take_parts(self, place: str) -> list[Any]:
        """Wait in process 0 for the parts of all processes, and take them from the store."""
        parts = [json.loads(self._wait_for(f"{place}/{index}")) for index in range(self.count)]
        self._client.key_value_delete(place)
        return parts

    def _arrive(self, place: str, is_ready: Callable[[], bool]) -> None:
        """Announce that this process is ready, as soon as it is."""
        while not is_ready():
            if self._closed.wait(POLL_SECONDS):
                return
        with contextlib.suppress(RuntimeError):  # the coordinator is gone: share reports it
            self._client.key_value_set(f"{place}/{self.index}", "")

    def _wait_for_all(self, place: str, what: str, seconds: float, remedy: str) -> None:
        """Wait in process 0 until all processes have arrived."""
        ends = time.monotonic() + seconds
        while True:
            entries = self._client.key_value_dir_get(f"{place}/")
            arrived = {int(key.rpartition("/")[2]) for key, _ in entries}
            missing = sorted(set(range(self.count)) - arrived)
            if not missing:
                return
            raise_if_stopped(self.wants_to_stop)
            if time.monotonic() > ends:
                late = ", ".join(map(str, missing))
                raise LeaderError(
                    f"{what}: process {late} of {self.count} did not come within {seconds:g} s;"
                    f" {remedy or 'its own log may say why'}"
                )
            time.sleep(MEET_POLL_SECONDS)

    def _wait_for(self, key: str) -> str:
        """Return the value of a key as soon as it is set, in waits short enough for signals."""
        while True:
            try:
                return self._client.blocking_key_value_get(key, WAIT_MILLISECONDS)
            except RuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise

    def _error_of_leader(self, kind: str, message: str) -> Exception:
        if kind in self._errors:
            return self._errors[kind](message)
        return LeaderError(f"process 0 raised {kind}: {message}")

    def _watch(self) -> None:
        """Tell the others of a wish to stop, and end this process when another has failed."""
        is_sent = False
        while not self._closed.wait(WATCH_SECONDS):
            try:
                if self._stop() and not is_sent:
                    self._tell("stop", str(self.index))
                    is_sent = True
                news = dict(self._client.key_value_dir_get(NEWS + "/"))
            except RuntimeError:  # the coordinator is gone: jax.distributed reports it
                return
            if f"{NEWS}/failed" in news and not self._closed.is_set():
                self._leave(news[f"{NEWS}/failed"])
            if self._others_stop is None and not self._stop() and f"{NEWS}/stop" in news:
                self._others_stop = news[f"{NEWS}/stop"]
                if self.leads:
                    _print(
                        f"process {self._others_stop} was asked to stop: the last whole step is"
                        " saved"
                    )

    def _tell(self, name: str, text: str) -> None:
        self._client.key_value_set(f"{NEWS}/{name}", text, allow_overwrite=True)

    def _leave(self, reason: str) -> None:
        """End the process without exit handlers, which would wait for processes in a collective.

        Every process announces that it leaves, so process 0, which stays a little longer, can name
        those that did not: a broken collective only says that some connection is lost.
        """
        _print(
            f"launch.train: {reason}; all processes end. The same command resumes from the last"
            " checkpoint."
        )
        try:
            self._tell(f"left/{self.index}", "")
            if self.leads:
                threading.Event().wait(LEAVING_SECONDS)
                for silent in self._silent_processes():
                    _print(
                        f"launch.train: process {silent} gave no sign of life; its own log may say"
                        " why."
                    )
        except RuntimeError:  # the coordinator is gone
            pass
        os._exit(STOPPED_STATUS if reason.endswith(WAS_STOPPED) else 1)

    def _silent_processes(self) -> list[int]:
        """Return the processes that have not announced that they leave."""
        entries = self._client.key_value_dir_get(f"{NEWS}/left/")
        left = {int(key.rpartition("/")[2]) for key, _ in entries}
        return sorted(set(range(self.count)) - left)


def _print(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
