"""Speed of the engine without a server: what ``jaxllm bench`` runs. Host code; JAX is the LLM's."""
