#!/usr/bin/python3
"""Exit with 0 if a TorchServe worker is ready to answer; TorchServe's /ping is healthy before any worker is.

The management API listens on the container's loopback only, so this script runs inside the container, as the image's
HEALTHCHECK and the Deployment's probes.
"""

import json
import os
import sys
import urllib.request


def main() -> None:
    """Ask the management API for the status of the workers."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy reaches this loopback
    port = os.environ.get("BABYBERT_SERVE_MANAGEMENT_PORT", "8081")
    try:
        with opener.open(f"http://127.0.0.1:{port}/models/babybert", timeout=3) as response:
            workers = json.load(response)[0]["workers"]
        statuses = [worker["status"] for worker in workers]
    except (OSError, ValueError, LookupError) as error:
        sys.exit(f"not ready: {error}")
    if "READY" not in statuses:
        sys.exit(f"no worker is ready: {statuses}")


if __name__ == "__main__":
    main()
