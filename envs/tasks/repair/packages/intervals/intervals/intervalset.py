"""A set of integers, kept as sorted disjoint intervals [start, end)."""

from bisect import bisect_right


class IntervalSet:
    def __init__(self, intervals=()):
        self._parts = []
        for start, end in intervals:
            self.add(start, end)

    def add(self, start, end):
        """Add [start, end); what touches becomes one interval."""
        if start > end:
            raise ValueError("start %r is after end %r" % (start, end))
        if start == end:
            return
        kept = []
        for low, high in self._parts:
            if high < start or low > end:
                kept.append((low, high))
            else:
                start, end = min(start, low), max(end, high)
        kept.append((start, end))
        self._parts = sorted(kept)

    def remove(self, start, end):
        """Take [start, end) out."""
        kept = []
        for low, high in self._parts:
            if low < start:
                kept.append((low, min(high, start)))
            if high > end:
                kept.append((max(low, end), high))
            elif high <= start:
                continue
        self._parts = sorted(set(part for part in kept if part[0] < part[1]))

    def __contains__(self, value):
        place = bisect_right(self._parts, (value, float("inf"))) - 1
        return place >= 0 and self._parts[place][0] <= value < self._parts[place][1]

    def __len__(self):
        return sum(end - start for start, end in self._parts)

    def __iter__(self):
        return iter(self._parts)

    def __eq__(self, other):
        return isinstance(other, IntervalSet) and self._parts == other._parts

    def union(self, other):
        return IntervalSet([*self, *other])

    def intersection(self, other):
        result, left, right = IntervalSet(), 0, 0
        while left < len(self._parts) and right < len(other._parts):
            start = max(self._parts[left][0], other._parts[right][0])
            end = min(self._parts[left][1], other._parts[right][1])
            if start < end:
                result.add(start, end)
            if self._parts[left][1] < other._parts[right][1]:
                left += 1
            else:
                right += 1
        return result

    def gaps(self):
        """The intervals between the parts."""
        return [(first[1], second[0]) for first, second in zip(self._parts, self._parts[1:])]

    def first_free(self, size, start=0):
        """The least place from `start` on where `size` integers in a row are not in the set."""
        place = start
        for low, high in self._parts:
            if high <= place:
                continue
            if low - place >= size:
                return place
            place = high
        return place
