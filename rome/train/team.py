"""Several processes that train one model: what one of them does or decides, all of them know.

Process 0 leads: it alone plays episodes, evaluates and writes. The others take part in every jitted
function and learn everything else by `share`. Small JSON documents travel through the key-value
store of jax.distributed's coordinator, so no device waits while a step's episodes are played;
arrays never do.

An error that every process raises is an error as in one process. One that only some can know of
ends all processes within seconds: whoever went on would wait in a collective for ever. A process
that is killed is missed by jax.distributed's heartbeat, which ends the others.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable
from typing import Any

WAIT_MS = 1000  # of one look at the store; between two of them Python hears signals
WATCH_SECONDS = 0.5
MEET_SECONDS = 3600.0
TURNS, NEWS, MEETINGS = (
    "rome/turns",
    "rome/news",
    "rome/meetings",
)  # our keys; JAX and orbax have theirs in the same store
LEAVING_SECONDS = 3.0  # process 0 holds the store: it goes last, once the others have read why


class LeaderError(RuntimeError):
    """What process 0 raised, in another process that has no name for it."""


class Team:
    """This process among `count`.

    One process is a team too: then `share` is a call and nothing is sent.

    Args:
      client: the key-value store of jax.distributed; None in a single process.
      stop: whether this process was asked to stop (a signal).
      errors: kinds that followers raise as the leader did, each made from its message alone; others
        become LeaderError.
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
        self.index, self.count, self.leads = index, count, index == 0
        self._client, self._stop = client, stop
        self._errors = {kind.__name__: kind for kind in errors}
        self._turn = self._meetings = 0
        self._raised_by_all: BaseException | None = None
        self._others_stop: str | None = None
        self._closed = threading.Event()
        if count > 1:
            threading.Thread(target=self._watch, name="team", daemon=True).start()

    def share(self, what: str, make: Callable[[], Any]) -> Any:
        """What `make` returns in process 0 (a JSON document), in every process; what it raises
        there is raised in all.

        All processes call it in the same order; `what` names the turn, and a process that is
        elsewhere is an error.
        """
        if self.count == 1:
            return make()
        self._turn += 1  # old turns stay in the store: a few hundred bytes each
        key = f"{TURNS}/{self._turn:09d}"
        return self._lead(key, what, make) if self.leads else self._follow(key, what)

    def meet(self, what: str) -> None:
        """Returns when all processes have come here.

        Before the first collective after a stretch that takes some of them longer than others.
        """
        if self.count > 1:
            self._meetings += 1
            self._client.wait_at_barrier(
                f"{MEETINGS}/{self._meetings}/{what}", int(1000 * MEET_SECONDS)
            )

    def require_same(self, what: str, value: str) -> None:
        """Raises LeaderError where this process has another value than process 0."""
        theirs = self.share(what, lambda: value)
        if theirs != value:
            raise LeaderError(
                f"{what}: process {self.index} has {value[-16:]}, process 0 {theirs[-16:]}; do all"
                " hosts see one workdir, one code and one config?"
            )

    def wants_to_stop(self) -> bool:
        """Whether this process, or in process 0 any process, was asked to stop.

        Not agreed on: for waits that only process 0 does.
        """
        return self._stop() or self._others_stop is not None

    def should_stop(self) -> bool:
        """The same answer in every process."""
        return self.share("stop", self.wants_to_stop)

    def part(self, error: BaseException) -> None:
        """Returns where all processes raise `error`.

        Otherwise says it here and to the others, and ends this process: it cannot go on alone.
        """
        if self.count == 1 or error is self._raised_by_all:
            return
        reason = " ".join(
            f"process {self.index} of {self.count} failed: {type(error).__name__}: {error}".split()
        )
        if os.environ.get("ROME_DEBUG"):
            sys.excepthook(type(error), error, error.__traceback__)
        try:
            self._client.key_value_set(f"{NEWS}/failed", reason, allow_overwrite=True)
        except RuntimeError:  # the coordinator is gone, and the others know that
            pass
        self._closed.set()  # said once
        self._leave(reason)

    def close(self) -> None:
        """Before jax.distributed ends: nobody watches any more."""
        self._closed.set()

    def _lead(self, key: str, what: str, make: Callable[[], Any]) -> Any:
        try:
            document = json.dumps({"what": what, "value": make()})
        except BaseException as error:
            self._raised_by_all = error
            self._client.key_value_set(
                key, json.dumps({"what": what, "error": [type(error).__name__, str(error)]})
            )
            raise
        self._client.key_value_set(key, document)
        return json.loads(document)["value"]  # as the others get it: a tuple is a list for all

    def _follow(self, key: str, what: str) -> Any:
        while True:
            try:
                document = json.loads(self._client.blocking_key_value_get(key, WAIT_MS))
                break
            except RuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise
        if document["what"] != what:
            raise LeaderError(
                f"process 0 is at {document['what']!r}, process {self.index} at {what!r}; do they"
                " run the same code and config?"
            )
        if "error" in document:
            kind, message = document["error"]
            error = (
                self._errors[kind](message)
                if kind in self._errors
                else LeaderError(f"process 0 raised {kind}: {message}")
            )
            self._raised_by_all = error
            raise error
        return document["value"]

    def _watch(self) -> None:
        """Carries a stop request of this process to process 0, and ends this process when another
        has failed.
        """
        told = False
        while not self._closed.wait(WATCH_SECONDS):
            try:
                if not self.leads and self._stop() and not told:
                    self._client.key_value_set(
                        f"{NEWS}/stop", str(self.index), allow_overwrite=True
                    )
                    told = True
                news = dict(self._client.key_value_dir_get(NEWS + "/"))
            except RuntimeError:  # the coordinator is gone: jax.distributed says so itself
                return
            if f"{NEWS}/failed" in news and not self._closed.is_set():
                self._leave(news[f"{NEWS}/failed"])
            if self.leads and self._others_stop is None and f"{NEWS}/stop" in news:
                self._others_stop = news[f"{NEWS}/stop"]
                print(
                    f"process {self._others_stop} was asked to stop: the last whole step is saved",
                    file=sys.stderr,
                    flush=True,
                )

    def _leave(self, reason: str) -> None:
        """Ends the process without the exit handlers: they would wait for processes that are stuck
        in a collective.

        The others say that they leave too, so process 0, which stays a little longer, can name
        those that said nothing: a collective that broke tells only that some connection is lost.
        """
        print(
            f"launch.train: {reason}; all processes end. The same command goes on from the last"
            " checkpoint.",
            file=sys.stderr,
            flush=True,
        )
        try:
            self._client.key_value_set(f"{NEWS}/left/{self.index}", "", allow_overwrite=True)
            if self.leads:
                threading.Event().wait(LEAVING_SECONDS)
                left = {
                    int(key.rpartition("/")[2])
                    for key, _ in self._client.key_value_dir_get(f"{NEWS}/left/")
                }
                for silent in sorted(set(range(self.count)) - left):
                    print(
                        f"launch.train: process {silent} gave no sign of life; its own log may say"
                        " why.",
                        file=sys.stderr,
                        flush=True,
                    )
        except RuntimeError:  # the coordinator is gone
            pass
        os._exit(1)
