"""Energy, against a stand-in for the driver: this suite has no GPU."""

from types import SimpleNamespace

import pynvml
import pytest
import torch

from modernbert_small.run.artefacts import begin
from modernbert_small.run.energy import gpu_joules


def test_without_a_gpu_nothing_is_known(tmp_path):
    if not torch.cuda.is_available():
        assert gpu_joules() is None
    run = begin("create_dataset", str(tmp_path / "out"), {}, {}, uses_gpu=False)
    run.start()
    assert "gpu_joules" not in run.finish({})


@pytest.fixture
def two_gpus(monkeypatch):
    """Two processes' GPUs, whose counters, in millijoules, go up by 1,500 and 2,500 at each look."""
    counters = {"GPU-a": 1000, "GPU-b": 7000}

    def look(handle):
        counters[handle] += 1500 if handle == "GPU-a" else 2500
        return counters[handle]

    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid="ab"[index]))
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByUUID", lambda uuid: uuid)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetTotalEnergyConsumption", look)


def test_a_run_records_what_its_gpus_drew(tmp_path, two_gpus, monkeypatch):
    assert gpu_joules() == 12.0
    run = begin("phase", str(tmp_path / "out"), {}, {})
    run.start()
    assert run.finish({})["gpu_joules"] == 4.0
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    before = gpu_joules()
    assert gpu_joules() - before == 1.5  # of one process, its own GPU


def test_a_run_without_a_gpu_does_not_ask_for_it(tmp_path, two_gpus):
    run = begin("phase", str(tmp_path / "out"), {}, {}, uses_gpu=False)
    run.start()
    assert "gpu_joules" not in run.finish({})


def test_a_driver_that_does_not_count_is_no_error(tmp_path, two_gpus, monkeypatch):
    def unsupported(handle):
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

    monkeypatch.setattr(pynvml, "nvmlDeviceGetTotalEnergyConsumption", unsupported)
    run = begin("phase", str(tmp_path / "out"), {}, {})
    run.start()
    assert "gpu_joules" not in run.finish({})
