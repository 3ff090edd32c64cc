"""Hardware: a training's card names what it ran on, on any machine."""

import json

import torch

from brainseg import hardware


def test_this_machine_has_a_cpu_with_cores_and_memory():
    found = hardware.machine()
    assert found["cpu"]
    assert found["cores"] >= 1
    assert found["memory_bytes"] > 1 << 28
    assert json.loads(json.dumps(found)) == found


def test_peak_memory_only_grows_and_is_in_bytes():
    before = hardware.peak_memory(torch.device("cpu"))
    held = torch.ones(8 << 20)
    after = hardware.peak_memory(torch.device("cpu"))
    assert held.numel()
    assert after["peak_rss_bytes"] >= before["peak_rss_bytes"] > 10 << 20
    assert after["peak_cuda_bytes"] is None
    assert hardware.device_name(torch.device("cpu")) == "cpu"
