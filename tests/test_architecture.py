"""The arrows of the design: what each room may import, read from the files.

pytest tests/test_architecture.py
"""

import ast
import subprocess
import sys

import pytest
from conftest import ROOT

ROOMS = ("models", "data", "engine", "utils", "tools", "benchmarks", "experiments")
FILES = ("main", "config", "flags", "logger", "lr_scheduler", "optimizer", "hubconf")
# What may be imported from where, besides a room's own files.
ALLOWED = {
    "models": set(),
    "utils": {"logger"},
    "logger": set(),
    "config": {"flags", "utils"},
    "flags": set(),
    "data": {"config", "logger", "utils"},
    "optimizer": {"models", "logger", "utils"},
    "lr_scheduler": {"config", "logger", "utils"},
    "engine": {"config", "data", "logger", "lr_scheduler", "models", "optimizer", "utils"},
    "main": {"config", "data", "engine", "logger", "models", "utils"},
    "tools": {"config", "data", "logger", "models", "utils"},
    "experiments": {"config", "data", "logger", "models", "tools", "utils"},
    "benchmarks": {*ROOMS, *FILES} - {"experiments", "hubconf"},
    "hubconf": set(),
}
# What models/ imports beyond the standard library and itself.
PACKAGES = {"torch", "timm", "einops", "safetensors", "yaml", "triton"}


def imports() -> list[tuple[str, str, str, int]]:
    """(file, room, imported module, level of a relative import) of every import, wherever it stands."""
    found = []
    for place in (*(f"{name}.py" for name in FILES), *(f"{room}/**/*.py" for room in ROOMS)):
        for path in sorted(ROOT.glob(place)):
            name = str(path.relative_to(ROOT))
            room = name.partition("/")[0].removesuffix(".py")
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Import):
                    found += [(name, room, alias.name, 0) for alias in node.names]
                elif isinstance(node, ast.ImportFrom):
                    found.append((name, room, node.module or "", node.level))
    return found


IMPORTS = imports()


def test_every_room_is_looked_at():
    assert {room for _, room, _, _ in IMPORTS} == {*ROOMS, *FILES}
    assert len(IMPORTS) > 800


@pytest.mark.parametrize("room", [*ROOMS, *FILES])
def test_imports_point_one_way(room):
    ours = {*ROOMS, *FILES}
    wrong = [
        f"{file} imports {module}"
        for file, where, module, level in IMPORTS
        if where == room and level == 0 and module.partition(".")[0] in ours - {room} - ALLOWED[room]
    ]
    assert not wrong


def test_models_import_themselves_relatively_and_few_packages():
    for file, room, module, level in IMPORTS:
        if room == "models" and level == 0:
            top = module.partition(".")[0]
            assert top in PACKAGES or top in sys.stdlib_module_names, f"{file} imports {module}"


def test_no_files_import_each_other_in_a_circle():
    """By the imports that run when a file is imported, those inside functions and of types aside."""
    graph: dict[str, set[str]] = {}
    for place in (*(f"{name}.py" for name in FILES), *(f"{room}/**/*.py" for room in ROOMS)):
        for path in ROOT.glob(place):
            module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            package = module if path.name == "__init__.py" else module.rpartition(".")[0]
            targets = set()
            for node in ast.parse(path.read_text()).body:
                if isinstance(node, ast.ImportFrom):
                    base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
                    source = ".".join([*base, *([node.module] if node.module else [])])
                    targets |= {source, *(f"{source}.{alias.name}" for alias in node.names)}
                elif isinstance(node, ast.Import):
                    targets |= {alias.name for alias in node.names}
            graph[module] = targets - {package}  # a package's own __init__ is there already
    graph = {module: {t for t in targets if t in graph and t != module} for module, targets in graph.items()}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"a circle: {' → '.join((*path[path.index(module) :], module))}"
        if module not in done:
            for target in sorted(graph[module]):
                visit(target, (*path, module))
            done.add(module)

    for module in sorted(graph):
        visit(module, ())


@pytest.mark.parametrize("argument", ["--help", "--cfg configs/quickstart.yaml --opts TRAIN.EPOCS 3"])
def test_a_question_and_a_mistake_are_answered_without_torch(argument):
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['main.py', *{argument.split()!r}]\n"
        "try:\n    runpy.run_path('main.py', run_name='__main__')\n"
        "finally:\n    assert 'torch' not in sys.modules and 'numpy' not in sys.modules\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == (0 if argument == "--help" else 2) and "Traceback" not in result.stderr
