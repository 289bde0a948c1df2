"""Figures of the engine in Prometheus' text format, under the names that SGLang gives them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from rome.serve.request import Request


@dataclasses.dataclass
class Totals:
    """Sums over the requests that have ended since the start.

    Attributes:
      requests: that ended in any way.
      aborted: of these, by an abort, a pause or an error.
      prompt_tokens: of their prompts.
      cached_tokens: of these, taken from the cache.
      first_tokens: requests that got a token.
      first_token_seconds: from their arrival to their first token.
      seconds: from arrivals to ends.
    """

    requests: int = 0
    aborted: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    first_tokens: int = 0
    first_token_seconds: float = 0.0
    seconds: float = 0.0

    def add(self, request: Request, now: float) -> None:
        """Count a request that has ended at `now`, by time.monotonic()."""
        self.requests += 1
        self.aborted += (request.finish or {}).get("type") == "abort"
        self.prompt_tokens += len(request.prompt_ids)
        self.cached_tokens += request.cached_tokens
        self.seconds += now - request.created
        if request.first_token is not None:
            self.first_tokens += 1
            self.first_token_seconds += request.first_token - request.created


def to_prometheus(totals: Totals, load: Mapping[str, Any], model: str) -> str:
    """Return the figures as text.

    Args:
      totals: of requests that have ended.
      load: as `Scheduler.load_metrics` gives it.
      model: for the label model_name.
    """
    used = load["pages"] - load["pages_available"]
    prompt_tokens = max(totals.prompt_tokens, 1)
    gauges = {
        "num_running_reqs": load["running"] + load["prefilling"],
        "num_queue_reqs": load["waiting"],
        "token_usage": used / load["pages"],
        "cache_hit_rate": totals.cached_tokens / prompt_tokens,
    }
    counters = {
        "num_requests_total": totals.requests,
        "num_aborted_requests_total": totals.aborted,
        "num_retracted_requests_total": load["retractions"],
        "prompt_tokens_total": totals.prompt_tokens,
        "cached_tokens_total": totals.cached_tokens,
        "generation_tokens_total": int(load.get("generated_tokens", 0)),
    }
    summaries = {
        "time_to_first_token_seconds": (totals.first_token_seconds, totals.first_tokens),
        "e2e_request_latency_seconds": (totals.seconds, totals.requests),
    }
    escaped = model.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    label = f'{{model_name="{escaped}"}}'
    lines = []
    for kind, figures in (("gauge", gauges), ("counter", counters)):
        for name, value in figures.items():
            lines += [f"# TYPE sglang:{name} {kind}", f"sglang:{name}{label} {value}"]
    for name, (total, count) in summaries.items():
        lines.append(f"# TYPE sglang:{name} summary")
        lines += [f"sglang:{name}_sum{label} {total}", f"sglang:{name}_count{label} {count}"]
    return "\n".join(lines) + "\n"
