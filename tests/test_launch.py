"""`python -m babybert.training.launch`: the exit codes of a run on two nodes, which here are two launchers."""

import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from processes import COMMAND_SECONDS, STOP_SECONDS, ChildProcess, babybert_command

from babybert.checkpoint.format import find_checkpoint
from babybert.config import PretrainConfig
from babybert.errors import EXIT_DATA

Small = Callable[..., PretrainConfig]
FLAGS = ("data", "out", "width", "heads", "layers", "feed_forward", "batch_size", "device", "epochs")


@contextmanager
def two_nodes(config: PretrainConfig, *flags: str) -> Iterator[list[ChildProcess]]:
    """One process on each of two nodes, which train together."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = [f"--{name.replace('_', '-')}={getattr(config, name)}" for name in FLAGS]
    command = babybert_command("pretrain", "--preset=tiny", "--no-metrics", *settings, *flags)[1:]
    launch = [sys.executable, "-m", "babybert.training.launch", "--nnodes=2", "--nproc-per-node=1"]
    launch += ["--master-addr=127.0.0.1", f"--master-port={port}"]
    nodes: list[ChildProcess] = []
    try:
        for rank in range(2):
            nodes.append(ChildProcess([*launch, f"--node-rank={rank}", *command], environment={"OMP_NUM_THREADS": "1"}))
        yield nodes
    finally:
        for node in nodes:
            node.kill()


@pytest.mark.slow
def test_a_stopped_node_stops_both_and_both_say_so(small: Small) -> None:
    """The exit code of the node that nobody stopped must not be that of a crash or of a complete run."""
    config = small(epochs=2000)
    with two_nodes(config) as nodes:
        nodes[0].wait_for_line("held-out MLM")
        nodes[1].send_signal(signal.SIGTERM)
        for node in nodes:
            assert node.wait(STOP_SECONDS) == 128 + signal.SIGTERM, node.output
    assert find_checkpoint(config.out)


@pytest.mark.slow
def test_the_node_that_knows_the_reason_ends_first(small: Small) -> None:
    """Rank 0 finds no checkpoint of that step. The process on the other node crashes, because it has lost rank 0."""
    with two_nodes(small(), "--resume=7") as nodes:
        code = nodes[0].wait(COMMAND_SECONDS)
        assert code == EXIT_DATA, nodes[0].output
        assert nodes[1].is_running
        start = time.monotonic()
        assert nodes[1].wait(COMMAND_SECONDS) == 1, nodes[1].output
        assert time.monotonic() - start > 3
