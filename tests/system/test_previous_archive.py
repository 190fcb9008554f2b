"""A real TorchServe serves an archive of the previous version: its code and handler, with our settings and metrics."""

import pytest
from served import serving
from test_previous_version import CANDIDATES, FILES, PAIR, PAIR_PROBABILITY, TEXT


def test_an_archive_of_the_previous_version_is_served() -> None:
    for server in serving(FILES, "babybert.mar"):
        answer = server.ask({"text": TEXT, "top_k": 3})
        assert answer.status == 200
        assert answer.headers["x-babybert-version"] == "3-9009c86ea861"
        (mask,) = answer.body["masks"]
        scores = {candidate["token"]: candidate["score"] for candidate in mask["candidates"]}
        assert scores == pytest.approx(CANDIDATES, rel=1e-5)
        pair = server.ask({"sentence_a": PAIR[0], "sentence_b": PAIR[1]})
        assert pair.body == {"is_next": True, "probability": pytest.approx(PAIR_PROBABILITY, rel=1e-5)}
        assert server.ask({"text": "no mask"}).status == 400
        server.wait_for_metrics()
        assert server.value("babybert_inference_requests_total", task="fill-mask", outcome="ok") == 1
        assert server.value("babybert_inference_masks_total") == 1
        assert not server.log_lines_with("torchserve:"), server.child.output
