"""KV blocks on disk, for an engine that runs and for the next one. See README.md."""
