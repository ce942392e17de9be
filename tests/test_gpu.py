"""What only a GPU can show: its step of CLASSP and a training on it. Skipped where PyTorch sees none."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from reference_classp import ReferenceCLASSP

from classp_hf import CLASSP, ClasspTrainer, ContinualMemory

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize(
    "kwargs", [{}, {"power": 1.0}, {"foreach": False}, {"threshold": 0.25}, {"weight_decay": 0.1}]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_is_algorithm_1(kwargs, dtype):
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(7, 13, generator=generator).to(dtype)
    p = torch.nn.Parameter(w.to(DEVICE))
    optimizer = CLASSP([p], lr=0.01, **kwargs)
    expected = ReferenceCLASSP(w.double().numpy(), 0.01, **{k: v for k, v in kwargs.items() if k != "foreach"})
    for _ in range(5):
        g = torch.randn(7, 13, generator=generator).to(dtype)
        p.grad = g.to(DEVICE)
        optimizer.step()
        expected.step(g.double().numpy())
    memory = optimizer.accumulator(p).double().cpu().numpy()
    np.testing.assert_allclose(memory, expected.s, rtol=1e-5, atol=1e-6)
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    np.testing.assert_allclose(p.detach().double().cpu().numpy(), expected.w, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_a_gradient_that_is_not_finite_is_a_skipped_step(bad):
    params = [torch.nn.Parameter(torch.ones(5, device=DEVICE)) for _ in range(2)]
    optimizer = CLASSP(params, lr=0.1)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    before = [t.clone() for p in params for t in (p.detach(), optimizer.accumulator(p))]
    params[0].grad[2] = bad
    optimizer.step()
    assert optimizer.skipped_steps() == 1
    assert all(map(torch.equal, before, [t for p in params for t in (p.detach(), optimizer.accumulator(p))]))


def test_a_sequence_trains_on_the_gpu(make_model, make_tasks, make_args, collator, tmp_path):
    bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    args = make_args(use_cpu=False, bf16=bf16, num_train_epochs=10, learning_rate=3e-3)
    trainer = ClasspTrainer(model=make_model(), args=args, data_collator=collator)
    results = trainer.train_sequence(make_tasks())
    assert results["accuracy_matrix"][-1][1] > 0.5
    assert next(trainer.model.parameters()).device.type == DEVICE
    memory = ContinualMemory.load(tmp_path / "run")
    assert memory.tasks == ["first", "second"] and all(t.isfinite().all() for t in memory.get("accumulator").values())


def test_a_compiled_model_in_cuda_graphs_trains_as_a_plain_one(make_model, make_tasks, make_args, collator, tmp_path):
    ways = {"plain": {}, "graphs": {"torch_compile": True, "torch_compile_mode": "reduce-overhead"}}
    found = {}
    for name, given in ways.items():
        args = make_args(output_dir=str(tmp_path / name), use_cpu=False, learning_rate=3e-3, **given)
        trainer = ClasspTrainer(model=make_model(), args=args, data_collator=collator)
        trainer.train_sequence(make_tasks())
        found[name] = ContinualMemory.load(tmp_path / name).get("accumulator")
    assert found["plain"].keys() == found["graphs"].keys()
    plain, graphs = (sum(float(t.sum()) for t in memory.values()) for memory in found.values())
    assert graphs == pytest.approx(plain, rel=1e-2)


def test_fsdp2_on_one_gpu(tmp_path):
    root = Path(__file__).parents[1]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--config_file"]
    recipe = [root / "recipes" / "accelerate" / "fsdp2.yaml", root / "recipes" / "sentiment_sequence.py"]
    flags = "--max_train_samples 64 --max_eval_samples 32 --max_length 32 --num_train_epochs 1 --report_to none"
    command = [*launcher, *map(str, recipe), "--compare", "none", "--output_dir", str(tmp_path), *flags.split()]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=root)
    assert run.returncode == 0, run.stderr[-4000:]
    assert json.loads((tmp_path / "classp" / "results.json").read_text())["hardware"]["gpus"]
    assert ContinualMemory.load(tmp_path / "classp").tasks == ["icwsm14/nyt", "icwsm14/movie"]
