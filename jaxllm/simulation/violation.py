"""What a simulation ends with when the engine did something that it must not do."""


class Violation(Exception):
    """``check`` names what noticed it: answers, stream, cache, progress, ..."""

    def __init__(self, check: str, message: str):
        super().__init__(f"{check}: {message}")
        self.check = check


def require(condition: object, check: str, message: str) -> None:
    """Raises a Violation, where ``assert`` would be silent under ``python -O``."""
    if not condition:
        raise Violation(check, message)
