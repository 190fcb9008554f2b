"""Conventions of the code base that no linter checks: imports run one way, sizes, unique names, no retired terms."""

import ast
import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "babybert"
MODULES = sorted(PACKAGE.rglob("*.py"))
MAX_FILE_LINES = 350
MAX_FUNCTION_LINES = 60

# A module imports from its own layer and the layers below it.
LAYERS = (
    {
        *("config", "errors", "encoding", "folders", "logs", "progress", "proxies", "s3", "s3_errors"),
        *("s3_access", "s3_lease", "s3_prefix", "s3_retry", "s3_upload_process"),
        *("jit", "tables", "figures"),
    },
    {"corpus"},
    {"data"},
    {"model"},
    {"checkpoint"},
    {"serving", "export"},
    {"evaluation", "info"},
    {"training", "playground"},
    {"cli", "commands", "serving_commands", "export_commands"},
)
# Terms of earlier versions, with the term that replaced each.
RETIRED = {
    r"\bKeeper\b": "CheckpointManager",
    r"\bNumberWatch\b": "NonFiniteGuard",
    r"\bRemask\b": "DynamicMasking",
    r"\bno number\b": "non-finite",
    r"\bwhole line\b": "pipeline",
    r"\bof other hands\b": "externally prepared",
    r"\btwo neighbours\b": "bigram baseline",
    r"\bwords in common\b": "word-overlap baseline",
    r"\btoken vectors\b": "token embeddings",
    r"\bwhole checkpoint": "valid checkpoint",
}
TEXT_SUFFIXES = {".py", ".md", ".yaml", ".yml", ".json", ".toml", ".html", ".js", ".sh"}
HISTORY = ("CHANGELOG.md", "docs/log", "tests/test_conventions.py")


def layer_of(module: str) -> int:
    """The layer of `babybert.PART...` by its first part."""
    return next(index for index, layer in enumerate(LAYERS) if module in layer)


def part_of(path: Path) -> str:
    """The first part of a module's name below `babybert`."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path: Path) -> None:
    if part_of(path) == "__init__":
        return
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("babybert."):
            imported = str(node.module).split(".")[1]
            assert layer_of(imported) <= layer_of(part_of(path)), f"line {node.lineno}: {node.module}"


def test_only_two_modules_know_boto3() -> None:
    """So one function decides what an error of S3 means."""
    users = {path.stem for path in MODULES if re.search(r"(?:import|from) (?:boto|s3transfer)", path.read_text())}
    assert users == {"s3", "s3_errors"}


def test_files_and_functions_are_short() -> None:
    for path in MODULES:
        text = path.read_text(encoding="utf-8")
        assert text.count("\n") <= MAX_FILE_LINES, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                assert node.end_lineno is not None
                assert node.end_lineno - node.lineno < MAX_FUNCTION_LINES, f"{path}: {node.name}"


def test_no_two_modules_and_no_two_classes_have_one_name() -> None:
    modules = Counter(path.stem for path in MODULES if path.stem != "__init__")
    classes = Counter(
        node.name
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef)
    )
    assert [name for name, count in (*modules.items(), *classes.items()) if count > 1] == []


def test_retired_terms_are_gone() -> None:
    found = []
    for folder in ("babybert", "handler", "tests", "benchmarks", "examples", "docs", "docker", "k8s", "README.md"):
        start = ROOT / folder
        for path in [start] if start.is_file() else sorted(start.rglob("*")):
            name = path.relative_to(ROOT).as_posix()
            if path.suffix not in TEXT_SUFFIXES or name.startswith(HISTORY):
                continue
            text = path.read_text(encoding="utf-8")
            found += [f"{name}: {pattern}: say {term}" for pattern, term in RETIRED.items() if re.search(pattern, text)]
    assert found == []
