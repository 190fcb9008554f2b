"""The walk's chapters run on generated reviews, with their asserts; what they link to exists; their pages are not stale."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WALK = ROOT / "docs/tutorial"
CHAPTERS = sorted(WALK.glob("[1-9]_*.py"))
LINK = re.compile(r"\[([^\]]+)\]\(([^)#\s]+)\)")
named = pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda path: path.stem)


@pytest.fixture(scope="module")
def render(tmp_path_factory):
    """The renderer, in an empty folder where the chapters keep what they make."""
    folder = tmp_path_factory.mktemp("walk")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(str(WALK))
        patch.setenv("BABYBERT_TUTORIAL_FIGURES", "figures")
        patch.setenv("BABYBERT_TUTORIAL_STEPS", "120")
        patch.delenv("BABYBERT_TUTORIAL_ARCHIVE", raising=False)
        import render

        yield render
    for name in ("render", "tutorial"):
        sys.modules.pop(name, None)


def defined(path):
    """Names of the functions, classes, methods and constants of a Python file."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {target.id for target in targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
            found |= {f"{node.name}.{part.name}" for part in node.body if isinstance(part, ast.FunctionDef)}
    return found


@pytest.mark.slow
@named
def test_a_chapter_runs_and_its_asserts_hold(chapter, render):
    if chapter.stem.startswith("8"):
        pytest.importorskip("ts")
    page = render.run(chapter)
    figures = re.findall(r"!\[.*\]\((.+)\)", page)
    assert figures
    for figure in figures:
        assert Path(figure).read_bytes().startswith(b"\x89PNG") and Path(figure).stat().st_size > 5000


@pytest.mark.slow
def test_the_trained_model_learned(render):
    """120 steps on generated reviews are enough to leave the word counts behind."""
    import tutorial

    from babybert.checkpoint.metrics_log import read_metrics

    run = tutorial.run_folder("tiny", "demo")
    if not run.is_dir():
        render.run(WALK / "7_training.py")
    last = read_metrics(run / "metrics.jsonl")[-1]
    assert last["mlm_loss"] < last["mlm_unigram_loss"]


@pytest.mark.slow
def test_a_chapter_is_a_plain_script(tmp_path):
    own = {name: value for name, value in os.environ.items() if not name.startswith("BABYBERT_TUTORIAL")}
    done = subprocess.run(
        [sys.executable, WALK / "3_masking.py"], cwd=tmp_path, env=own, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs/walk/figures/3_masking.png").is_file()


@named
@pytest.mark.slow
def test_a_page_is_of_its_script(chapter, render):
    page = chapter.with_suffix(".md").read_text(encoding="utf-8")
    for is_text, body, _ in render.cells(chapter.read_text(encoding="utf-8")):
        assert (render.text_of(body) if is_text else f"```python\n{body}\n```") in page, (
            f"run `make walk` again: {body[:200]}"
        )
    assert "50,000 reviews" in page or not chapter.stem.startswith("1"), (
        "the pages that are kept are made from real reviews"
    )
    assert not re.search(r"(?<![\w.])/(work|tmp|home|root|var)/", page)


@named
def test_a_chapter_compares_and_points_to_the_package(chapter):
    source = chapter.read_text(encoding="utf-8")
    assert re.search("^ *assert ", source, re.MULTILINE)
    assert len(set(re.findall(r"\(\.\./\.\./(?:babybert|handler)/.+?\)", source))) >= 2


def test_links_lead_to_what_they_name():
    links = [
        (path, name, target)
        for path in sorted(WALK.glob("*.md"))
        for name, target in LINK.findall(path.read_text(encoding="utf-8"))
    ]
    links = [link for link in links if not link[2].startswith("https://")]
    assert len(links) > 60
    for path, name, target in links:
        assert (path.parent / target).exists(), f"{path.name}: {target}"
        if target.endswith(".py"):
            assert name.strip("`") in defined(path.parent / target), f"{path.name}: {name} is not in {target}"
