"""Anthropic's API over EngineClient. See README.md."""
