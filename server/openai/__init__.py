"""OpenAI's API: request fields, answers, streams."""
