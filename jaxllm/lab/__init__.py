"""Tools for who writes an attention variant. See README.md."""
