"""The real scheduler and engine core under a seeded world: no device, no JAX. See README.md."""
