"""What a Python file of the operator's holds: variants and layers are taken from there.

Such a file runs in the engine: it is what the operator names on the command line, and never what a
checkpoint or a request brings.
"""

import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jaxllm.errors import ConfigError, JaxLLMError
from pallas_kernels.attention.variant import VariantError


def split_name(name: str) -> tuple[Path, str] | None:
    """(file, attribute or "") of "FILE.py" or "FILE.py:NAME"; None for any other name."""
    file, found, attribute = name.partition(".py")
    if not found or (attribute and not attribute.startswith(":")):
        return None
    return Path(f"{file}.py"), attribute.removeprefix(":")


def from_user_file(path: Path, attribute: str, wanted: Callable[[Any], bool], what: str) -> Any:
    """The ``attribute`` of the file that is ``wanted``, or its only one; ``what`` it is called.

    Raises:
        ConfigError: there is no such file or attribute, or it does not run.
        VariantError: as the file raised it.
    """
    if not path.is_file():
        raise ConfigError(f"There is no file {path} to take an {what} from.")
    spec = importlib.util.spec_from_file_location(f"attention_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{path} is no Python file.")
    module = importlib.util.module_from_spec(spec)
    try:
        with _neighbours(path):
            spec.loader.exec_module(module)
    except (VariantError, JaxLLMError):
        raise
    except Exception as error:
        raise ConfigError(f"{path} does not run: {type(error).__name__}: {error}") from error
    found = {key: value for key, value in vars(module).items() if wanted(value)}
    if attribute in found:
        return found[attribute]
    if not attribute and len(found) == 1:
        return next(iter(found.values()))
    raise ConfigError(f"{path}: name one of its {what}s ({', '.join(found) or 'none'}).")


@contextmanager
def _neighbours(path: Path) -> Iterator[None]:
    """A file may import those beside it, wherever the engine was started."""
    folder = str(path.resolve().parent)
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)
