"""docs/concepts/scale.md: what each method costs models of 1 to 70 billion weights on 1 to 64 devices, on paper.

python benchmarks/report_scale.py measure   # this machine's FLOPs and bytes a second, into results/balance.json
python benchmarks/report_scale.py           # the page, from that, bench_big_model.json and bench_penalty.json
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from report_performance import ROOT, cpu, load, source, wrapped

from classp_hf import report
from classp_hf.report import environment

RESULTS = ROOT / "benchmarks/results"
SIZES, DEVICES = (1, 8, 70), (1, 8, 64)
H200 = 989e12 / 4.8e12  # FLOPs a byte, of the data sheet: bfloat16 without sparsity, HBM3e


@dataclass(frozen=True)
class Cost:
    """What a method adds to AdamW's training under FSDP2, a weight and step where nothing else is said."""

    name: str
    device: float = 0  # bytes held, shared out over the devices
    host: float = 0  # bytes held on the CPU by every process
    traffic: float = 0  # bytes read and written, shared out over the devices
    flops: float = 0  # a token
    network: float = 0  # bytes that every device receives
    boundary: str = ""


# AdamW holds weight, gradient and two moments in float32, 16 bytes, and its step reads and writes 28. Counted in
# classp_hf/optim/classp.py, methods/base.py and the methods' files: an elementwise operation reads its operands and
# writes its result, once each.
AT_BOUNDARY = "writes 4 bytes a weight"
GATHER = 4 + 8 + 8 + 12  # the memory beside AdamW: the largest gradient, the bad ones out, squared, added
COSTS = (
    Cost("CLASSP", device=-4, traffic=20 + 4 - 28, boundary=AT_BOUNDARY),
    Cost("CLASSP (threshold)", device=-4, traffic=20 + 4 + 8 - 28, boundary=AT_BOUNDARY),
    Cost("CLASSP (density)", device=-4, traffic=20 + 4 + 8 - 28, network=4, boundary=AT_BOUNDARY),
    Cost("EWC", device=8, traffic=3 * 12, boundary="the Fisher: 6 FLOPs a weight and token of 256 examples"),
    Cost("L2-SP", device=4, traffic=2 * 12, boundary="none"),
    Cost("elastic (AdamW)", device=8, traffic=3 * 12 + GATHER, boundary=AT_BOUNDARY),
    Cost("elastic (CLASSP)", traffic=20 + 4 - 28 + 6 * 8 + 5 * 12, boundary=AT_BOUNDARY),
    Cost("EMA", device=4, traffic=12, boundary="none"),
    Cost("merge (AdamW)", device=4, host=8, traffic=GATHER, boundary="gathers 8 bytes a weight in every process"),
    Cost("interpolate", device=4, host=4, boundary="none"),
    Cost(
        "pseudo-rehearsal (0.25)", device=4, traffic=24, flops=6 / 4, network=8, boundary="draws and answers samples"
    ),
    Cost("replay (0.25)", flops=6 / 4, boundary="none"),
    Cost("LwF", device=4, traffic=48, flops=2, network=4, boundary="copies the weights"),
    Cost("logit adjustment", boundary="none"),
)


def measure() -> None:
    """The best of several rounds, one thread: FLOPs a second of a layer's product, bytes a second of a copy."""
    torch.set_num_threads(1)

    def fastest(function: Callable[[], object]) -> float:
        times = []
        for _ in range(20):
            started = time.perf_counter()
            function()
            times.append(time.perf_counter() - started)
        return min(times)

    found: dict[str, object] = {"command": "python benchmarks/report_scale.py measure"}
    for dtype in (torch.float32, torch.bfloat16):
        x, w = torch.randn(512, 2048, dtype=dtype), torch.randn(2048, 2048, dtype=dtype)
        seconds = fastest(lambda x=x, w=w: torch.nn.functional.linear(x, w))
        found[str(dtype).removeprefix("torch.")] = round(2 * 512 * 2048 * 2048 / seconds)
    a, b = torch.randn(1 << 26), torch.empty(1 << 26)
    found["bytes"] = round(2 * a.nbytes / fastest(lambda: b.copy_(a)))
    (RESULTS / "balance.json").write_text(json.dumps({**found, **environment()}, indent=1) + "\n")


def share(cost: Cost, balance: float, tokens: int, devices: int) -> float:
    """Of the 6 FLOPs a weight and token that training takes; negative: it saves."""
    return cost.flops / 6 + cost.traffic * balance / devices / (6 * tokens)


def page() -> str:
    balance, big, penalty = (load(name, RESULTS) for name in ("balance", "bench_big_model", "bench_penalty"))
    assert balance and big and penalty
    here = balance["float32"] / balance["bytes"]
    added = [["added to AdamW", "held on devices", "held by every process", "traffic", "FLOPs a token", "network",
              "at the end of a task"]]  # fmt: skip
    added += [
        [c.name, *(f"{x:g}" for x in (c.device, c.host, c.traffic, c.flops, c.network)), c.boundary] for c in COSTS
    ]
    held = [["GB a device, of AdamW's training with", *(f"{n}B / {d}" for n in SIZES for d in DEVICES)]]
    for size in sorted({c.device for c in COSTS}):
        names = "no method" if size == 0 else ", ".join(c.name for c in COSTS if c.device == size)
        held.append([names, *(f"{(16 + size) * n / d:,.1f}" for n in SIZES for d in DEVICES)])
    shares = [["tokens a device / devices", *(f"{t} tokens / {d}" for t in (512, 8192) for d in DEVICES)]]
    for c in COSTS:
        if c.traffic or c.flops:
            cells = [f"{round(100 * share(c, H200, t, d), 1) + 0.0:.1f} %" for t in (512, 8192) for d in DEVICES]
            shares.append([c.name, *cells])
    enough = [["", "this machine", "H200"]]
    for c in COSTS:
        if c.traffic > 0 and not c.flops:
            cells = [f"{c.traffic * x / (6 * 0.05):,.0f}" for x in (here, H200)]
            enough.append([c.name, *cells])
    phases = [["", "seconds", "peak, memory = 1"]]
    phases += [[k, f"{v['seconds']:.1f}", f"{v['peak_ratio']:.2f}"] for k, v in big["phases"].items()]
    seen = penalty["shares_of_a_step"]["sentiment_sequence"]
    ewc, l2sp = (next(c for c in COSTS if c.name == name) for name in ("EWC", "L2-SP"))

    def table(rows: list[list[str]]) -> str:
        return report.markdown_table(rows, "<" + ">" * (len(rows[0]) - 1))

    gigabytes = big["memory_bytes"] / 1e9
    ewc_share, l2sp_share = seen["ewc"][1], seen["l2sp"][1]
    paragraphs = [
        "# Scale, on paper",
        "What a method adds to training by AdamW with FSDP2, as models grow and are spread over devices. Counted from "
        "the code, not measured, where nothing else is said; nothing has run on a GPU. Written by `python "
        "benchmarks/report_scale.py`.",
        "## A weight",
        "Bytes and FLOPs for each weight and step. What is held on devices and traffic are shared out over them; "
        "network is what every device receives. AdamW itself holds 16 bytes, reads and writes 28 a step, computes 6 "
        "FLOPs a token, and FSDP2 sends some 8 bytes: the weights twice, the gradients once.",
        table(added),
        "## Room",
        "Billions of weights / devices, in GB a device, without activations. The memory's file has 4 bytes a weight: "
        "4, 32 and 280 GB. `merge` also holds 8 bytes a weight on the CPU in every process: for 8 billion weights 64 "
        "GB, eight times on a machine of 8 devices.",
        table(held),
        "## Time",
        "Traffic costs the more, the fewer tokens a device sees in a step and the faster it computes. A device that "
        "makes b FLOPs while it moves a byte spends the share traffic * b / (6 * tokens * devices) of a step on it, "
        f"with tokens a device. b is {here:.1f} here (measured on one thread: {balance['float32'] / 1e9:.0f} GFLOP/s "
        f"in float32 and {balance['bytes'] / 1e9:.1f} GB/s, {cpu(balance['hardware'])}) and {H200:.0f} for an H200 "
        "(its data sheet; a real training computes at less, so that the shares are smaller). For the H200:",
        table(shares),
        "Tokens in a step, over all devices, from which on the traffic costs less than 5 %:",
        table(enough),
        "What is measured is ordered as it is counted: of a step of `sentiment_sequence` EWC takes "
        f"{100 * ewc_share:.1f} % and L2-SP {100 * l2sp_share:.1f} % ([Performance](../performance.md)), "
        f"{ewc_share / l2sp_share:.2f} times as much where {ewc.traffic / l2sp.traffic:.2f} are counted.",
        "## Where each stops being worth it",
        "- **CLASSP** never, by this count: it holds and moves less than AdamW (on a CPU its step takes as\n"
        "  long as AdamW's). Its density gathers every gradient whole, one tensor at a time: on several\n"
        "  devices take a threshold.\n"
        "- **EWC, elastic, L2-SP, EMA**: with small batches on one fast device, where the penalty takes as\n"
        "  long as the training. More tokens in a step, or more devices, mend it.\n"
        "- **Pseudo-rehearsal** never by compute, which its fraction sets; but it sends as much as the\n"
        "  training itself, whatever the fraction. Where the network takes the time, it doubles the step.\n"
        "- **LwF**: by its third more of compute, whatever the scale; its traffic is that of shards.\n"
        "- **merge, interpolate**: where the CPUs have no room for 8 or 4 bytes a weight and process.",
        "## The memory of a big model, measured",
        f"{big['weights'] / 1e9:.2f} billion weights in bfloat16, a Llama of random weights, trained by one CLASSP "
        f"step with gradient checkpointing; the memory has {gigabytes:.1f} GB. It is written tensor by tensor, and "
        "read as pages of its file: the largest tensor, the embedding, makes the peak.",
        table(phases),
        source({**big, "command": "python benchmarks/bench_big_model.py", **big["environment"]}),
    ]  # fmt: skip
    plain = ("#", "|", "-")
    return "\n\n".join(p if p.startswith(plain) else wrapped(p) for p in paragraphs) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", nargs="?", choices=["measure", "page"], default="page")
    if parser.parse_args().action == "measure":
        measure()
    else:
        Path(ROOT / "docs/concepts/scale.md").write_text(page())


if __name__ == "__main__":
    main()
