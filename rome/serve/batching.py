"""What is computed next: which requests run, with which pages, and how many tokens of each.

Only the scheduler's thread uses a `Batcher`.
"""

from __future__ import annotations

import collections
from collections.abc import Sequence
from typing import Any

from rome.serve.device import Piece
from rome.serve.pages import Node, PageTable
from rome.serve.programs import Shapes
from rome.serve.request import Request

# A call of a larger size is taken for more tokens than this share of it; for fewer, a smaller call
# is filled, and the rest waits for the next one.
LEAST_FILL = 0.4
# Share of a call that prompts get although running requests alone would fill it.
PROMPT_SHARE = 0.25


class Batcher:
    """Requests that wait and requests that run, and the pages of the cache.

    Attributes:
      running: requests that have a slot, the oldest first; an ordered set.
    """

    def __init__(self, shapes: Shapes):
        self.running: dict[Request, None] = {}
        self._shapes = shapes
        self._waiting: collections.OrderedDict[Request, None] = collections.OrderedDict()
        self._pages = PageTable(shapes.pages, shapes.page_tokens)
        self._swaps = 0  # part of every root: nothing that other weights computed is reused
        self._turn = 0  # of the running requests where a call does not hold all of them
        self._retractions = 0

    def busy(self) -> bool:
        """Return whether any request waits or runs."""
        return bool(self._waiting or self.running)

    def requests(self) -> list[Request]:
        """Return all requests that wait or run."""
        return [*self._waiting, *self.running]

    def metrics(self) -> dict[str, Any]:
        """Return how many requests and pages there are in which state. From any thread."""
        running = list(self.running)
        decoding = sum(request.is_decoding for request in running)
        return {
            "running": decoding,
            "prefilling": len(running) - decoding,
            "waiting": len(self._waiting),
            "retractions": self._retractions,
            "pages": self._pages.count,
            "pages_available": self._pages.available,
        }

    # -- requests come and go
    # ---------------------------------------------------------------------------------------------

    def queue(self, request: Request) -> None:
        """Let a new request wait for its turn."""
        self._waiting[request] = None

    def remove(self, request: Request) -> None:
        """Forget a request that has ended; its pages stay in the tree."""
        self._waiting.pop(request, None)
        if request in self.running:
            self._stop(request)

    def retract_all(self) -> None:
        """Put running requests back to the head of the queue, in order, with their tokens."""
        for request in reversed(list(self.running)):
            self._retract(request)

    def forget_prefixes(self) -> None:
        """Drop all cached prefixes; nothing runs."""
        self._pages.forget_all()

    def note_new_weights(self, fresh: bool) -> None:
        """Share nothing any more that was computed so far.

        Args:
          fresh: running requests start over; otherwise they go on with what they have, and share
            nothing.
        """
        self._swaps += 1
        if fresh:
            self.retract_all()
            self._pages.forget_all()
        for request in self.running:
            request.root = None

    def _retract(self, request: Request) -> None:
        self._stop(request)
        self._waiting[request] = None
        self._waiting.move_to_end(request, last=False)
        self._retractions += 1

    def _stop(self, request: Request) -> None:
        """Take a request's slot and pages; what it has computed can be found in the tree."""
        del self.running[request]
        own = request.pages[len(request.path) :]
        start = len(request.path) * self._shapes.page_tokens
        tail = tuple(request.ids[start : request.computed])
        if request.root is not None and tail:
            last = request.path[-1] if request.path else request.root
            self._pages.add(last, tail, own.pop(0), self._routes_of(request, start))
        self._pages.give_back(own)
        self._pages.let_go(request.path)
        request.path = []
        request.pages = []

    # -- requests begin
    # ---------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Let waiting requests run while there are slots and pages.

        Those of the highest priority first, and among them who came first.
        """
        while self._waiting and len(self.running) < self._shapes.slots:
            request = max(self._waiting, key=lambda one: one.priority)
            self._begin(request)
            missing = len(request.ids) // self._shapes.page_tokens + 1 - len(request.pages)
            if self.running and missing > self._pages.available:
                self._pages.let_go(request.path)
                request.path = []
                request.pages = []
                return
            del self._waiting[request]
            self.running[request] = None
            self._take_partial_page(request)

    def _begin(self, request: Request) -> None:
        """Give a request the pages of its prefix that are in the tree."""
        request.ids = request.prompt_ids + request.output_ids
        request.computed = 0
        request.path = []
        request.pages = []
        request.prompt_logprobs = []
        request.root = None
        if not request.output_ids:  # begun in vain before, or retracted: it is counted anew
            request.cached_tokens = 0
        if request.score_from is not None:  # computed in full: a cached page has no logits
            return
        # Pages of requests without routes have none to give to a request that wants them.
        kind = (self._swaps, request.return_routes, request.salt, request.adapter)
        request.root = self._pages.root(kind)
        self._catch_up(request)

    def _catch_up(self, request: Request) -> None:
        """Take full pages from the tree that follow what the request has.

        Not the one with its last token: the next one is drawn from that token's logits.
        """
        P = self._shapes.page_tokens
        if request.root is None or request.computed != len(request.pages) * P:
            return
        while request.computed + P < len(request.ids):
            last = request.path[-1] if request.path else request.root
            found = self._pages.find(last, request.ids, request.computed)
            if found is None:
                return
            self._pages.hold(found)
            request.path.append(found)
            self._use_cached(request, found)

    def _take_partial_page(self, request: Request) -> None:
        """Go on in the page in which an earlier sequence with the same tokens ended."""
        if request.root is None:
            return
        last = request.path[-1] if request.path else request.root
        end = len(request.ids) - 1
        found = self._pages.take_partial(last, request.ids, request.computed, end)
        if found is not None:
            self._use_cached(request, found)

    def _use_cached(self, request: Request, node: Node) -> None:
        request.pages.append(node.page)
        if request.return_routes:
            assert node.routes is not None, "pages without routes have a root of their own"
            request.note_routes(node.routes)
        request.computed += len(node.tokens)
        if not request.output_ids:
            request.cached_tokens += len(node.tokens)

    # -- calls
    # ---------------------------------------------------------------------------------------------

    def next_batch(self) -> tuple[list[Piece], int]:
        """Return the pieces of the next call, and its size. At least one request waits or runs."""
        self._admit()
        decoding, prompts = self._in_line()
        size = self._choose_size(decoding, prompts)
        room = size
        if prompts and len(decoding) >= size:
            room -= int(size * PROMPT_SHARE)
        batch: list[Piece] = []
        taken = self._add_pieces(batch, decoding, room)
        self._add_pieces(batch, prompts, size - taken)
        self._turn += sum(piece.request.is_decoding for piece in batch)
        assert batch, "the first request in line can always have pages"
        return batch, size

    def only_decodes(self) -> bool:
        """Return whether no running request has a prompt to compute."""
        return all(request.is_decoding for request in self.running)

    def give_pages(self, requests: Sequence[Request], tokens: int) -> None:
        """Give requests pages for up to `tokens` more tokens each, as far as nothing must yield."""
        P = self._shapes.page_tokens
        for request in requests:
            end = min(request.computed + tokens, request.last_position)
            while len(request.pages) * P < end:
                page = self._pages.take()
                if page is None:
                    return
                request.pages.append(page)

    def can_go_on(self, requests: Sequence[Request], size: int, steps: int) -> bool:
        """Return whether a dispatch of `steps` steps may be followed before it is read.

        So it is where the same rows are likely to be the best next ones: nothing else waits, they
        have the pages, they fill the program, no stop string may have ended one of them, and no
        penalty depends on what is still to be read. Gives them the pages.
        """
        running = [request for request in requests if request in self.running]
        going = [one for one in running if one.computed + steps < one.last_position]
        if self._waiting or len(running) < len(self.running):
            return False
        if not going or self._choose_size(going, ()) != size:
            return False
        if any(one.sampling.stop or one.sampling.has_penalties for one in going):
            return False
        self.give_pages(going, 2 * steps)
        P = self._shapes.page_tokens
        return all(
            len(request.pages) * P >= min(request.computed + 2 * steps, request.last_position)
            for request in going
        )

    def _in_line(self) -> tuple[list[Request], list[Request]]:
        """Return the requests with one token to compute, and those with more or a whole prompt."""
        decoding = [request for request in self.running if request.is_decoding]
        prompts = [request for request in self.running if not request.is_decoding]
        if decoding:
            turn = self._turn % len(decoding)
            decoding = decoding[turn:] + decoding[:turn]
        for request in prompts:
            self._catch_up(request)
        return decoding, prompts

    def _choose_size(self, decoding: Sequence[Request], prompts: Sequence[Request]) -> int:
        wanted = len(decoding)
        wanted += sum(len(request.ids) - request.computed for request in prompts)
        sizes = self._shapes.call_sizes
        size = sizes[0]
        for larger in sizes[1:]:
            if wanted > size and wanted > LEAST_FILL * larger:
                size = larger
        return size

    def _add_pieces(self, batch: list[Piece], requests: Sequence[Request], room: int) -> int:
        """Add pieces of requests to a batch; return the number of their tokens."""
        computing = set()
        taken = 0
        for request in requests:
            if taken >= room:
                break
            if request not in self.running:  # retracted for the sake of another
                continue
            page = self._next_page(request)
            if page is not None and page in computing:
                continue  # another piece computes this very page; the next call takes it
            computing.add(page)
            length = min(len(request.ids) - request.computed, room - taken)
            length = self._make_room(request, length, batch)
            if length:
                batch.append(Piece(request, length))
                taken += length
        return taken

    def _next_page(self, request: Request) -> tuple[Node, tuple[int, ...]] | None:
        """Return the full page of a prompt that is computed next, if others may share it."""
        P = self._shapes.page_tokens
        start = request.computed
        if request.root is None or start % P or start + P >= len(request.ids):
            return None
        last = request.path[-1] if request.path else request.root
        return last, tuple(request.ids[start : start + P])

    def _make_room(self, request: Request, length: int, batch: Sequence[Piece]) -> int:
        """Give a request pages for up to `length` more tokens; return for how many it has some.

        Where no page is left, the youngest requests start over later, unless they are in the batch:
        so the oldest always goes on.
        """
        P = self._shapes.page_tokens
        while len(request.pages) * P < request.computed + length:
            page = self._pages.take()
            if page is not None:
                request.pages.append(page)
            elif not self._retract_youngest(request, batch):
                break
        return min(length, len(request.pages) * P - request.computed)

    def _retract_youngest(self, asking: Request, batch: Sequence[Piece]) -> bool:
        """Retract the youngest request outside of the batch, unless it is the one that asks."""
        in_batch = {piece.request for piece in batch}
        youngest = next(one for one in reversed(self.running) if one not in in_batch)
        if youngest is asking:
            return False
        self._retract(youngest)
        return True

    def note_computed(self, piece: Piece) -> None:
        """Record that a piece was computed; its full pages can be found from now on."""
        request, length = piece
        request.computed += length
        P = self._shapes.page_tokens
        while request.root is not None and (len(request.path) + 1) * P <= request.computed:
            number = len(request.path)
            last = request.path[-1] if request.path else request.root
            tokens = tuple(request.ids[number * P : (number + 1) * P])
            routes = self._routes_of(request, number * P)
            node = self._pages.add(last, tokens, request.pages[number], routes)
            self._pages.hold(node)
            request.path.append(node)
            request.pages[number] = node.page

    def _routes_of(self, request: Request, start: int) -> Any:
        """Return a copy of the routes of one page's tokens, if the request wants routes."""
        if request.routes is None:
            return None
        end = min(start + self._shapes.page_tokens, request.computed)
        return request.routes[start:end].copy()
