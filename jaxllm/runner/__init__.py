"""The device side: owner of parameters, KV cache and row buffers; one pure step. See README.md."""
