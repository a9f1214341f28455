"""Text to token ids and back, and chat messages to text. No model, no sampling, no JAX."""
