"""What imports what, and how large classes and functions are; read from the source, nothing is run."""

import ast
import graphlib
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
from support.runs import ROOT

# From the top to the bottom: a module imports from its own row and from those below.
ROWS = (
    ("run", "framework", "trainer", "starter"),
    ("cli", "training", "machine"),
    ("scoring",),
    ("boosters", "lora", "prefix", "distributed"),
    ("zo", "utils", "tasks", "templates"),
)
FOLDERS = ("zo", "boosters", "scoring", "training", "distributed", "cli", "machine")
BESIDE = ("research", "bench", "tests", "conftest", "support")  # read the program, and are not read by it
# folder -> what it must not import, as modules or as names of the libraries
FORBIDDEN = {
    "boosters": ("trainer", "training", "transformers.Trainer", "transformers.trainer"),
    "scoring": ("zo",),
    "training": ("tasks",),
    "distributed": ("trainer", "training", "scoring", "transformers.Trainer", "transformers.trainer"),
}
ENGINE = {"torch", "numpy", "safetensors", "triton", "zo"} | sys.stdlib_module_names
LINES_OF_CLASS, LINES_OF_FUNCTION = 200, 60


@dataclass(frozen=True)
class Module:
    """A module of the program: its dotted name, and what it imports (`module` or `module.name`)."""

    name: str
    path: Path
    imports: frozenset[str]

    @property
    def part(self) -> str:
        """The folder, or the module itself at the top level."""
        return self.name.split(".")[0]


def imports_of(path: Path) -> frozenset[str]:
    """Return what a file imports anywhere, but for what only type checkers read."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    checked = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    names = set()
    for node in ast.walk(tree):
        if id(node) in checked:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = path.parent.relative_to(ROOT).parts[: -(node.level - 1) or None] if node.level else ()
            module = ".".join([*package, *([node.module] if node.module else [])])
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return frozenset(names)


@cache
def program() -> tuple[Module, ...]:
    """Return every module of the program."""
    files = [path for path in sorted(ROOT.glob("*.py")) if path.stem != "test_xgblora"]
    files += [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    modules = []
    for path in files:
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(part for part in parts if part != "__init__")
        modules.append(Module(name, path, imports_of(path)))
    return tuple(modules)


def row(part: str) -> int:
    return next(i for i, parts in enumerate(ROWS) if part in parts)


def own_imports(module: Module) -> set[str]:
    """Return which modules of the program a module imports, itself not counted."""
    names = {other.name for other in program()}
    imported = set()
    for name in module.imports:
        while name and name not in names:  # from `zo.optimizer.ZerothOrder` to `zo.optimizer`
            name = name.rpartition(".")[0]
        imported.add(name)
    return imported - {"", module.name}


def lines_of(kind) -> dict[str, int]:
    """Return {module:qualified name: lines} of all classes, or of all functions."""
    found = {}

    def visit(node, module: str, outer: tuple[str, ...]) -> None:
        for child in ast.iter_child_nodes(node):
            inner = outer
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                inner = (*outer, child.name)
                if isinstance(child, kind):
                    found[f"{module}:{'.'.join(inner)}"] = child.end_lineno - child.lineno + 1
            visit(child, module, inner)

    for module in program():
        visit(ast.parse(module.path.read_text(encoding="utf-8")), module.name, ())
    return found


def test_every_module_has_its_place():
    assert {module.part for module in program()} == {part for parts in ROWS for part in parts}


def test_few_modules_lie_in_one_folder():
    assert len(list(ROOT.glob("*.py"))) <= 12
    for folder in FOLDERS:
        modules = [path for path in (ROOT / folder).glob("*.py") if path.name != "__init__.py"]
        assert len(modules) <= 8, folder


def test_imports_run_one_way():
    upwards = [
        f"{module.name} imports {name}"
        for module in program()
        for name in own_imports(module)
        if row(name.split(".")[0]) < row(module.part)
    ]
    assert upwards == []


def test_no_imports_in_a_circle():
    sorter = graphlib.TopologicalSorter({module.name: own_imports(module) for module in program()})
    try:
        sorter.prepare()
    except graphlib.CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_a_folder_does_not_import(folder):
    found = [
        f"{module.name} imports {name}"
        for module in program()
        if module.part == folder
        for name in module.imports
        for forbidden in FORBIDDEN[folder]
        if name == forbidden or name.startswith(f"{forbidden}.")
    ]
    assert found == []


def test_the_engine_needs_torch_numpy_and_safetensors_alone():
    roots = {name.split(".")[0] for module in program() if module.part == "zo" for name in module.imports}
    assert roots - ENGINE == set()


def test_the_program_imports_nothing_that_lies_beside_it():
    found = [
        f"{module.name} imports {name}"
        for module in program()
        for name in module.imports
        if name.split(".")[0] in BESIDE
    ]
    assert found == []


def test_no_test_module_imports_another():
    found = [
        f"{path.name} imports {name}"
        for path in (ROOT / "tests").rglob("*.py")
        for name in imports_of(path)
        if name.split(".")[0].startswith(("test_", "conftest"))
    ]
    assert found == []


def test_classes_and_functions_are_short():
    classes, functions = lines_of(ast.ClassDef), lines_of((ast.FunctionDef, ast.AsyncFunctionDef))
    long = {name for name, lines in classes.items() if lines > LINES_OF_CLASS}
    long |= {name for name, lines in functions.items() if lines > LINES_OF_FUNCTION}
    assert long == set()
