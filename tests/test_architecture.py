"""Imports point down only, and the house has no room without a name."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "liveavatar_jax"

LEVELS = {
    "types": 0,
    "config": 0,
    "paths": 0,
    "models": 1,
    "diffusion": 2,
    "stream": 3,
    "parallel": 3,
    "data": 3,
    "metrics": 3,
    "weights": 3,
    "generate": 4,
    "evaluate": 4,
    "protocol": 4,
    "rows": 4,
    "encode": 4,
    "player": 4,
    "devices": 4,
    "doctor": 4,
    "bench": 4,
    "occupancy": 4,
    "plan": 4,
    "cli": 4,
    "train": 4,
    "serve": 4,
    "configs": 4,
}
HOST_ONLY = {"data"}  # numpy rooms: an import of JAX would start a device
FORBIDDEN_NAMES = {"utils", "util", "common", "helpers", "helper", "misc"}


def sources() -> list[Path]:
    tops = [PACKAGE, *(ROOT / name for name in ("train", "serve", "configs"))]
    return sorted(path for top in tops for path in top.rglob("*.py"))


def room(module: str) -> str:
    parts = module.split(".")
    return parts[1] if parts[0] == "liveavatar_jax" and len(parts) > 1 else parts[0]


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names if node.module == "liveavatar_jax" else {node.module}
    return found


def own_room(path: Path) -> str:
    return room(".".join(path.relative_to(ROOT).with_suffix("").parts))


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path: Path):
    if path.name == "__init__.py":
        assert not imports(path), f"{path.name} re-exports; import from the file itself"
        return
    level = LEVELS[own_room(path)]
    for module in imports(path):
        if room(module) in LEVELS and room(module) != own_room(path):
            assert LEVELS[room(module)] <= level, f"{path} (L{level}) imports {module}"


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_names_say_what_is_inside(path: Path):
    assert path.stem not in FORBIDDEN_NAMES
    assert not path.stem.startswith("base_") and not path.stem.endswith(("_v2", "_new"))


def test_no_torch_and_no_jax_on_the_host_side():
    for path in sources():
        names = {module.split(".")[0] for module in imports(path)}
        assert "torch" not in names, path
        arithmetic = own_room(path) == "metrics" and path.stem != "readers"
        if own_room(path) in HOST_ONLY or arithmetic:
            assert not names & {"jax", "flax"}, path


def test_every_room_has_a_level():
    assert {own_room(path) for path in sources()} - {"__init__", "liveavatar_jax"} <= set(LEVELS)
