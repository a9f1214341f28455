"""Left out where the CPU is one device: ``test_on_virtual_devices.py`` runs these tests."""

import os

FLAG = "--xla_force_host_platform_device_count"
collect_ignore_glob = [] if FLAG in os.environ.get("XLA_FLAGS", "") else ["test_*.py"]
