"""Drawing one token per row from truncated softmax distributions."""
