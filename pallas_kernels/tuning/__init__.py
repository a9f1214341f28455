"""Tuned configs of the kernels: data, one file per kind of device."""
