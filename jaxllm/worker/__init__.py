"""The engine process: the only place where scheduling meets the device. See README.md."""
