"""Counters, gauges and histograms in Prometheus' text format 0.0.4."""

import bisect
from collections import defaultdict
from collections.abc import Callable, Iterator

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
MAX_SERIES = 1000  # of one metric: the values of labels may come from outside
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
Labels = tuple[tuple[str, str], ...]


class Metrics:
    """All metrics of one service. Names and help are given where a metric is first used."""

    def __init__(self):
        self._help: dict[str, tuple[str, str]] = {}
        self._counts: dict[str, dict[Labels, float]] = defaultdict(dict)
        self._times: dict[str, dict[Labels, list[float]]] = defaultdict(
            dict
        )  # a count for each bucket, then the sum
        self._gauges: dict[str, Callable[[], dict[Labels, float]]] = {}

    def count(self, name: str, says: str, amount: float = 1, **labels: str) -> None:
        self._help[name] = (says, "counter")
        series, key = self._counts[name], tuple(sorted(labels.items()))
        if key in series or len(series) < MAX_SERIES:
            series[key] = series.get(key, 0) + amount

    def observe(self, name: str, says: str, seconds: float, **labels: str) -> None:
        self._help[name] = (says, "histogram")
        series, key = self._times[name], tuple(sorted(labels.items()))
        if key in series or len(series) < MAX_SERIES:
            values = series.setdefault(key, [0.0] * (len(SECONDS) + 2))
            values[bisect.bisect_left(SECONDS, seconds)] += 1
            values[-1] += seconds

    def gauge(self, name: str, says: str, read: Callable[[], dict[Labels, float]]) -> None:
        """`read` is asked whenever the metrics are."""
        self._help[name] = (says, "gauge")
        self._gauges[name] = read

    def text(self) -> str:
        return "".join(
            line + "\n"
            for name, (says, kind) in sorted(self._help.items())
            for line in self._lines(name, says, kind)
        )

    def _lines(self, name: str, says: str, kind: str) -> Iterator[str]:
        yield f"# HELP {name} {says}"
        yield f"# TYPE {name} {kind}"
        if kind == "histogram":
            for labels, values in sorted(self._times[name].items()):
                total = 0.0
                for bound, number in zip((*map(str, SECONDS), "+Inf"), values):
                    total += number
                    yield f"{name}_bucket{_labels((*labels, ('le', bound)))} {total:g}"
                yield f"{name}_sum{_labels(labels)} {values[-1]:.6f}"
                yield f"{name}_count{_labels(labels)} {total:g}"
        else:
            for labels, value in sorted(
                (self._gauges[name]() if kind == "gauge" else self._counts[name]).items()
            ):
                yield f"{name}{_labels(labels)} {value:.15g}"


def _labels(labels: Labels) -> str:
    def escape(value: str) -> str:
        return (
            value.encode(errors="replace")
            .decode()
            .replace("\\", "\\\\")
            .replace('"', '\\"')
            .replace("\n", "\\n")
        )

    return (
        "{" + ",".join(f'{name}="{escape(value)}"' for name, value in labels) + "}"
        if labels
        else ""
    )
