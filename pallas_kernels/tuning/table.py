"""The file of tuned configs of one kind of device: its format, checks and look-up.

An entry says for one operation which fields of its default config to replace, and is used only
where the default is still the one that it was found better than. So shapes that the code gives
another default keep it, and a default that changes in the code is not overruled by old figures.
Shapes of one default that want different configs are told apart by ``where``.
Knows no kernel.
"""

import dataclasses
import functools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

FOLDER = Path(__file__).parent
Fields = dict[str, bool | int | float | str]


@dataclass(frozen=True)
class TunedConfig:
    op: str
    replaces: Fields  # of the default config
    config: Fields  # the same fields, as tuned
    microseconds: dict[str, float]  # per call, by shape, under ``config``
    speedup: float | None  # geometric mean over the shapes, against the default; None: not measured
    made_by: dict[str, Any]  # what makes figures comparable: versions, commit, command
    # Facts of a shape that the default does not tell, such as {"page": 16}; {}: any shape.
    where: Fields = dataclasses.field(default_factory=dict[str, bool | int | float | str])


@dataclass(frozen=True)
class TuningTable:
    device: str  # JAX's device_kind
    tuned: tuple[TunedConfig, ...]

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "TuningTable":
        """Raises ValueError for anything that ``to_json`` does not write."""
        table = _fields(cls, json.loads(text), "the table")
        entries = _of_type(table["tuned"], list, "tuned")
        return cls(
            device=_of_type(table["device"], str, "device"),
            tuned=tuple(_entry(item, f"tuned[{i}]") for i, item in enumerate(entries)),
        )


def slug(device_kind: str) -> str:
    """``"NVIDIA H200"`` gives ``"nvidia-h200"``."""
    return re.sub(r"[^a-z0-9]+", "-", device_kind.lower()).strip("-")


@functools.cache
def load_table(device_kind: str, folder: Path = FOLDER) -> TuningTable | None:
    """None where there is no file for the device. Raises ValueError that names a file it cannot
    use.
    """
    path = folder / f"{slug(device_kind)}.json"
    if not path.is_file():
        return None
    try:
        return TuningTable.from_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}. {_REMEDY}") from error


def tuned[Config: "DataclassInstance"](
    op: str,
    device_kind: str,
    default: Config,
    folder: Path = FOLDER,
    *,
    where: Mapping[str, bool | int | float | str] | None = None,
) -> Config:
    """The config of ``op`` for the device, which is ``default`` where no entry replaces it. Of the
    entries that do, that with the most facts in ``where``, all of which must be among the given.

    Raises:
        ValueError: the device's file does not fit the format or the config's class.
    """
    table, facts = load_table(device_kind, folder), where or {}
    best, most = default, -1
    for index, entry in enumerate(table.tuned if table else ()):
        if entry.op != op or entry.where.items() - facts.items() or len(entry.where) <= most:
            continue
        try:
            _check_fields(entry, default)
            if all(getattr(default, name) == value for name, value in entry.replaces.items()):
                best, most = dataclasses.replace(default, **entry.config), len(entry.where)
        except ValueError as error:
            path = folder / f"{slug(device_kind)}.json"
            raise ValueError(f"{path}: tuned[{index}] ({op}): {error}. {_REMEDY}") from error
    return best


_REMEDY = "Make it anew with scripts/tune_kernels.py, or remove it to use the defaults."


def _check_fields(entry: TunedConfig, default: "DataclassInstance") -> None:
    types = {
        field.name: type(getattr(default, field.name)) for field in dataclasses.fields(default)
    }
    for fields in (entry.replaces, entry.config):
        unknown = sorted(fields.keys() - types.keys())
        if unknown:
            raise ValueError(f"{type(default).__name__} has no {', '.join(unknown)}")
        for name, value in fields.items():
            _of_type(value, types[name], name)


def _entry(data: Any, where: str) -> TunedConfig:
    entry = _fields(TunedConfig, data, where)
    for name in ("replaces", "config", "microseconds", "made_by", "where"):
        _of_type(entry[name], dict, f"{where}.{name}")
    if entry["replaces"].keys() != entry["config"].keys():
        raise ValueError(f"{where}: replaces and config must have the same fields")
    for shape, figure in entry["microseconds"].items():
        _of_type(figure, float, f"{where}.microseconds[{shape!r}]")
    if entry["speedup"] is not None:
        _of_type(entry["speedup"], float, f"{where}.speedup")
    _of_type(entry["op"], str, f"{where}.op")
    return TunedConfig(**entry)


def _fields(cls: type, data: Any, where: str) -> dict[str, Any]:
    """``data``, if it has exactly the fields of the dataclass."""
    names = {field.name for field in dataclasses.fields(cls)}
    given = _of_type(data, dict, where).keys()
    if given != names:
        unknown, missing = sorted(given - names), sorted(names - given)
        raise ValueError(f"{where} has unknown keys {unknown} and lacks {missing}")
    return data


def _of_type[T](value: Any, kind: type[T], where: str) -> T:
    if type(value) is not kind:  # a bool is no number here
        raise ValueError(f"{where} must be {kind.__name__}, not {value!r}")
    return value
