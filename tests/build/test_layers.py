"""Who may import whom: cli, training, models, convert, inference -> nn -> functional -> ops -> kernels."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fusedres.kernels

PACKAGE = Path(fusedres.__file__).parent
LAYERS = [
    {"kernels"},
    {"ops"},
    {"functional"},
    {"nn"},
    {"cli", "convert", "inference", "models", "training", "verification", "__main__"},
]
# Leaves that anyone may import; the package itself and what reports on it see everything.
ANYONE = {"_version", "_host_memory", "_C"}
ABOVE_ALL = {"__init__", "_info"}


def level(layer: str) -> int:
    return next(i for i, names in enumerate(LAYERS) if layer in names)


def imported_modules(path: Path, module: str) -> list[str]:
    """Absolute names of what a file of the package imports, wherever in the file the statement stands."""
    found = []
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                base = ".".join([*parents[: len(parents) - node.level + 1], *([base] if base else [])])
            found += [f"{base}.{alias.name}" for alias in node.names]
    return found


def modules() -> dict[str, Path]:
    """Dotted name -> file, kernels included, wherever the installation keeps them."""
    roots = {"fusedres": PACKAGE, "fusedres.kernels": Path(fusedres.kernels.__file__).parent}
    found = {}
    for prefix, root in roots.items():
        for path in sorted(root.rglob("*.py")):
            parts = [prefix, *path.relative_to(root).with_suffix("").parts]
            found[".".join(parts).removesuffix(".__init__") if parts[1:] != ["__init__"] else prefix] = path
    return found


MODULES = modules()


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down(module):
    own = module.split(".")[1] if "." in module else "__init__"
    if own in ABOVE_ALL:
        return
    for target in imported_modules(MODULES[module], module):
        parts = target.split(".")
        if parts[0] != "fusedres" or len(parts) == 1:
            continue
        layer = parts[1]
        if layer in ANYONE or own in ANYONE or layer == own:
            assert own not in ANYONE or layer in ANYONE, f"{module} is a leaf, but imports {target}"
            continue
        if layer in ABOVE_ALL or not any(layer in names for names in LAYERS):
            # a name of the package itself (`from .. import __version__`): only for the top layer
            assert level(own) == len(LAYERS) - 1, f"{module} imports {target} from the package itself"
            continue
        assert level(layer) <= level(own), f"{module} imports {target}, which is above it"


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("fusedres.kernels")])
def test_kernels_import_torch_and_triton_only(module):
    allowed = {"__future__", "torch", "triton", "fusedres", *sys.stdlib_module_names}
    for target in imported_modules(MODULES[module], module):
        assert target.split(".")[0] in allowed
        assert not target.startswith("fusedres.") or target.startswith("fusedres.kernels")


@pytest.mark.parametrize("module", MODULES)
def test_imports_inside_are_relative(module):
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            assert all(alias.name.split(".")[0] != "fusedres" for alias in node.names), f"{module}, line {node.lineno}"
        elif isinstance(node, ast.ImportFrom) and not node.level:
            assert (node.module or "").split(".")[0] != "fusedres", f"{module}, line {node.lineno}"


def test_import_is_light():
    """``import fusedres`` brings torch and nothing that is large or optional."""
    optional = ["triton", "matplotlib", "rich", "sklearn", "scipy", "PIL", "torchvision", "pandas", "tqdm"]
    code = "import sys, torch; before = set(sys.modules); import fusedres; print(*set(sys.modules) - before)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(optional) & set(result.stdout.split()) == set()


def test_importing_leaves_allocator_and_threads_alone():
    code = (
        "import os, torch; threads = torch.get_num_threads(); environ = dict(os.environ); import fusedres;"
        "assert torch.get_num_threads() == threads; assert dict(os.environ) == environ"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
