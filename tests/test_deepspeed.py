"""CLASSP under DeepSpeed's ZeRO on two CPU ranks: `make test-deepspeed`, which compiles its operators first."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

WORKER = Path(__file__).with_name("deepspeed_worker.py")

pytestmark = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs DeepSpeed")


def run(folder, *launcher, configuration=()):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(WORKER.parents[1])}
    command = [sys.executable, *launcher, str(WORKER), str(folder), *configuration]
    found = subprocess.run(command, capture_output=True, text=True, timeout=590, env=environment)
    assert found.returncode == 0, found.stderr[-4000:]
    return found.stdout + found.stderr


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    run(folder)
    return folder


def two_ranks(folder, stage, **changes):
    zero = {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True, "stage3_param_persistence_threshold": 0}
    given = {"zero_optimization": zero, "train_micro_batch_size_per_gpu": 8, "gradient_clipping": "auto", **changes}
    path = folder / "zero.json"
    path.write_text(json.dumps(given))
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone")
    said = run(folder, *launcher, configuration=[str(path)])
    assert "Going on from the continual memory of first in" in said


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_two_ranks_of_zero_remember_as_one_process(one, tmp_path, stage):
    """The second training goes on from the first's memory, of the file and of the process, and is then resumed."""
    two_ranks(tmp_path, stage)
    for folder in ("first", "same", "second"):
        for file in ("model.safetensors", "continual_memory.st"):
            ours, reference = (load_file(where / folder / file) for where in (tmp_path, one))
            # under ZeRO-3 Transformers 5 writes BERT's weights under their first names
            ours = {n.replace(".gamma", ".weight").replace(".beta", ".bias"): t for n, t in ours.items()}
            assert ours.keys() == reference.keys()
            for name, t in reference.items():
                small = 1e-9 if name.startswith("accumulator/") else 1e-5
                torch.testing.assert_close(ours[name], t, rtol=1e-3, atol=small, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bfloat16_weights_have_a_float32_memory(one, tmp_path, stage):
    """Weights in two bytes, DeepSpeed's own copies of them and the memory in four."""
    two_ranks(tmp_path, stage, bf16={"enabled": "auto"})
    for folder in ("first", "same", "second"):
        ours, reference = (load_file(where / folder / "continual_memory.st") for where in (tmp_path, one))
        names = [n for n in reference if n.startswith("accumulator/")]
        assert ours.keys() == reference.keys() and all(ours[n].dtype is torch.float32 for n in names)
        total, expected = (sum(float(t[n].sum()) for n in names) for t in (ours, reference))
        assert total == pytest.approx(expected, rel=0.05)
        weights, whole = (load_file(where / folder / "model.safetensors") for where in (tmp_path, one))
        weights = {n.replace(".gamma", ".weight").replace(".beta", ".bias"): t.float() for n, t in weights.items()}
        moved = sum(float((weights[n] - t).abs().sum()) for n, t in whole.items())
        assert moved < 0.01 * sum(float(t.abs().sum()) for t in whole.values())
