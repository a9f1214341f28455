"""Scheduling: host-side, pure Python, no JAX, no threads, no wall clock. See README.md."""
