"""The Triton step where there is no GPU: in Triton's interpreter, and compiled for GPUs that are not there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")


def compiled_for(target, kernel, weight, state, power, scaled=False):
    import triton.language as tl
    from triton.compiler import ASTSource

    constants = {"KIND": power, "APPLY_DECAY": True}
    pointers = {"bad": "i32", "lr": "fp32"}
    for name in ("grad_scale", "found_inf"):
        if scaled:
            pointers[name] = "fp32"
        else:
            constants[name] = None
    constants |= {name: getattr(tl, dtype) for name, dtype in zip("WGS", (weight, weight, state))}
    pointers |= {"table": "i64", "tensor_of": "i32", "thresholds": "fp32"}
    signature = {name: "*" + dtype for name, dtype in pointers.items()}
    names = kernel.arg_names
    source = ASTSource(
        fn=kernel,
        signature={n: "constexpr" if n in constants else signature.get(n, "fp32") for n in names},
        constexprs={(names.index(n),): value for n, value in constants.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in pointers},
    )
    return triton.compile(source, target=target, options={"enable_fp_fusion": False}).asm


@pytest.mark.parametrize("power", [2, 1, 0])
@pytest.mark.parametrize("weight, state", [("float32", "float32"), ("bfloat16", "float32"), ("bfloat16", "bfloat16"), ("float32", "uint8")])  # fmt: skip
def test_compiles_for_a_gpu_with_wide_loads_and_no_contraction(weight, state, power):
    from triton.backends.compiler import GPUTarget

    from classp_hf.optim import triton_kernels

    h200 = GPUTarget("cuda", 90, 32)
    for scaled in (False, True):
        asm = compiled_for(h200, triton_kernels._step_all, weight, state, power, scaled)
        assert asm["cubin"]  # by NVIDIA's own assembler
        assert re.search(r"ld\.global\.v4\.b32", asm["ptx"]) and re.search(r"st\.global\.v4\.b32", asm["ptx"])
        if power:
            assert "fma.rn" not in asm["ptx"]  # what is contracted is rounded otherwise than on CPUs
    assert compiled_for(GPUTarget("hip", "gfx942", 64), triton_kernels._step_all, weight, state, power)["hsaco"]


def test_gives_what_the_other_forms_give():
    """`interpreted_kernels.py`, in a process of its own."""
    here = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", here / "interpreted_kernels.py"]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
    assert "failed" not in done.stdout and int(re.search(r"(\d+) passed", done.stdout)[1]) > 30
