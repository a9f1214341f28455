"""One file per attention backend; the table is in jaxllm/attention/select.py."""
