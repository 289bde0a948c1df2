"""A centred interval tree: which of many intervals hold a point, or overlap another, without looking at all of them."""


class IntervalTree:
    """Built once, from (start, end, value)."""

    def __init__(self, intervals):
        intervals = [entry for entry in intervals]
        for start, end, _ in intervals:
            if start >= end:
                raise ValueError("interval [%r, %r) is empty" % (start, end))
        self._size = len(intervals)
        self._root = _build(intervals)

    def __len__(self):
        return self._size

    def at(self, point):
        """Values of the intervals that hold the point, by start and then by end."""
        found, node = [], self._root
        while node is not None:
            centre, by_start, by_end, left, right = node
            if point < centre:
                for entry in by_start:
                    if entry[0] > point:
                        break
                    found.append(entry)
                node = left
            else:
                for entry in by_end:
                    if entry[1] <= point:
                        break
                    found.append(entry)
                node = right
        return [value for _, _, value in sorted(found, key=lambda entry: entry[:2])]

    def overlapping(self, start, end):
        """Values of the intervals that share a point with [start, end)."""
        if start >= end:
            return []
        found = []
        _collect(self._root, start, end, found)
        return [value for _, _, value in sorted(found, key=lambda entry: entry[:2])]

    def depth(self):
        def of(node):
            return 0 if node is None else 1 + max(of(node[3]), of(node[4]))

        return of(self._root)


def _build(intervals):
    if not intervals:
        return None
    starts = sorted(start for start, _, _ in intervals)
    centre = starts[len(starts) // 2]
    left = [entry for entry in intervals if entry[1] <= centre]
    right = [entry for entry in intervals if entry[0] > centre]
    here = [entry for entry in intervals if entry[0] <= centre < entry[1]]
    by_start = sorted(here, key=lambda entry: entry[0])
    by_end = sorted(here, key=lambda entry: entry[1], reverse=True)
    return centre, by_start, by_end, _build(left), _build(right)


def _collect(node, start, end, found):
    if node is None:
        return
    centre, by_start, _, left, right = node
    found.extend(entry for entry in by_start if entry[0] < end and entry[1] > start)
    if start < centre:
        _collect(left, start, end, found)
    if end > centre + 1:
        _collect(right, start, end, found)
