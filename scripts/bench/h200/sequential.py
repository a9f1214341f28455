"""The first requests of workload B by transformers, one after the other: the same shape, random
weights in bfloat16, greedy, a bare loop over its KV cache (quicker than ``generate()``).
"""

# pyright: reportMissingImports=false
# torch and transformers come with the machine

import json
import time
from typing import Any

from jaxllm.bench.workload import workload_b
from scripts.bench.h200.part import Part, main
from scripts.bench.h200.settings import MODEL, ROOT, TINY_SHAPE

REQUESTS = 4


def measure(part: Part) -> dict[str, Any]:
    import torch
    import transformers

    shape = json.loads((ROOT / MODEL / "config.json").read_text()) | (
        TINY_SHAPE if part.tiny else {}
    )
    config: Any = transformers.LlamaConfig(**shape)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model: Any = transformers.LlamaForCausalLM(config).eval()
    work = workload_b()
    chosen = list(zip(work.prompts, work.output_lens, strict=True))[:REQUESTS]
    if part.tiny:
        chosen = [(prompt[:16], 4) for prompt, _ in chosen]

    def run(prompt: list[int], count: int) -> None:
        feed, cache = torch.tensor([prompt], device=device), None
        for _ in range(count):
            out = model(feed, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = out.past_key_values
            feed = out.logits[:, -1].argmax(-1, keepdim=True)
        feed.cpu()

    with torch.inference_mode():
        run(chosen[0][0], 2)  # warm-up
        started = time.perf_counter()
        for prompt, count in chosen:
            run(prompt, count)
        seconds = time.perf_counter() - started
    tokens = sum(count for _, count in chosen)
    return {
        "versions": {"transformers": transformers.__version__, "torch": torch.__version__},
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "requests": len(chosen),
        "output_tokens": tokens,
        "seconds": seconds,
        "output_tokens_per_second": tokens / seconds,
    }


if __name__ == "__main__":
    main(measure)
