"""The import rule (docs/architecture.md): a room imports only the rooms to its left and the ground. No file is long."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "layerskip_kernels"
ROOMS = [
    "triton_ops",
    "ops",
    "model",
    "decoding",
    "engine",
    "evaluation",
    "training",
    "recipes",
    "serving",
    "integrations",
    "cli",
]
GROUND = {"checks", "config", "errors", "machine", "model_config", "operands", "_C", "_kv", "_cuda"}
MAX_LINES = 350
SOURCES = {".py", ".cpp", ".h", ".inl", ".cu", ".html", ".js", ".css"}
KERNELS = {"kernels.inl", "blocks.inl", "contract.py"}  # read in one piece, and may be longer


def files() -> Iterator[tuple[Path, str]]:
    """Every source file and its room; "" for the ground."""
    for path in sorted(PACKAGE.rglob("*.py")) + sorted((PACKAGE / "triton_ops").glob("*.py")):
        parts = path.relative_to(PACKAGE).parts
        yield path, parts[0] if len(parts) > 1 else ""


def imported_modules(path: Path) -> Iterator[str]:
    """Dotted names inside the package of everything that a file imports, wherever in it the import stands."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (name.partition(".")[2] for name in names if name.split(".")[0] == "layerskip_kernels")


def breaks_the_rule(room: str, imported: str) -> bool:
    target = imported.split(".")[0]
    if target in ROOMS:
        return room not in ROOMS or ROOMS.index(target) > ROOMS.index(room)
    return target not in GROUND and room != "cli"  # a public name: the last room alone takes those


def test_every_folder_is_a_room():
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and any(path.glob("*.py"))}
    assert folders <= set(ROOMS)


def test_rooms_import_only_rooms_to_their_left():
    wrong = [
        f"{path.relative_to(PACKAGE)} imports {name}"
        for path, room in files()
        if path != PACKAGE / "__init__.py"  # the public names, from all rooms
        for name in imported_modules(path)
        if breaks_the_rule(room, name)
    ]
    assert not wrong, "\n".join(wrong)


def test_no_room_has_a_circle():
    graph = {
        module_of(path): {target for name in imported_modules(path) if (target := file_of(name))} for path, _ in files()
    }
    for module in graph:
        assert module not in reachable(graph, graph[module]), f"{module} imports itself through others"


def test_no_file_is_long():
    """Of the product; checkpoints are no source."""
    folders = [path for path in PACKAGE.iterdir() if path.is_dir() and path.name in ROOMS]
    sources = [path for folder in [*folders, ROOT / "csrc"] for path in folder.rglob("*") if path.suffix in SOURCES]
    long = {path.name for path in [*PACKAGE.glob("*.py"), *sources] if len(path.read_text().splitlines()) > MAX_LINES}
    assert long == KERNELS


def test_kernels_are_launched_by_keyword():
    calls = [
        (path.name, node)
        for path in sorted((ROOT / "triton_ops").glob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript)  # kernel[grid](...)
    ]
    assert len(calls) > 10
    assert not [f"{name}:{node.lineno}" for name, node in calls if node.args]


def test_no_test_imports_another_tests_file():
    names = {path.stem for path in (ROOT / "tests").rglob("test_*.py")}
    for path in (ROOT / "tests").rglob("*.py"):
        modules = re.findall(r"^\s*(?:from|import) ([\w.]+)", path.read_text(encoding="utf-8"), re.MULTILINE)
        assert not names & {part for module in modules for part in module.split(".")}, path


def test_the_rule_notices():
    assert breaks_the_rule("ops", "model.model.Model")
    assert breaks_the_rule("", "ops.reference")
    assert not breaks_the_rule("engine", "decoding.steps.draft_step")
    assert not breaks_the_rule("ops", "errors.CacheFull")


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


def file_of(name: str) -> str | None:
    """The module that an imported name lives in; None where that is no file of the package."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        path = PACKAGE.joinpath(*parts[:end])
        if path.with_suffix(".py").is_file() or (path / "__init__.py").is_file():
            return ".".join(parts[:end])
    return None


def reachable(graph: dict[str, set[str]], start: set[str]) -> set[str]:
    seen, todo = set(), list(start)
    while todo:
        module = todo.pop()
        if module not in seen:
            seen.add(module)
            todo += graph.get(module, set())
    return seen
