"""HF `datasets` and torch's DataLoader for benchmarks/input_pipeline.py: seconds in, JSON out.

    python input_pipeline_rival.py SETTINGS

It runs in an environment with torch, datasets and tokenizers, and imports nothing of this
repository. Texts are shuffled in a buffer, tokenised in batches, concatenated and cut into rows, as
transformers' examples for causal language models pack them.
"""

import json
import resource
import sys
import time

import datasets
import tokenizers
import torch
from torch.utils.data import DataLoader

BUFFER = 1000  # documents of the shuffle
BATCH = 1000  # documents that are tokenised at once


def make_batches(settings):
    """Return an endless iterator of batches of rows, [B, T]."""
    tokenizer = tokenizers.Tokenizer.from_file(settings["tokenizer"])
    end, length = settings["end"], settings["row_length"]

    def encode(examples):
        found = tokenizer.encode_batch(examples["text"], add_special_tokens=False)
        joined = [number for one in found for number in (*one.ids, end)]
        stop = len(joined) // length * length
        return {"ids": [joined[start : start + length] for start in range(0, stop, length)]}

    rows = datasets.load_dataset(
        "json", data_files=settings["files"], split="train", streaming=True
    )
    rows = rows.shuffle(seed=0, buffer_size=BUFFER)
    rows = rows.map(encode, batched=True, batch_size=BATCH, remove_columns=["text"])
    loader = DataLoader(
        rows.with_format("torch"), batch_size=settings["rows"], num_workers=settings["workers"]
    )
    while True:
        yield from (batch["ids"] for batch in loader)


def processor_seconds():
    """Return the processor time of this process and of its ended workers."""
    total = 0.0
    for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN):
        usage = resource.getrusage(who)
        total += usage.ru_utime + usage.ru_stime
    return total


def main():
    settings = json.loads(sys.argv[1])
    batches = make_batches(settings)
    next(batches)
    name = f"datasets {datasets.__version__}, torch {torch.__version__}"
    print(json.dumps({"rival": name}), flush=True)
    for line in sys.stdin:
        seconds = float(line)
        tokens = 0
        started, cpu = time.monotonic(), processor_seconds()
        while time.monotonic() - started < seconds:
            tokens += next(batches).numel()
        wall, cpu = time.monotonic() - started, processor_seconds() - cpu
        print(json.dumps({"tokens": tokens, "wall": wall, "cpu": cpu}), flush=True)


if __name__ == "__main__":
    main()
