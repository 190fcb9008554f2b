#!/usr/bin/python3
"""Exit with 0 if a TorchServe worker is ready to answer; TorchServe's /ping is healthy before any worker is.

The management API listens on the container's loopback only, so this script runs inside the container, as the image's
HEALTHCHECK and the Deployment's probes. It imports the standard library only, because it has to be quick. With
`--token-auth` its requests need the management key. TorchServe keeps the keys in a file in the server's temporary
folder, which only the server's user can read. That key expires, and a request with the API key writes a new one.
"""

import json
import os
import sys
import tempfile
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

KEY_FILES = "babybert-serve-*/key_file.json"  # in the folder for temporary files


def main() -> None:
    """Ask the management API for the status of the workers."""
    try:
        statuses = [worker["status"] for worker in served_model()[0]["workers"]]
    except (OSError, ValueError, LookupError) as error:
        sys.exit(f"not ready: {error}")
    if "READY" not in statuses:
        sys.exit(f"no worker is ready: {statuses}")


def served_model() -> Any:
    """TorchServe's description of the model. Raises OSError, ValueError, LookupError."""
    key_files = sorted(Path(tempfile.gettempdir()).glob(KEY_FILES), key=lambda path: path.stat().st_mtime)
    if not key_files:
        return json.loads(fetch("/models/babybert"))
    try:
        return json.loads(fetch("/models/babybert", key_files[-1], "management"))
    except urllib.error.HTTPError as error:
        if error.code != 400:
            raise
    fetch("/token?type=management", key_files[-1], "API")  # the answer is empty
    return json.loads(fetch("/models/babybert", key_files[-1], "management"))


def fetch(path: str, key_file: Path | None = None, key_name: str = "") -> bytes:
    """What the management API answers."""
    port = os.environ.get("BABYBERT_SERVE_MANAGEMENT_PORT", "8081")
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}")
    if key_file:
        request.add_header("Authorization", f"Bearer {json.loads(key_file.read_text())[key_name]['key']}")
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy reaches this loopback
    with opener.open(request, timeout=3) as response:
        return bytes(response.read())


if __name__ == "__main__":
    main()
