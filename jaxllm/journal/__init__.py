"""What an engine was asked and decided, written down as it happens, and replayed. See README.md."""
