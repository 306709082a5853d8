"""The rules of the house, read off the source: who may import whom, what no file may hold, how large a file may be."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from peftcli.methods import registry

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "peftcli"
FILES = sorted(PACKAGE.rglob("*.py"))

# Lowest first. A part imports only from rows above its own: parts in one row are siblings, which know nothing of each other.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("collector", "errors", "launch", "redact"),
    ("kernels", "report"),
    ("quantization",),
    ("methods", "environment"),
    ("recipe", "interchange"),
    ("data",),
    ("tasks", "plan"),
    ("model", "generate", "planner"),
    ("liveness",),
    ("train", "evaluate", "merge", "estimate", "result", "output"),
    ("account", "adapters", "probe", "forecast", "lock"),
    ("run", "combine", "advise"),
    ("verify",),
    ("commands", "cli_options", "ending"),
    ("cli_repeat",),
    ("cli",),
    ("__main__",),
)
RANK = {part: rank for rank, row in enumerate(LAYERS) for part in row}
# Parts that have to stay usable by themselves, and what they never import from outside.
STRANGERS = {
    "methods": {"accelerate", "transformers", "datasets", "bitsandbytes"},
    "recipe": {"torch", "accelerate", "transformers", "datasets"},
    "report": {"torch", "accelerate", "transformers", "datasets"},
    "kernels": {"accelerate", "datasets", "pydantic"},
    "errors": {"torch", "pydantic", "rich", "typer"},
}
MOST_LINES, MOST_LINES_OF_A_METHOD = 450, 200


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path) for path in FILES}


def part_of(module: str) -> str:
    """``peftcli.data.batching`` -> ``data``; the package itself (its version) is no part."""
    return module.split(".")[1] if "." in module else ""


def place(path: Path, node: ast.AST) -> str:
    return f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}"


def imports(path: Path) -> Iterator[tuple[ast.AST, str, str | None]]:
    """(node, module, name) of every import, nested ones included; ``from peftcli import run`` imports the module ``peftcli.run``."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node, alias.name, None
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{place(path, node)}: a relative import; write the module's whole name"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield (node, inner, None) if inner in MODULES else (node, str(node.module), alias.name)


def local_names(path: Path) -> dict[str, str]:
    """The names under which modules of ours are known in a file."""
    known = {}
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if f"{node.module}.{alias.name}" in MODULES:
                    known[alias.asname or alias.name] = f"{node.module}.{alias.name}"
        elif isinstance(node, ast.Import):
            known.update({alias.asname: alias.name for alias in node.names if alias.asname and alias.name in MODULES})
    return known


def called(node: ast.AST) -> str:
    """``os.system`` for the call ``os.system(...)``."""
    if isinstance(node, ast.Attribute):
        return f"{called(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def test_every_part_has_its_place() -> None:
    assert {part_of(module) for module in MODULES} - {""} == set(RANK)


def test_imports_point_down() -> None:
    wrong = []
    for path in FILES:
        own = part_of(module_name(path))
        for node, module, _ in imports(path):
            other = part_of(module)
            if module.split(".")[0] == "peftcli" and other and other != own and RANK[other] >= RANK.get(own, -1):
                wrong.append(f"{place(path, node)}: {own or 'peftcli'} imports {other}, which is not below it")
    assert not wrong, "\n".join(wrong)


def test_parts_that_stand_alone_do() -> None:
    wrong = [
        f"{place(path, node)}: {part} imports {module}"
        for path in FILES
        for node, module, _ in imports(path)
        for part in [part_of(module_name(path))]
        if module.split(".")[0] in STRANGERS.get(part, ())
    ]
    assert not wrong, "\n".join(wrong)


def test_private_names_stay_at_home() -> None:
    wrong = []
    for path in FILES:
        own = module_name(path)
        for node, module, name in imports(path):
            if name is not None and module.startswith("peftcli") and module != own and name.startswith("_") and not name.startswith("__"):
                wrong.append(f"{place(path, node)}: {name} is private to {module}")
        known = local_names(path)
        for node in ast.walk(tree(path)):
            if not (isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in known):
                continue
            if node.attr.startswith("_") and not node.attr.startswith("__"):
                wrong.append(f"{place(path, node)}: {node.attr} is private to {known[node.value.id]}")
    assert not wrong, "\n".join(wrong)


def method_modules() -> set[str]:
    return {registry.get(name).__module__ for name in registry.names()}


@pytest.mark.parametrize("part", ["train", "run", "evaluate", "report", "output", "result", "merge", "estimate", "plan", "account"])
def test_nothing_above_the_registry_names_a_method(part: str) -> None:
    wrong = []
    for path in FILES:
        if part_of(module_name(path)) != part:
            continue
        wrong += [f"{place(path, node)}: imports {module}" for node, module, _ in imports(path) if module in method_modules()]
        for node in ast.walk(tree(path)):
            # The folder of a result is called `adapter/` whatever the method, and so is one of the methods.
            folder = part != "train" and isinstance(node, ast.Constant) and node.value == "adapter"
            if isinstance(node, ast.Constant) and node.value in registry.names() and not folder:
                wrong.append(f"{place(path, node)}: the literal {node.value!r} names a method")
    assert not wrong, "\n".join(wrong)


def test_only_the_quantization_module_imports_bitsandbytes() -> None:
    users = {module_name(path) for path in FILES for _, module, _ in imports(path) if module.split(".")[0] == "bitsandbytes"}
    assert users == {"peftcli.quantization"}


FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "pty"}
FORBIDDEN_CALLS = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.load", "torch.save", "torch.jit.load", "torch.hub.load",
    "yaml.load", "yaml.load_all", "yaml.full_load", "yaml.unsafe_load", "yaml.unsafe_load_all",
}  # fmt: skip
UNSAFE_LOADERS = {"Loader", "FullLoader", "UnsafeLoader", "CLoader", "CFullLoader", "CUnsafeLoader"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_runs_code_from_data(path: Path) -> None:
    wrong = [
        f"{place(path, node)}: imports {module}"
        for node, module, name in imports(path)
        if module.split(".")[0] in FORBIDDEN_MODULES
        or f"{module}.{name}" in FORBIDDEN_CALLS
        or (module == "yaml" and name in UNSAFE_LOADERS)
    ]
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call):
            name = called(node.func)
            if name in FORBIDDEN_CALLS:
                wrong.append(f"{place(path, node)}: calls {name}")
            if any(k.arg == "shell" and not (isinstance(k.value, ast.Constant) and k.value.value is False) for k in node.keywords):
                wrong.append(f"{place(path, node)}: shell=")
        elif isinstance(node, ast.Attribute) and called(node).startswith("yaml.") and node.attr in UNSAFE_LOADERS:
            wrong.append(f"{place(path, node)}: {called(node)}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_public_names_say_what_they_are(path: Path) -> None:
    missing = [] if ast.get_docstring(tree(path)) else [f"{place(path, tree(path))}: the module"]
    for node in tree(path).body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and not node.name.startswith("_"):
            missing += [] if ast.get_docstring(node) else [f"{place(path, node)}: {node.name}"]
    assert not missing, "no docstring:\n" + "\n".join(missing)


def test_files_stay_small() -> None:
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in [*FILES, *sorted((ROOT / "scripts").rglob("*.py"))]}
    assert not {str(path): count for path, count in lines.items() if count > MOST_LINES}
    methods = {path: count for path, count in lines.items() if module_name(path) in method_modules()}
    assert len(methods) == len(method_modules())
    assert not {str(path): count for path, count in methods.items() if count > MOST_LINES_OF_A_METHOD}


def test_help_loads_no_heavy_library() -> None:
    code = (
        "import sys, peftcli.cli\n"
        "sys.argv = ['peftcli', '--help']\n"
        "try:\n    peftcli.cli.main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        "heavy = {'torch', 'transformers', 'accelerate', 'datasets', 'bitsandbytes', 'numpy', 'pyarrow'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert result.returncode == 0, result.stderr
    assert "train" in result.stdout
