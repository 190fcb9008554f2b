"""What does not need a running TorchServe: the requests to one that is ending."""

from pathlib import Path

import pytest
from faulty_proxy import answering

from babybert.config import ServeConfig
from babybert.serving.torchserve import TorchServe


@pytest.mark.parametrize(
    "content", [b"SSH-2.0-OpenSSH_9.6\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n[", b""]
)
def test_an_answer_that_is_not_http_or_cut_off_counts_as_none(content: bytes) -> None:
    with answering(content) as (metrics_port, _), answering(content) as (management_port, _):
        server = TorchServe(ServeConfig(metrics_port=metrics_port, management_port=management_port), Path("x.mar"))
        with pytest.raises(OSError, match=r"HTTP|closed"):
            server.request_count()
        with pytest.raises(OSError, match=r"HTTP|closed"):
            server.manage("GET", "/models")
