"""The tutorial's chapters run on generated reviews, its links resolve, and its pages match the scripts."""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
TUTORIAL = ROOT / "docs/tutorial"
CHAPTERS = sorted(TUTORIAL.glob("[1-9]_*.py"))
LINK = re.compile(r"\[([^\]]+)\]\(([^)#\s]+)\)")
each_chapter = pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda path: path.stem)


@pytest.fixture(scope="module")
def render(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    """The renderer, with an empty current folder in which the chapters keep data, runs and figures."""
    folder = tmp_path_factory.mktemp("tutorial")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(str(TUTORIAL))
        patch.setenv("BABYBERT_TUTORIAL_FIGURES", "figures")
        patch.setenv("BABYBERT_TUTORIAL_STEPS", "120")
        patch.delenv("BABYBERT_TUTORIAL_ARCHIVE", raising=False)
        import render

        yield render
    for name in ("render", "tutorial"):
        sys.modules.pop(name, None)


def definitions(path: Path) -> set[str]:
    """Names of the functions, classes, methods and constants of a Python file."""
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
            names |= {f"{node.name}.{method.name}" for method in node.body if isinstance(method, ast.FunctionDef)}
    return names


@pytest.mark.slow
@each_chapter
def test_a_chapter_runs_and_its_asserts_hold(chapter: Path, render: ModuleType) -> None:
    if chapter.stem.startswith(("8", "9")):
        pytest.importorskip("ts")
    page = render.run(chapter)
    figures = re.findall(r"!\[.*\]\((.+)\)", page)
    assert figures
    for figure in figures:
        assert Path(figure).read_bytes().startswith(b"\x89PNG") and Path(figure).stat().st_size > 5000


@pytest.mark.slow
def test_the_trained_model_learned(render: ModuleType) -> None:
    """120 steps on generated reviews are enough to get below the unigram baseline."""
    import tutorial

    from babybert.checkpoint.metrics_log import read_metrics

    run = tutorial.run_folder("tiny", "demo")
    if not run.is_dir():
        render.run(TUTORIAL / "7_training.py")
    last = read_metrics(run / "metrics.jsonl")[-1]
    assert last["mlm_loss"] < last["mlm_unigram_loss"]


@pytest.mark.slow
def test_a_chapter_is_a_plain_script(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("BABYBERT_TUTORIAL")}
    done = subprocess.run(
        [sys.executable, TUTORIAL / "3_masking.py"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs/tutorial/figures/3_masking.png").is_file()


@each_chapter
def test_a_page_matches_its_script(chapter: Path, render: ModuleType) -> None:
    page = chapter.with_suffix(".md").read_text(encoding="utf-8")
    for is_text, body, _ in render.cells(chapter.read_text(encoding="utf-8")):
        section = render.text_of(body) if is_text else f"```python\n{body}\n```"
        assert section in page, f"run `make tutorial` again: {body[:200]}"
    if chapter.stem.startswith("1"):
        assert "50,000 reviews" in page, "the committed pages must be made from real reviews"
    assert not re.search(r"(?<![\w.])/(work|tmp|home|root|var)/", page)


@each_chapter
def test_a_chapter_has_asserts_and_links_to_the_package(chapter: Path) -> None:
    source = chapter.read_text(encoding="utf-8")
    assert re.search("^ *assert ", source, re.MULTILINE)
    assert len(set(re.findall(r"\(\.\./\.\./(?:babybert|handler)/.+?\)", source))) >= 2


def test_links_lead_to_what_they_name() -> None:
    links = [
        (path, name, target)
        for path in sorted(TUTORIAL.glob("*.md"))
        for name, target in LINK.findall(path.read_text(encoding="utf-8"))
        if not target.startswith("https://")
    ]
    assert len(links) > 60
    for path, name, target in links:
        assert (path.parent / target).exists(), f"{path.name}: {target}"
        if target.endswith(".py"):
            assert name.strip("`") in definitions(path.parent / target), f"{path.name}: {name} is not in {target}"
