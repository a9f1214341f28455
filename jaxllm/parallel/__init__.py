"""One model on several devices of a host. See README.md."""
