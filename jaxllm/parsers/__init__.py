"""What a model's text says besides text: thoughts and calls of tools. See README.md."""
