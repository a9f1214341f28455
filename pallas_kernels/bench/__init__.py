"""The operations timed beside the ceilings of the device they run on."""
