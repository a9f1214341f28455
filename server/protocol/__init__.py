"""What a connection may send, how slowly, and what it is told otherwise."""
