"""Building blocks of models, as Flax NNX modules over flat token batches ``[T, ...]``. See
README.md.
"""
