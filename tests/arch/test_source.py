"""Rules that hold for every file of the source, read from its syntax tree."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("jaxllm", "pallas_kernels", "server")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
ALL_PYTHON = SOURCES + sorted(
    path for folder in ("scripts", "tests") for path in (ROOT / folder).rglob("*.py")
)

# Programs; dummy weights; layers, so that they are traced once. Each kernel is one jitted function.
MAY_JIT = (
    "jaxllm/runner/lowering_cache.py",
    "jaxllm/weights/loader.py",
    "jaxllm/models/decoder.py",
)
MAY_JIT += ("pallas_kernels/",)
JIT_NAMES = {"jax.jit", "jax.pmap", "nnx.jit", "flax.nnx.jit", "jax.api.jit", "pjit"}
UNSAFE_MODULES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "marshal", "shelve"}
UNSAFE_CALLS = {"eval", "exec", "yaml.load", "os.system", "torch.load", "numpy.load", "np.load"}
UNSAFE_ARGUMENTS = {"trust_remote_code", "allow_pickle"}  # may only be refused
MAX_LINES = 400


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _dotted(node: ast.expr) -> str:
    """``a.b.c`` of a name or attribute, else an empty string."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        base = _dotted(node.value)
        return f"{base}.{node.attr}" if base else ""
    return ""


def _imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and full dotted name of everything imported."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def jit_uses(source: str) -> list[int]:
    """Lines that name ``jax.jit`` or a twin of it, called, used as decorator or imported."""
    tree = ast.parse(source)
    lines = [line for line, name in _imports(tree) if name in JIT_NAMES]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and _dotted(node) in JIT_NAMES:
            lines.append(node.lineno)
    return lines


def unsafe_uses(source: str) -> list[str]:
    """Everything that could run code found in data."""
    tree = ast.parse(source)
    found = [f"{n}: {name}" for n, name in _imports(tree) if name.split(".")[0] in UNSAFE_MODULES]
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and _dotted(node.func) in UNSAFE_CALLS:
            found.append(f"{node.lineno}: {_dotted(node.func)}")
        if isinstance(node, ast.keyword) and node.arg in UNSAFE_ARGUMENTS:
            refused = isinstance(node.value, ast.Constant) and node.value.value is False
            found += [] if refused else [f"{node.value.lineno}: {node.arg}"]
    return found


@pytest.mark.parametrize(
    "source",
    ["import jax\n@jax.jit\ndef f(): ...", "import jax\nf = jax.jit(g)", "from jax import jit"],
)
def test_jit_is_seen(source: str) -> None:
    assert jit_uses(source)


@pytest.mark.parametrize(
    "source", ["import pickle", "from pickle import loads", "eval(x)", "f(trust_remote_code=True)"]
)
def test_unsafe_is_seen(source: str) -> None:
    assert unsafe_uses(source)


def test_jit_only_where_programs_are_made() -> None:
    found = {_name(path): jit_uses(path.read_text()) for path in SOURCES}
    assert not {
        name: lines for name, lines in found.items() if lines and not name.startswith(MAY_JIT)
    }


def test_nothing_runs_code_found_in_data() -> None:
    found = {_name(path): unsafe_uses(path.read_text()) for path in SOURCES}
    assert not {name: uses for name, uses in found.items() if uses}


def test_files_are_short() -> None:
    lengths = {_name(path): len(path.read_text().splitlines()) for path in ALL_PYTHON}
    assert not {name: lines for name, lines in lengths.items() if lines > MAX_LINES}


def test_every_module_says_what_it_is() -> None:
    explained = [path for path in ALL_PYTHON if path.relative_to(ROOT).parts[0] != "tests"]
    silent = [path for path in explained if not ast.get_docstring(ast.parse(path.read_text()))]
    assert not [_name(path) for path in silent]


def test_no_drawer_for_everything() -> None:
    drawers = {"utils", "helpers", "common", "misc"}
    assert not [_name(path) for path in SOURCES if path.stem in drawers]
