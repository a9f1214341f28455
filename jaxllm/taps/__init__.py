"""Activations that requests read and change: names, limits and checks. Knows no JAX."""
