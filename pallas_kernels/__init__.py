"""Operations over a paged KV cache, usable without jaxllm: imports JAX only. See README.md."""
