"""Paged attention: contract and float32 oracle in reference.py, portable XLA form in xla.py."""
