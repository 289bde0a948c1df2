"""Counters, gauges and histograms in Prometheus' text format 0.0.4."""

import bisect
from collections import defaultdict
from collections.abc import Callable, Iterator

BUCKET_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
MAX_SERIES = 1000  # of one metric, since values of labels may come from outside
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
Labels = tuple[tuple[str, str], ...]
_Counts = dict[Labels, float]
_Buckets = dict[Labels, list[float]]  # a count for each bucket, then the sum


class Metrics:
    """All metrics of one service, each defined by its first use."""

    def __init__(self) -> None:
        self._definitions: dict[str, tuple[str, str]] = {}  # name -> (help, type)
        self._counts: dict[str, _Counts] = defaultdict(dict)
        self._histograms: dict[str, _Buckets] = defaultdict(dict)
        self._gauges: dict[str, Callable[[], _Counts]] = {}

    def count(self, name: str, description: str, **labels: str) -> None:
        """Add one to a counter; ignored where it would begin a series beyond MAX_SERIES."""
        self._definitions[name] = (description, "counter")
        series = self._counts[name]
        key = tuple(sorted(labels.items()))
        if key in series or len(series) < MAX_SERIES:
            series[key] = series.get(key, 0) + 1

    def observe(self, name: str, description: str, seconds: float, **labels: str) -> None:
        """Add a duration to a histogram; ignored as in `count`."""
        self._definitions[name] = (description, "histogram")
        series = self._histograms[name]
        key = tuple(sorted(labels.items()))
        if key in series or len(series) < MAX_SERIES:
            values = series.setdefault(key, [0.0] * (len(BUCKET_SECONDS) + 2))
            bucket = bisect.bisect_left(BUCKET_SECONDS, seconds)
            values[bucket] += 1
            values[-1] += seconds

    def gauge(self, name: str, description: str, read: Callable[[], _Counts]) -> None:
        """Define a gauge whose values `read` returns, each time the metrics are written."""
        self._definitions[name] = (description, "gauge")
        self._gauges[name] = read

    def text(self) -> str:
        """Return all metrics in Prometheus' text format."""
        lines: list[str] = []
        for name, (description, kind) in sorted(self._definitions.items()):
            lines.append(f"# HELP {name} {description}")
            lines.append(f"# TYPE {name} {kind}")
            lines += self._samples(name, kind)
        return "".join(f"{line}\n" for line in lines)

    def _samples(self, name: str, kind: str) -> Iterator[str]:
        if kind == "histogram":
            for labels, values in sorted(self._histograms[name].items()):
                yield from _histogram_samples(name, labels, values)
            return
        series = self._gauges[name]() if kind == "gauge" else self._counts[name]
        for labels, value in sorted(series.items()):
            yield f"{name}{_format_labels(labels)} {value:.15g}"


def _histogram_samples(name: str, labels: Labels, values: list[float]) -> Iterator[str]:
    bounds = (*map(str, BUCKET_SECONDS), "+Inf")
    total = 0.0
    for bound, number in zip(bounds, values[:-1], strict=True):
        total += number
        bucket_labels = _format_labels((*labels, ("le", bound)))
        yield f"{name}_bucket{bucket_labels} {total:g}"
    own_labels = _format_labels(labels)
    yield f"{name}_sum{own_labels} {values[-1]:.6f}"
    yield f"{name}_count{own_labels} {total:g}"


def _format_labels(labels: Labels) -> str:
    if not labels:
        return ""
    pairs = [f'{name}="{_escape(value)}"' for name, value in labels]
    return "{" + ",".join(pairs) + "}"


def _escape(value: str) -> str:
    text = value.encode(errors="replace").decode()
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
