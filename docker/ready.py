#!/usr/bin/python3
"""Exit 0 if a worker is ready to answer: TorchServe's own /ping says so before any is.

The management API listens on the container's loopback only, so this runs inside: as the image's HEALTHCHECK and the
Deployment's probes.
"""

import json
import os
import sys
import urllib.request

PORT = os.environ.get("BABYBERT_SERVE_MANAGEMENT_PORT", "8081")

try:
    with urllib.request.urlopen(f"http://127.0.0.1:{PORT}/models/babybert", timeout=3) as answer:
        workers = json.load(answer)[0]["workers"]
except (OSError, ValueError, LookupError) as error:
    sys.exit(f"not ready: {error}")
if not any(worker["status"] == "READY" for worker in workers):
    sys.exit(f"no worker is ready: {[worker['status'] for worker in workers]}")
