"""HF `generate` for benchmarks/engine.py: questions on stdin, answers on stdout, a JSON a line.

It runs in an environment with torch and transformers, and imports nothing of this repository.
"""

import json
import random
import resource
import sys
import time

import torch
from transformers import AutoModelForCausalLM

CONVERSATIONS, TURNS, FIRST, ADDED, SAMPLED = 32, 4, 192, 40, 32


def load(directory):
    """Return the model in its fastest form for experts."""
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, experts_implementation="grouped_mm"
    )
    return model.eval()


def generate(model, prompts, new, greedy=False):
    """Continue prompts of one length; return the new ids."""
    options = {"do_sample": False} if greedy else {"do_sample": True, "temperature": 1.0}
    options |= {"top_k": 0, "top_p": 1.0} if not greedy else {}
    ids = torch.tensor(prompts)
    with torch.inference_mode():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            min_new_tokens=new,
            eos_token_id=None,
            pad_token_id=0,
            **options,
        )
    return out[:, ids.shape[1] :].tolist()


def run(model, workload, seed, vocabulary):
    """Run one workload; return the number of sampled tokens."""
    rng = random.Random(seed)

    def random_ids(count):
        return [rng.randrange(8, vocabulary) for _ in range(count)]

    if workload != "sessions":
        prompts = [random_ids(64) for _ in range(32 if workload == "batch32" else 1)]
        return sum(map(len, generate(model, prompts, 64)))
    contexts = [random_ids(FIRST - ADDED) for _ in range(CONVERSATIONS)]
    for _ in range(TURNS):
        contexts = [ids + random_ids(ADDED) for ids in contexts]
        new = generate(model, contexts, SAMPLED)
        contexts = [ids + more for ids, more in zip(contexts, new, strict=True)]
    return CONVERSATIONS * TURNS * SAMPLED


def main():
    model = load(sys.argv[1])
    for line in sys.stdin:
        question = json.loads(line)
        if "prompts" in question:
            ids = generate(model, question["prompts"], question["new"], question["greedy"])
            print(json.dumps({"ids": ids}), flush=True)
            continue
        before = resource.getrusage(resource.RUSAGE_SELF)
        started = time.monotonic()
        tokens = run(model, question["workload"], question["seed"], question["vocabulary"])
        wall = time.monotonic() - started
        after = resource.getrusage(resource.RUSAGE_SELF)
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        print(json.dumps({"tokens": tokens, "wall": wall, "cpu": cpu}), flush=True)


if __name__ == "__main__":
    main()
