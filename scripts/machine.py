"""What stands beside figures that are times: the machine, and what else it had to do."""

import os
import platform
from typing import Any


def machine() -> dict[str, Any]:
    """To be asked before the work begins. ``load``: processes that wanted a processor, on average
    over the last minute; with more of them than processors, times say little.
    """
    load = round(os.getloadavg()[0], 1)
    return {"python": platform.python_version(), "processors": os.cpu_count(), "load": load}
