"""Limits that the command line names too, which must not wait for what requests are made of."""

MAX_N = 128  # choices of one prompt
