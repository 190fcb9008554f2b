"""Batches that are made on a device equal those of the host to the bit."""

import itertools

import numpy as np
import pytest
import torch
from test_loader import are_equal

from babybert.data.dataset import Dataset
from babybert.data.device_loader import DeviceLoader, fits_on_device
from babybert.data.loader import DynamicMasking, Loader
from babybert.data.tokenizer import FIRST_ORDINARY


@pytest.mark.parametrize("bucketing", [True, False])
@pytest.mark.parametrize(("seed", "share"), [(None, 0.15), (0, 0.15), (2**32 - 1, 0.4)])
def test_batches_equal_those_of_the_host(demo: Dataset, seed: int | None, share: float, bucketing: bool) -> None:
    examples = demo.examples("train")
    masking = None if seed is None else DynamicMasking(demo.tokenizer.size, seed, share)
    if seed == 0:
        continues_V = np.arange(demo.tokenizer.size) % 3 == 2
        continues_V[:FIRST_ORDINARY] = False
        masking = DynamicMasking(demo.tokenizer.size, seed, 0.3, share_end=0.1, epochs=3, continues_V=continues_V)
    host = Loader(examples, 8, 0, bucketing, masking)
    device = DeviceLoader(examples, 8, 0, bucketing, masking)
    for epoch in (0, 7):
        for one, other in itertools.zip_longest(host.epoch(epoch), device.epoch(epoch)):
            assert are_equal(one, other)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batches_made_on_a_gpu_equal_those_of_the_host(demo: Dataset) -> None:
    examples = demo.examples("train")
    masking = DynamicMasking(demo.tokenizer.size, 3)
    host = Loader(examples, 8, 0, True, masking)
    gpu = DeviceLoader(examples, 8, 0, True, masking, torch.device("cuda"))
    for one, other in itertools.zip_longest(host.epoch(2), gpu.epoch(2)):
        assert are_equal(one, other.to(torch.device("cpu")))


def test_making_a_batch_does_not_wait_for_the_device(demo: Dataset) -> None:
    """On the meta device, which computes shapes only, every operation that needs a value on the host raises."""
    masking = DynamicMasking(demo.tokenizer.size, 3)
    loader = DeviceLoader(demo.examples("train"), 8, 0, True, masking, torch.device("meta"))
    batch = loader.batch(loader.order(0)[:8], epoch=1)
    assert batch.ids_BT.device.type == "meta"
    assert len(batch.ids_BT) == 8


def test_a_cpu_holds_the_examples_already(demo: Dataset) -> None:
    assert not fits_on_device(demo.examples("train"), torch.device("cpu"))
