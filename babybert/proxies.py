"""Keep requests to this machine away from an HTTP proxy.

Python's libraries (urllib, boto3, prometheus-client) take a proxy from `http_proxy` and send every request through it,
those to a server on loopback too, unless `no_proxy` names it. The proxy runs elsewhere and cannot reach our loopback.
"""

from collections.abc import MutableMapping

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]", "0.0.0.0")  # as they appear in URLs


def bypass_proxies_for_loopback(environment: MutableMapping[str, str]) -> None:
    """Add the names of loopback to `no_proxy`. The other hosts that are listed there, or in `NO_PROXY`, stay."""
    listed = environment.get("no_proxy") or environment.get("NO_PROXY") or ""
    if listed.strip() == "*":  # no host at all; in a list, Python does not understand it
        return
    names = [name.strip() for name in listed.split(",") if name.strip()]
    environment["no_proxy"] = ",".join(names + [name for name in LOOPBACK_NAMES if name not in names])
