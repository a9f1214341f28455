"""The text side of the engine: prompts to token ids, token ids to text. No JAX. See README.md."""
