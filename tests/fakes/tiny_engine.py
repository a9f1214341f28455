"""A real engine on a tiny random model: real programs, real scheduler, no files, no tokenizer."""

from collections.abc import Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp

from jaxllm.attention.backends.xla import BACKEND
from jaxllm.config.model import ModelConfig, RopeConfig
from jaxllm.config.plan import EnginePlan, make_buckets
from jaxllm.core.integrity import check_integrity
from jaxllm.core.scheduler import Scheduler
from jaxllm.engine.engine_core import EngineCore
from jaxllm.grammar.compiler import GrammarCompiler
from jaxllm.messages import EngineCoreRequest
from jaxllm.models.params import ModelDef, Params, model_def
from jaxllm.runner.model_runner import ModelRunner
from jaxllm.runner.programs import Programs
from jaxllm.sampling_params import SamplingParams
from jaxllm.simulation.answers import Answers
from jaxllm.simulation.oracle import Answer
from tests.fakes.ascii_tokenizer import ascii_tokenizer

TINY = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=96,
    hidden_size=32,
    intermediate_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    rope=RopeConfig(theta=10000.0, dim=8),
    norm_eps=1e-6,
    max_position_embeddings=256,
    sliding_windows=(None, 24),
)


def tiny_plan(**changes: object) -> EnginePlan:
    plan = EnginePlan(
        model=TINY,
        dtype="float32",
        max_model_len=128,
        max_num_seqs=8,
        max_num_batched_tokens=64,
        block_size=16,
        num_blocks=65,
        buckets=make_buckets((2, 8), (32, 64), 8),
        attention_backend="xla",
        attention_reason="test",
        host_blocks=16,
    )
    return replace(plan, **changes)  # pyright: ignore[reportArgumentType]


def random_params(model: ModelDef, seed: int = 0) -> Params:
    """Large enough to make the logits of different tokens differ clearly."""
    keys = jax.random.split(jax.random.key(seed), len(model.specs))
    return tuple(
        jnp.ones(spec.shape, spec.dtype)
        if name.endswith("norm.weight")
        else jax.random.normal(key, spec.shape, spec.dtype) * jnp.asarray(0.4, spec.dtype)
        for name, spec, key in zip(model.names, model.specs, keys, strict=True)
    )


class TinyEngine:
    """Compiled once per plan; ``core()`` gives a fresh EngineCore over the same programs."""

    def __init__(self, plan: EnginePlan | None = None):
        self.plan = plan or tiny_plan()
        self.model = model_def(self.plan.model, self.plan.dtype)
        self.params = random_params(self.model)
        self.programs = Programs(self.plan, self.model, BACKEND)
        self.programs.compile(threads=2, progress=False)

    def runner(self, plan: EnginePlan | None = None) -> ModelRunner:
        compiler = GrammarCompiler(ascii_tokenizer)
        return ModelRunner(plan or self.plan, self.params, self.programs, compiler)

    def core(self, *, async_scheduling: bool = True, **changes: object) -> EngineCore:
        """``changes`` of the plan must keep the shapes of the compiled programs."""
        plan = replace(self.plan, **changes)  # pyright: ignore[reportArgumentType]
        return EngineCore(Scheduler(plan), self.runner(), async_scheduling=async_scheduling)

    def run(
        self, requests: Sequence[EngineCoreRequest], core: EngineCore | None = None, join: int = 0
    ) -> dict[str, Answer]:
        """Answers of all requests, run together; one joins every ``join`` steps (0: all at
        once).
        """
        core = core or self.core()
        answers = Answers()
        for request in requests:
            answers.expect(request.request_id)
        waiting = list(requests)
        step = 0
        while waiting or core.has_work():
            while waiting and (join == 0 or step % join == 0):
                core.add_request(waiting.pop(0))
                if join:
                    break
            step += 1
            answers.take(core.step())
            check_integrity(core.scheduler)
        return answers.by_id


def request(
    request_id: str, prompt: Sequence[int], max_tokens: int = 8, **params: object
) -> EngineCoreRequest:
    eos = params.pop("eos_token_ids", ())
    bad_words = params.pop("bad_words_token_ids", ())
    grammar, thoughts = params.pop("grammar", ""), params.pop("thoughts", None)
    sampling = {"temperature": 0.0, "seed": 0, "max_tokens": max_tokens} | params
    return EngineCoreRequest(
        request_id,
        tuple(prompt),
        SamplingParams(**sampling),  # pyright: ignore[reportArgumentType]
        max_tokens,
        eos,  # pyright: ignore[reportArgumentType]
        bad_words,  # pyright: ignore[reportArgumentType]
        grammar,  # pyright: ignore[reportArgumentType]
        thoughts,  # pyright: ignore[reportArgumentType]
    )
