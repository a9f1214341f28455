"""The engine core: owns the scheduler and the step pipeline. No text, no JAX."""
