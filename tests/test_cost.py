"""What results cost, from their manifests; energy from the driver's own counters."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from pesc.cost import HEAD, cost_of, cost_rows, costs_of
from pesc.devices import device_of
from pesc.launch import energy
from pesc.launch.energy import EnergyMeter
from pesc.plan import make_plan
from pesc.run import run_recipe

DRIVER = """
static unsigned long long reads = 0;
int nvmlInit_v2(void) { return 0; }
int nvmlShutdown(void) { return 0; }
int nvmlDeviceGetCount_v2(unsigned int *count) { *count = 2; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned int index, void **device) { *device = (void *)(long)(index + 1); return index > 2; }
int nvmlDeviceGetHandleByUUID(const char *uuid, void **device) { *device = (void *)3L; return uuid[0] != 'G'; }
int nvmlDeviceGetTotalEnergyConsumption(void *device, unsigned long long *energy) {
  if ((long)device == 3L && WITHOUT) return 3;
  *energy = 9000000000000ULL + 1000ULL * (long)device * reads++; return 0;
}
"""
"""NVML's calls as its header declares them: GPU number n has used n J more for every reading that was made before."""


@pytest.fixture
def driver(tmp_path, monkeypatch):
    """A library with the driver's calls; `driver(without=True)`: the third GPU has no counter."""
    if not shutil.which("cc"):
        pytest.skip("no C compiler")

    def install(without: bool = False):
        source, library = tmp_path / "nvml.c", tmp_path / f"libnvidia-ml-{without}.so"
        source.write_text(DRIVER)
        subprocess.run(["cc", "-shared", "-fPIC", f"-DWITHOUT={int(without)}", "-o", str(library), str(source)], check=True)
        monkeypatch.setattr(energy, "LIBRARY", str(library))
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    return install


def test_the_meter_is_the_difference_of_the_counters_of_the_visible_gpus(driver, monkeypatch):
    driver()
    with EnergyMeter() as meter:
        pass
    assert (meter.gpus, meter.joules) == (2, (1 * 2 + 2 * 3) - (1 * 0 + 2 * 1)), "64 bits: the counters are above 2^32 mJ"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-8f3c")
    with EnergyMeter() as meter:
        pass
    assert (meter.gpus, meter.joules) == (1, 3)


def test_what_cannot_be_measured_is_none(driver, monkeypatch):
    monkeypatch.setattr(energy, "LIBRARY", "libno-such-driver.so.1")
    with EnergyMeter() as meter:
        pass
    assert meter.joules is None
    driver(without=True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,2")
    assert energy.read_counters() is None, "half a measurement is none"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert energy.read_counters() is None


def test_a_stage_that_wants_a_gpu_records_its_energy(fakes, store, tiny_recipe, driver):
    driver()
    outcomes = run_recipe(tiny_recipe(), store)
    manifests = {address: store.manifest(outcome.ref.stage, outcome.ref.fingerprint) for address, outcome in outcomes.items()}
    assert {address for address, manifest in manifests.items() if manifest.energy} == {
        address for address in outcomes if address.startswith(("train", "merge", "evaluate", "routing"))
    }
    assert manifests["train[pesc]"].energy == {"joules": 6.0, "gpus": 2, "source": "NVML"}
    assert cost_of(manifests["train[pesc]"]).kilowatt_hours == pytest.approx(6 / 3.6e6)


def test_costs_add_up_and_guess_nothing(fakes, store, tiny_recipe):
    run_recipe(tiny_recipe(), store)
    plan = make_plan(tiny_recipe(), store)
    [train] = [action.manifest for action in plan if action.address == "train[pesc]" and action.manifest]
    gpus = ["NVIDIA H100 80GB HBM3, 81559 MiB, 570.1"] * 8
    train = train.model_copy(
        update={"seconds": 7200.0, "environment": {"hardware": {"gpus": gpus}}, "energy": {"joules": 3.6e7, "gpus": 8, "source": "NVML"}}
    )
    cost = cost_of(train)
    assert (cost.gpus, cost.gpu_hours, cost.dollars, cost.kilowatt_hours) == (8, 16.0, (32.0, 56.0), 10.0)
    assert cost_of(train.model_copy(update={"execution": {"num_processes": 4, "num_nodes": 3}})).gpus == 12
    assert cost_of(train.model_copy(update={"execution": {"device": "cpu"}})).gpus == 0
    unknown = cost_of(train.model_copy(update={"environment": {"hardware": {"gpus": ["Some GPU 9000, 1 MiB, 1"]}}, "energy": None}))
    assert (unknown.gpus, unknown.dollars, unknown.kilowatt_hours) == (1, None, None)
    rows = cost_rows([cost, unknown])
    assert all(len(row) == len(HEAD) for row in rows)
    assert rows[0] == ["train[pesc]", "2.0 h", "8 × NVIDIA H100 80GB HBM3", "16.00", "32.00 – 56.00", "10.000"]
    assert rows[1][-2:] == ["–", "not measured"]
    assert rows[2] == ["together", "4.0 h", "", "18.00", "32.00 – 56.00", "10.000"]
    assert len(costs_of(plan)) == 14


@pytest.mark.parametrize(
    ("name", "device"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA H100 PCIe", "h100-pcie"), ("NVIDIA A100-SXM4-40GB", "a100-40"), ("NVIDIA A100-SXM4-80GB", "a100-80"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"), ("NVIDIA L4", "l4"),
    ],
)  # fmt: skip
def test_a_driver_s_name_finds_its_price(name, device):
    assert getattr(device_of(name), "name", None) == device
    assert device_of("Radeon") is None
