"""vLLM on the same requests. Runs in vLLM's own environment, so it imports nothing of ours.

    python peer.py MODEL_FOLDER DTYPE [ENGINE ARGUMENTS AS JSON]
Each line on standard input is a JSON list of [prompt token ids, answer length]; each is answered by
a line {"peer": "vllm", "tokens": …, "seconds": …}.
"""

import json
import os
import sys
import time

ROWS = 64

# By itself vLLM takes most of the memory for its cache, and leaves one core to its front end, which
# has little to do here.
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
os.environ.setdefault("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")


def main() -> None:
    from vllm import LLM, SamplingParams

    folder, dtype, *more = sys.argv[1:]
    options = {"max_num_seqs": ROWS, "max_model_len": 8192, "seed": 0}
    llm = LLM(model=folder, dtype=dtype, **options | (json.loads(more[0]) if more else {}))
    for line in sys.stdin:
        work = json.loads(line)
        llm.reset_prefix_cache()
        prompts = [{"prompt_token_ids": prompt} for prompt, _ in work]
        params = [
            SamplingParams(temperature=0, max_tokens=length, ignore_eos=True, detokenize=False)
            for _, length in work
        ]
        began = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - began
        tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
        print(json.dumps({"peer": "vllm", "tokens": tokens, "seconds": seconds}), flush=True)


if __name__ == "__main__":
    main()
