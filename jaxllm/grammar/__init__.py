"""Output that follows a grammar, whatever the model says. Imports nothing; see README.md."""
