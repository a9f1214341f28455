"""Frozen dataclasses: what was asked (engine), what the model is (model), what was decided (plan).
No JAX.
"""
