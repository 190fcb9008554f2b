"""Run chapters of the walk and write each as Markdown with its outputs and figures: `python docs/tutorial/render.py`.

A chapter is a script in cells (`# %%`), which editors and jupytext open as a notebook. Jupyter's own renderer would bring
more than 40 packages for what is done here: run each cell, keep what it prints, put it below.
"""

import argparse
import contextlib
import io
import os
import re
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
CELL = re.compile(r"^# %%(.*)\n", re.MULTILINE)
FIGURE = re.compile(r"^figure: (.*/)?(.+\.png)$", re.MULTILINE)


def chapters() -> list[Path]:
    """The scripts, in order."""
    return sorted(HERE.glob("[1-9]_*.py"))


def cells(source: str) -> list[tuple[bool, str, int]]:
    """Of each cell: whether it is text, its content, and how many lines stand before it."""
    marks = list(CELL.finditer(source))
    ends = [*(mark.start() for mark in marks[1:]), len(source)]
    return [
        ("[markdown]" in mark[1], source[mark.end() : end].strip("\n"), source.count("\n", 0, mark.end()))
        for mark, end in zip(marks, ends, strict=True)
    ]


def text_of(body: str) -> str:
    """A text cell without its comment signs."""
    return "\n".join(re.sub("^# ?", "", line) for line in body.splitlines())


def run(chapter: Path) -> str:
    """The chapter as Markdown. Raises whatever it raises. Its figures are where `BABYBERT_TUTORIAL_FIGURES` says."""
    names: dict[str, object] = {"__name__": "__main__"}
    parts = [f"<!-- made by render.py from {chapter.name}: change that -->"]
    for is_text, body, before in cells(chapter.read_text(encoding="utf-8")):
        if is_text:
            parts.append(text_of(body))
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile("\n" * before + body, chapter, "exec"), names)
        parts.append(f"```python\n{body}\n```")
        said = "\n".join(line.rstrip() for line in printed.getvalue().splitlines())
        plain = FIGURE.sub("", said).strip("\n")
        if plain:
            parts.append(f"```text\n{plain}\n```")
        parts += [f"![{name}](figures/{name})" for _, name in FIGURE.findall(said)]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Run the chapters and write them as Markdown.")
    parser.add_argument("chapters", nargs="*", help="numbers of chapters; all if none is given")
    own = (
        HERE if os.environ.get("BABYBERT_TUTORIAL_ARCHIVE") else Path("runs/walk")
    )  # what is kept is made from real reviews
    parser.add_argument(
        "--out", type=Path, default=own, help="folder for the Markdown and its figures [default: %(default)s]"
    )
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    os.environ["BABYBERT_TUTORIAL_FIGURES"] = str(arguments.out / "figures")
    for chapter in chapters():
        if not arguments.chapters or chapter.name[0] in arguments.chapters:
            start = time.monotonic()
            (arguments.out / chapter.name).with_suffix(".md").write_text(run(chapter), encoding="utf-8")
            print(f"{chapter.stem}: {time.monotonic() - start:.1f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
