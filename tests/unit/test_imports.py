"""The direction of imports: each package may import those before it, never those after."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ALLOWED = {
    "config": set(),
    "metrics": set(),
    "parallel": {"config"},
    "planner": {"config"},
    "attention": {"config", "metrics", "parallel"},
    "elimination": {"config", "metrics", "parallel", "attention"},
    "model": {"config", "metrics", "parallel", "attention", "elimination"},
    "data": {"config", "metrics"},
    "sync": {"config", "metrics", "parallel"},
    "report": {"config", "metrics"},
    "generation": {"config", "attention", "model", "data"},
    "eval": {"config", "metrics", "parallel", "attention", "model", "data", "generation", "report"},
}
ALLOWED["train"] = set(ALLOWED) - {"eval", "generation", "report"}
# `ltrain env` and `ltrain report` read configurations; errors are configuration errors everywhere.
BASE = "ltrain.config.base"


def _imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.split(".")[0] in ("ltrain", "ltrain_kernels", "kernels")}


@pytest.mark.parametrize("package", sorted(ALLOWED))
def test_a_package_imports_only_those_below_it(package):
    for path in (ROOT / "ltrain" / package).rglob("*.py"):
        for name in _imports(path):
            parts = name.split(".")
            if parts[0] != "ltrain" or len(parts) < 2 or name.startswith(BASE):
                continue
            assert parts[1] in ALLOWED[package] | {package}, f"{path.relative_to(ROOT)} imports {name}"


def test_the_kernels_know_nothing_of_ltrain():
    for path in (ROOT / "kernels").rglob("*.py"):
        assert not [n for n in _imports(path) if n.split(".")[0] != "ltrain_kernels"], path


def test_the_solver_needs_no_torch():
    for path in (ROOT / "ltrain" / "planner").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.split(".")[0] == "torch" for name in names), path
