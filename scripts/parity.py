"""The reference's answers: logits and greedy tokens of transformers + torch in float32.

Runs in the reference environment (tests/conformance/reference_env.py), knows nothing of jaxllm.

    parity.py golden MODEL_DIR OUT.npz [--whole EVERY]  real prompts through a real model
    parity.py tiny ARCHITECTURE OUT_DIR                 a tiny random checkpoint of an architecture
    parity.py beams MODEL_DIR OUT.json                  beam search over some of the real prompts

The first two write one ``.npz``; :class:`Recording` below says what is in it.
"""

# pyright: reportMissingImports=false
# torch lives in the reference environment only

import argparse
import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

PROMPTS = Path(__file__).resolve().parents[1] / "tests" / "golden" / "prompts.json"
TOP = 32  # logits kept per position when not all are
NUM_GREEDY = 64
NUM_BEAM_TOKENS = 16
BEAMS = (
    (0, 4, 1.0),
    (7, 3, 0.0),
    (9, 5, -1.0),
    (17, 4, 1.0),
    (19, 2, 2.0),
)  # prompt, width, penalty

_BASE = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 257,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 40.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 0.5,
    "mscale_all_dim": 0.7,
    "original_max_position_embeddings": 256,
}

_LATENT = {
    "num_hidden_layers": 2,
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "n_shared_experts": 2,
    "routed_scaling_factor": 1.5,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "head_dim": 8,
    "v_head_dim": 24,
    "num_key_value_heads": 4,
}

# name -> (class in transformers, what differs from _BASE)
TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {}),
    "llama_bias": ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
    "llama3": ("LlamaForCausalLM", {"rope_parameters": _LLAMA3_ROPE}),
    "llama_linear": (
        "LlamaForCausalLM",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    ),
    "smollm2": (
        "LlamaForCausalLM",
        {
            "tie_word_embeddings": True,
            "hidden_size": 48,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
        },
    ),
    "mistral": ("MistralForCausalLM", {"sliding_window": 8}),
    "qwen2": ("Qwen2ForCausalLM", {"tie_word_embeddings": True}),
    "qwen2_window": (
        "Qwen2ForCausalLM",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3ForCausalLM", {"head_dim": 32}),
    "glm": ("GlmForCausalLM", {"partial_rotary_factor": 0.5, "attention_bias": True}),
    "glm4": ("Glm4ForCausalLM", {"partial_rotary_factor": 0.5, "attention_bias": True}),
    "smollm3": (
        "SmolLM3ForCausalLM",
        {
            "num_hidden_layers": 2,
            "no_rope_layers": [1, 0],
            "use_sliding_window": True,
            "sliding_window": 8,
        },
    ),
    "diffllama": ("DiffLlamaForCausalLM", {"num_hidden_layers": 2, "attention_bias": True}),
    "deepseek2": (
        "DeepseekV2ForCausalLM",
        {**_LATENT, "q_lora_rank": None, "rope_parameters": _YARN},
    ),
    "deepseek3": (
        "DeepseekV3ForCausalLM",
        {
            **_LATENT,
            "q_lora_rank": 24,
            "attention_bias": True,
            "num_nextn_predict_layers": 0,
            "n_group": 4,
            "topk_group": 2,
        },
    ),
}
TINY_PROMPT_LENGTHS = (1, 7, 40)  # the last is longer than every window above


def tiny_config(name: str) -> tuple[str, dict[str, Any]]:
    """Architecture and the arguments of its transformers config class."""
    architecture, changes = TINY[name]
    return architecture, {**_BASE, **changes}


@dataclass
class Recording:
    """Prompt ``i`` is the tokens ``offsets[i]:offsets[i + 1]`` of the per-position arrays.

    tokens [N] int32; logsumexp [N]; top_ids, top_logits [N, 32], largest first;
    full_index [F] positions (in N) whose whole logits are full_logits [F, V];
    greedy [P, 64] int32 tokens after each prompt, EOS not honoured; margins [P, 64] by which the
    reference preferred each of them to its second choice. Floats are float32.
    """

    tokens: list[int] = field(default_factory=list)
    offsets: list[int] = field(default_factory=lambda: [0])
    logsumexp: list[np.ndarray] = field(default_factory=list)
    top_ids: list[np.ndarray] = field(default_factory=list)
    top_logits: list[np.ndarray] = field(default_factory=list)
    full_index: list[int] = field(default_factory=list)
    full_logits: list[np.ndarray] = field(default_factory=list)
    greedy: list[list[int]] = field(default_factory=list)
    margins: list[list[float]] = field(default_factory=list)

    def add(self, token_ids: list[int], logits: np.ndarray, full: list[int]) -> None:
        """``logits`` [T, V] of one prompt, the whole of those at ``full`` kept."""
        start = self.offsets[-1]
        order = np.argsort(-logits, axis=1, kind="stable")[:, :TOP].astype(np.int32)
        peak = logits.max(axis=1, keepdims=True)
        total = np.exp((logits - peak).astype(np.float64)).sum(axis=1)
        self.tokens += token_ids
        self.offsets.append(start + len(token_ids))
        self.logsumexp.append((peak[:, 0] + np.log(total)).astype(np.float32))
        self.top_ids.append(order)
        self.top_logits.append(np.take_along_axis(logits, order, axis=1))
        self.full_index += [start + position for position in full]
        self.full_logits.append(logits[full])

    def save(self, path: Path, *, compress: bool = False) -> None:
        write = np.savez_compressed if compress else np.savez
        write(
            path,
            tokens=np.asarray(self.tokens, np.int32),
            offsets=np.asarray(self.offsets, np.int32),
            logsumexp=np.concatenate(self.logsumexp),
            top_ids=np.concatenate(self.top_ids),
            top_logits=np.concatenate(self.top_logits),
            full_index=np.asarray(self.full_index, np.int32),
            full_logits=np.concatenate(self.full_logits),
            greedy=np.asarray(self.greedy, np.int32),
            margins=np.asarray(self.margins, np.float32),
        )


def forward(model: Any, token_ids: list[int]) -> np.ndarray:
    """Logits [T, V] float32 of the whole prompt at once."""
    import torch

    with torch.inference_mode():
        return model(torch.tensor([token_ids])).logits[0].float().numpy()


def greedy(model: Any, prompts: list[list[int]], count: int) -> tuple[list[Any], list[Any]]:
    """``count`` most likely tokens after each prompt, and the margin of each over the second.

    The prompts run as one batch, padded on the left.
    """
    import torch

    longest = max(map(len, prompts))
    feed = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache = None
    tokens: list[Any] = []
    margins: list[Any] = []
    with torch.inference_mode():
        for _ in range(count):
            out = model(
                feed,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            cache = out.past_key_values
            best = out.logits[:, -1].float().topk(2)
            tokens.append(best.indices[:, 0])
            margins.append(best.values[:, 0] - best.values[:, 1])
            feed = best.indices[:, :1]
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            positions = positions[:, -1:] + 1
    return torch.stack(tokens, 1).tolist(), torch.stack(margins, 1).tolist()


def record(model: Any, prompts: list[list[int]], *, full: dict[int, list[int]] | None) -> Recording:
    """``full``: prompt -> positions whose whole logits are kept; None keeps all."""
    recording = Recording()
    for index, token_ids in enumerate(prompts):
        logits = forward(model, token_ids)
        kept = list(range(len(token_ids))) if full is None else full.get(index, [])
        recording.add(token_ids, logits, kept)
    recording.greedy, recording.margins = greedy(model, prompts, NUM_GREEDY)
    return recording


def beams(model_dir: Path, out: Path) -> None:
    """Write a list of searches: prompt, settings, and the answers found with their scores."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    prompts = encoded(model_dir)
    searches: list[dict[str, Any]] = []
    for index, width, length_penalty in BEAMS:
        found = model.generate(
            torch.tensor([prompts[index]]),
            attention_mask=torch.ones(1, len(prompts[index]), dtype=torch.long),
            num_beams=width,
            num_return_sequences=width,
            max_new_tokens=NUM_BEAM_TOKENS,
            length_penalty=length_penalty,
            early_stopping="never",
            do_sample=False,
            pad_token_id=0,
            output_scores=True,
            return_dict_in_generate=True,
        )
        answers = [
            [
                int(t)
                for t, place in zip(row[len(prompts[index]) :], places, strict=True)
                if place >= 0
            ]
            for row, places in zip(found.sequences, found.beam_indices, strict=True)
        ]
        searches.append(
            {
                "prompt": prompts[index],
                "beam_width": width,
                "length_penalty": length_penalty,
                "answers": answers,
                "scores": [round(float(score), 5) for score in found.sequences_scores],
            }
        )
    out.write_text("[\n" + ",\n".join(map(json.dumps, searches)) + "\n]\n")


def encoded(model_dir: Path) -> list[list[int]]:
    """Token ids of the real prompts."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    prompts = []
    for prompt in json.loads(PROMPTS.read_text()):
        text = prompt.get("text")
        if text is None:
            text = tokenizer.apply_chat_template(
                prompt["messages"], tokenize=False, add_generation_prompt=True
            )
        prompts.append(tokenizer(text, add_special_tokens="text" in prompt)["input_ids"])
    return prompts


def golden(model_dir: Path, out: Path, whole: int | None) -> None:
    """``whole``: of each so-manieth prompt alone, but with whole logits everywhere."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        model_dir, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    prompts = encoded(model_dir)[::whole]
    some = {index: [len(prompts[index]) - 1] for index in range(0, len(prompts), 5)}
    recording = record(model, prompts, full=None if whole else some)
    recording.save(out, compress=not whole)


def tiny(name: str, out: Path) -> None:
    """Write OUT/config.json, OUT/model.safetensors and OUT/reference.npz."""
    import torch
    import transformers

    architecture, arguments = tiny_config(name)
    model_class = getattr(transformers, architecture)
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**arguments, attn_implementation="eager")).eval()
    with torch.no_grad():  # what is born as all ones or zeros would hide a weight that is not used
        for tensor in model.state_dict().values():
            if tensor.ndim == 1:
                tensor.add_(0.1 * torch.randn_like(tensor))
    model.save_pretrained(out)
    random = np.random.RandomState(0)
    lengths = TINY_PROMPT_LENGTHS
    prompts = [random.randint(0, arguments["vocab_size"], n).tolist() for n in lengths]
    record(model, prompts, full=None).save(out / "reference.npz")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    commands = parser.add_subparsers(dest="command", required=True)
    of_model = commands.add_parser("golden")
    of_model.add_argument("model_dir", type=Path)
    of_model.add_argument("out", type=Path)
    of_model.add_argument(
        "--whole", type=int, metavar="EVERY", help="whole logits, of each EVERY-th prompt alone"
    )
    of_beams = commands.add_parser("beams")
    of_beams.add_argument("model_dir", type=Path)
    of_beams.add_argument("out", type=Path)
    of_tiny = commands.add_parser("tiny")
    of_tiny.add_argument("name", choices=TINY, nargs="+")
    of_tiny.add_argument("out", type=Path)
    arguments = parser.parse_args()

    started = time.monotonic()
    if arguments.command == "golden":
        golden(arguments.model_dir, arguments.out, arguments.whole)
    elif arguments.command == "beams":
        beams(arguments.model_dir, arguments.out)
    else:
        for name in arguments.name:
            tiny(name, arguments.out / name)
    print(f"parity: {arguments.command} took {time.monotonic() - started:.1f} s")


if __name__ == "__main__":
    main()
