"""The pages for users agree with the repository: links resolve, commands parse, and the README's tree is complete."""

import json
import re
import shlex
from pathlib import Path

import pytest

from babybert.cli import make_parser

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("docs/log/*.md")]
LINK = re.compile(r"\]\(([^)\s]+)\)")
CODE = re.compile(r"^```.*?^```|^    [^\n]*$", re.MULTILINE | re.DOTALL)
EXTERNAL = ("https://", "http://")
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_page
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        if link.startswith(EXTERNAL):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@each_page
def test_lines_of_prose_fit_into_120_columns(page: Path) -> None:
    prose = CODE.sub("", page.read_text(encoding="utf-8"))
    assert [line for line in prose.splitlines() if len(line) > 120 and not line.startswith("|")] == []


@each_page
def test_commands_in_code_blocks_parse(page: Path) -> None:
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    for line in re.findall(r"^ *(?:\.venv/bin/)?babybert (.+)$", "\n".join(CODE.findall(text)), re.MULTILINE):
        make_parser().parse_args(shlex.split(line, comments=True))  # a wrong flag exits


def tree() -> list[Path]:
    """The paths in the README's tree. Folders end in a slash; two columns of indentation are one level."""
    block = re.search(
        r"^```text\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )
    assert block
    paths, parents = [], [Path()]
    for line in block[1].splitlines():
        indent, names = re.match(r"( *)(.*?)(?:  |$)", line).groups()  # type: ignore[union-attr]
        depth = len(indent) // 2
        for name in names.split(", "):
            paths.append(parents[depth] / name)
            if name.endswith("/"):
                parents[depth + 1 :] = [parents[depth] / name]
    return paths


def test_the_tree_of_the_readme_is_complete() -> None:
    paths = set(tree())
    missing = [str(path) for path in paths if not (ROOT / path).exists()]
    assert not missing
    modules = {path.relative_to(ROOT) for path in (ROOT / "babybert").rglob("*.py") if path.name != "__init__.py"}
    assert modules <= paths, "add these to the tree in README.md"


def test_the_policies_in_the_page_on_deployment_are_those_of_the_overlay() -> None:
    text = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^    \{\n(?:    .*\n)+?    \}$", text, re.MULTILINE)
    policies = [(ROOT / "k8s/overlays/aws" / f"{name}-policy.json").read_text() for name in ("pretrain", "serve")]
    assert [json.loads(block) for block in blocks] == [json.loads(policy) for policy in policies]
