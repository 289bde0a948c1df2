"""Run the rival of benchmarks.train_step: Hugging Face transformers on torch, in its own process.

It needs torch and transformers only. It is started with a JSON of settings, reads one word a line
("step", "end") and answers each with one line of JSON. Of the ways in which transformers can run
this model, the fastest is chosen by trial: first one step of each on a quarter of the rows, then
the near ones on all of them.
"""

from __future__ import annotations

import copy
import itertools
import json
import sys
import time
from typing import Any

import numpy as np
import torch
import transformers

NEAR = 1.6  # a candidate this many times slower than the best is not tried again
TRIALS = 2


class Side:
    """One way of running the model: attention, experts and precision, from the same weights."""

    def __init__(
        self, model: Any, settings: dict[str, Any], attention: str, experts: str, form: str
    ) -> None:
        self.name = f"{attention} attention, {experts} experts, {form}"
        self.form = form
        self.device = settings["device"]
        self.model = copy.deepcopy(model).to(self.device).train()
        self.model.set_attn_implementation(attention)
        self.model.set_experts_implementation(experts)
        if form == "bfloat16 weights":
            self.model.to(torch.bfloat16)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=settings["learning_rate"],
            betas=(0.9, 0.95),
            eps=1e-8,
            weight_decay=0.0,
            fused=True,
        )

    def step(self, tokens: torch.Tensor) -> float:
        """Apply one update and return its loss."""
        with torch.autocast(self.device, torch.bfloat16, enabled=self.form == "bfloat16 autocast"):
            loss = self.model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()  # also waits for a GPU

    def seconds(self, tokens: torch.Tensor) -> float:
        """Return the seconds of one update."""
        started = time.perf_counter()
        self.step(tokens)
        return time.perf_counter() - started


def fastest(model: Any, settings: dict[str, Any], tokens: torch.Tensor) -> tuple[str, str, str]:
    """Return the fastest way as (attention, experts, form), found by trial."""
    forms = ("bfloat16 weights", "bfloat16 autocast")
    if settings["precision"] == "float32":
        forms = ("float32 weights",)
    few = tokens[: max(1, len(tokens) // 4)]
    times: dict[tuple[str, str, str], float] = {}
    for ways in itertools.product(("sdpa", "eager"), ("eager", "grouped_mm"), forms):
        side = Side(model, settings, *ways)
        first = side.seconds(few)
        times[ways] = first
        if first < 3 * min(times.values()):
            times[ways] = min(first, side.seconds(few))
    near = [ways for ways, seconds in times.items() if seconds < NEAR * min(times.values())]
    best = {}
    for ways in near if len(near) > 1 else ():
        side = Side(model, settings, *ways)
        side.seconds(tokens)
        best[ways] = min(side.seconds(tokens) for _ in range(TRIALS))
    return min(best, key=best.get) if best else near[0]


def main() -> None:
    settings = json.loads(sys.argv[1])
    torch.set_num_threads(settings["threads"])
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        settings["weights"], dtype=torch.float32
    )
    tokens = torch.from_numpy(np.load(settings["tokens"]).astype(np.int64)).to(settings["device"])
    side = Side(model, settings, *fastest(model, settings, tokens))
    versions = f"transformers {transformers.__version__}, torch {torch.__version__}"
    print(
        json.dumps(
            {"rival": f"{versions} ({side.name}, fused AdamW, {settings['threads']} threads)"}
        ),
        flush=True,
    )
    for line in sys.stdin:
        if line.strip() == "end":
            return
        started = time.perf_counter()
        loss = side.step(tokens)
        print(json.dumps({"seconds": time.perf_counter() - started, "loss": loss}), flush=True)


if __name__ == "__main__":
    main()
