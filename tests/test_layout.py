"""The package's layout: imports point one way, along the data flow."""

import ast
from collections.abc import Iterator
from pathlib import Path

from conftest import ROOT

from sst2_xlmr.config import TASK_NAMES

PACKAGE = ROOT / "sst2_xlmr"
# A folder may use those of the rows above its own, and modules of itself.
LEVELS = [{"util"}, {"config"}, {"cli", "__main__"}, {"evaluation.metrics", "labels"}, {"task"}, {"model"}, {"data"}]
LEVELS += [{"training"}, {"evaluation", "engines", "export"}, {"backend"}, {"predictor"}, {"report"}, {"run"}]
LEVELS += [{"train"}, {"programs"}]
MODULES = {
    ".".join(file.relative_to(PACKAGE).with_suffix("").parts): file
    for file in PACKAGE.rglob("*.py")
    if file.name != "__init__.py" or file.read_text(encoding="utf-8").count("\n") > 1
}


def level_of(module: str) -> int:
    return next(level for level, names in enumerate(LEVELS) if {module, module.split(".")[0]} & names)


def imports_of(file: Path) -> Iterator[str]:
    """Yield the modules of the package that a file imports, at its top or inside a function."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "sst2_xlmr":
            inner = node.module.partition(".")[2]
            for alias in node.names:
                name = f"{inner}.{alias.name}" if inner else alias.name
                if inner or name in MODULES:  # else `__version__`
                    yield name if name in MODULES or f"{name}.__init__" in MODULES else inner


def test_imports_point_one_way() -> None:
    """What defines metrics imports nothing, so that a task may use it; only `backend` knows of engines."""
    for name, file in MODULES.items():
        for other in imports_of(file) if name != "__init__" else ():
            says = f"{name} imports {other}"
            is_neighbor = other.split(".")[0] == name.split(".")[0]
            assert level_of(other) < level_of(name) or (is_neighbor and name != "evaluation.metrics"), says
            assert not other.startswith("engines") or name.startswith(("engines", "backend")), says


def test_the_task_alone_knows_what_tasks_there_are() -> None:
    """Nothing else names a task, or computes softmax, argmax, cross-entropy or accuracy.

    Engines have softmax in attention, and the graph of an ONNX file too, as words; `accuracy_interval` defines, and
    task.py asks it.
    """
    words = {"softmax", "log_softmax", "argmax", "cross_entropy", "nll_loss", "accuracy"}
    for name, file in MODULES.items():
        if name == "task" or name.startswith("engines"):
            continue
        text = file.read_text(encoding="utf-8")
        assert name == "config" or not any(f'"{word}"' in text for word in TASK_NAMES[1:]), name
        for node in ast.walk(ast.parse(text)):
            found = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
            if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
                found = str(node.slice.value)
            assert found not in words, f"{name}, line {getattr(node, 'lineno', 0)}"
