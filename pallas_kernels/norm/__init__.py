"""RMS normalisation, with the residual add before it."""
