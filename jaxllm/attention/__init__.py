"""Attention over the paged KV cache: metadata of a step, the backend seam, its implementations.
See README.md.
"""
