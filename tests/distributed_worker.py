"""What tests/test_distributed.py runs on several ranks: `accelerate launch ... distributed_worker.py SCENARIO GIVEN
FOLDER`.

What a scenario found goes into FOLDER, as JSON; GIVEN holds the runs of another number of ranks.
"""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import sys
from pathlib import Path

import conftest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import classp_hf
from classp_hf import ContinualTrainer, ContinualTrainingArguments, report
from classp_hf.compat import refuse_sharding
from classp_hf.launch import shard_on_cpus
from classp_hf.methods import PseudoRehearsal
from classp_hf.names import full_tensor, trainable_parameters
from classp_hf.optim import CLASSP
from classp_hf.optim.density import cuts_for_density
from classp_hf.remember import remember
from classp_hf.resume import load_weights

make_model = conftest.make_model.__wrapped__()
make_tasks = conftest.make_tasks.__wrapped__()
collator = conftest.collator.__wrapped__()


RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
GLOBAL_BATCH = 16

RUNS = {
    "classp": ({"optim": "classp"}, ["elastic+merge+logit_adjustment", PseudoRehearsal(rehearse_counts="off")]),
    "adamw": ({"optim": "adamw_torch", "gather_memory": True, "learning_rate": 1e-3}, "l2sp+lwf"),
    "heads": ({"optim": "classp", "heads": "per_task", "optim_args": "density=0.3"}, "interpolate"),
    "fisher": ({"optim": "adamw_torch", "learning_rate": 1e-3}, "ewc+pseudo_rehearsal"),
    "compiled": (
        {"optim": "classp", "torch_compile": True, "torch_compile_backend": "eager"},
        "ewc+pseudo_rehearsal+logit_adjustment",
    ),
    "lora": ({"optim": "classp", "learning_rate": 1e-2}, "lwf"),
}
"""Arguments and method of the sequences that every number of ranks runs."""
SHARDED = [run for run in RUNS if run != "compiled"]
"""On four ranks; compiling takes each of them as long as all the others together, so two do it."""


def arguments(folder, **changes):
    defaults = {
        "output_dir": str(folder),
        "per_device_train_batch_size": GLOBAL_BATCH // WORLD,
        "per_device_eval_batch_size": 10,
        "num_train_epochs": 1,
        "learning_rate": 3e-3,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_strategy": "no",
    }
    return {**defaults, **changes}


def language(folder):
    """A causal model that rehearses its own samples, with the memory of what it knew, and a guard."""
    os.environ["CLASSP_HF_CACHE"] = str(folder / "cache")
    remember.__kwdefaults__.update(samples=32, max_length=12)
    rows = [[1, *[3 + (i + j) % 5 for j in range(7)]] for i in range(64)]
    data = Dataset.from_dict({"input_ids": rows, "labels": rows, "attention_mask": [[1] * 8] * 64})
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    tokens = {"vocab_size": conftest.VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **tokens, max_position_embeddings=16, initializer_range=0.15))
    guard = classp_hf.GuardCallback(samples=8, length=12)
    made = ContinualTrainer(
        model,
        ContinualTrainingArguments(**arguments(folder, optim="classp", memory="pretrained")),
        train_dataset=data,
        callbacks=[guard],
        method=PseudoRehearsal(rehearse_samples=16, rehearse_length=12),
    )
    made.train()
    made.save_model()
    report = guard.report()
    return {k: report[k] for k in ("loss_before", "loss_after", "kl", "kl_new")}


def trainer(folder, run, **changes):
    given, method = RUNS.get(run, ({}, run))
    if run == "fisher":  # of fewer examples than ranks
        method = [classp_hf.EWC(fisher_samples=3), "pseudo_rehearsal"]
    model = make_model()
    if run == "lora":
        model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", target_modules="all-linear", r=2))
    # cut_after_first_task goes back to what a run deletes
    args = ContinualTrainingArguments(**arguments(folder, **{**given, **changes}), keep_task_models=True)
    return ContinualTrainer(model, args, collator, method=method)


def sequence(folder, run, **changes):
    return trainer(folder, run, **changes).train_sequence(make_tasks())


def cut_after_first_task(source, target, keep_checkpoint=None):
    """A copy of a finished run as it was when its second task had begun."""
    shutil.copytree(source, target, dirs_exist_ok=True)
    path = target / "sequence_state.json"
    state = json.loads(path.read_text())
    state["accuracy_matrix"], state["steps"] = state["accuracy_matrix"][:2], state["steps"][:1]
    path.write_text(json.dumps(state))
    for file in (target / "01-second").iterdir():
        if file.name != keep_checkpoint:
            shutil.rmtree(file) if file.is_dir() else file.unlink()


def script(folder):
    """An unedited script's Trainer, which evaluates just before it saves."""
    classp_hf.register()
    task = make_tasks()[0]
    given = {"optim": "classp", "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    args = TrainingArguments(**arguments(folder, **given), max_grad_norm=0.0)  # clipping would hide a scaled loss
    shard_on_cpus(args)
    os.environ["FSDP_TRANSFORMER_CLS_TO_WRAP"] = "BertLayer"
    Trainer(make_model(), args, collator, task.train_dataset, task.eval_dataset).train()
    del os.environ["FSDP_TRANSFORMER_CLS_TO_WRAP"]


def sharded_tensors():
    """Threshold, share, step of sharded gradients: whether they are those of the whole ones, to the bit."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (WORLD,))
    square = init_device_mesh("cpu", (2, WORLD // 2)) if WORLD > 2 else None
    found = {}
    shapes = [(3,), (1,), (2, 32), (3, 32), (0, 4), (5, 7, 3), (41,), (400, 131), (33_000,), (16, 4096)]
    for shape in shapes:
        generator = torch.Generator().manual_seed(len(found))
        g = torch.randn(shape, generator=generator) * (torch.rand(shape, generator=generator) > 0.3)
        w = torch.randn(shape, generator=generator)
        whole = torch.nn.Parameter(w.clone())
        whole.grad = g.clone()
        plain = CLASSP([whole], lr=0.1, density=0.25)
        share = plain.update_density()
        plain.step()
        threshold = cuts_for_density([g], 0.25)[0]
        kinds = {"rows": (mesh, [Shard(0)]), "copies": (mesh, [Replicate()])}
        if square is not None:
            kinds["copies of rows"] = (square, [Replicate(), Shard(0)])
        for kind, (where, placements) in kinds.items():
            p = torch.nn.Parameter(distribute_tensor(w.clone(), where, placements))
            p.grad = distribute_tensor(g.clone(), where, placements)
            optimizer = CLASSP([p], lr=0.1, density=0.25)
            same = {
                "threshold": torch.equal(cuts_for_density([p.grad], 0.25)[0], threshold),
                "share": optimizer.update_density() == share,
            }
            optimizer.step()
            same["weights"] = torch.equal(full_tensor(p.detach()), whole.detach())
            same["memory"] = torch.equal(
                full_tensor(optimizer.state[p]["accumulator"]), plain.state[whole]["accumulator"]
            )
            found[f"{shape} {kind}"] = same
    p = torch.nn.Parameter(distribute_tensor(torch.ones(3, 2), mesh, [Shard(0)]))
    p.grad = distribute_tensor(torch.tensor([[1.0, 2.0], [float("nan"), 1.0], [1.0, 1.0]]), mesh, [Shard(0)])
    optimizer = CLASSP([p])
    cut = torch.nn.Module()
    cut.weight = torch.nn.Parameter(distribute_tensor(torch.ones(3, 2), mesh, [Shard(0)]))
    found["tensor parallelism"] = message(lambda: refuse_sharding(cut))
    found["nan"] = message(optimizer.step)
    found["nan_untouched"] = float(full_tensor(p.detach())[1, 0]) == 1 and bool(
        full_tensor(p.detach()).isfinite().all()
    )
    return found


def message(call):
    try:
        call()
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def write(folder, name, result):
    """The results of all ranks, one after another."""
    gathered = [None] * WORLD
    torch.distributed.all_gather_object(gathered, result)
    if RANK == 0:
        (folder / f"{name}.json").write_text(json.dumps(gathered))


def go_on(source, target, run, keep_checkpoint=None, **changes):
    """Cut the finished run in `source` after its first task and resume it here. Returns R."""
    made = trainer(target, run, **changes)
    if RANK == 0:
        cut_after_first_task(source / run, target, keep_checkpoint)
    torch.distributed.barrier()
    R = made.train_sequence(make_tasks(), resume_from_checkpoint=True)["accuracy_matrix"]
    return {"R": R, "sharded": bool(made.accelerator.is_fsdp2), "resumed": made.state.global_step}


def four_sharded(one, folder):
    """Four ranks; the launcher says FSDP2."""
    for run in SHARDED:
        saves = {"save_strategy": "steps", "save_steps": 2} if run in ("classp", "fisher") else {}
        made = trainer(folder / run, run, **saves)
        R = made.train_sequence(make_tasks())["accuracy_matrix"]
        parameters = [p.detach() for _, p in trainable_parameters(made.model)]
        empty = sum(p.to_local().numel() == 0 for p in parameters)
        write(folder, run, {"R": R, "sharded": bool(made.accelerator.is_fsdp2), "empty": empty})
        if run == "classp":
            made.accelerator.state.fsdp_plugin.set_state_dict_type("SHARDED_STATE_DICT")
            made.save_model(str(folder / "sharded_files"))
            with torch.no_grad():
                for p in made.model.parameters():
                    p.zero_()
            load_weights(made.model, folder / run)
            made.save_model(str(folder / "read_back"))
    write(folder, "classp_goes_on", go_on(one, folder / "classp_goes_on", "classp"))
    # stopped after the last checkpoint of a task: no step is left
    write(folder, "fisher_goes_on", go_on(folder, folder / "fisher_goes_on", "fisher", "checkpoint-4"))
    script(folder / "script")
    write(folder, "tensors", sharded_tensors())
    write(folder, "language", language(folder / "language"))
    del os.environ["ACCELERATE_USE_FSDP"]
    write(folder, "copies", {"R": sequence(folder / "copies", "fisher")["accuracy_matrix"]})


def two_copies(four, folder):
    """Two ranks; the launcher says DDP, and later the arguments FSDP2."""
    write(folder, "classp", go_on(four, folder / "classp", "classp"))
    write(folder, "adamw", go_on(four, folder / "adamw", "adamw"))
    plugin = {"fsdp": True, "fsdp_config": {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}}
    write(folder, "sharded", go_on(four, folder / "sharded", "classp", keep_checkpoint="checkpoint-2", **plugin))
    made = trainer(folder / "compiled", "compiled", **plugin)
    R = made.train_sequence(make_tasks())["accuracy_matrix"]
    write(folder, "compiled", {"R": R, "sharded": bool(made.accelerator.is_fsdp2)})


class Wide(torch.nn.Module):
    """8 weights of 40 MiB."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(1024, 10240, bias=False) for _ in range(8))

    def forward(self, x):
        return {"loss": sum(layer(x).square().mean() for layer in self.layers)}


def room(_, folder):
    """A memory of 320 MiB is written with room for 250 MiB on each of two ranks, which has half of it sharded."""
    classp_hf.register()
    torch.manual_seed(0)
    model, engine = Wide(), classp_hf.ContinualCallback(memory="none")
    fsdp = {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "transformer_layer_cls_to_wrap": ["Linear"]}
    changes = {"optim": "classp", "max_steps": 1, "fsdp": True, "fsdp_config": fsdp}
    args = TrainingArguments(**arguments(folder, **changes))
    shard_on_cpus(args)
    data = [{"x": torch.ones(1024)}] * GLOBAL_BATCH
    Trainer(model, args, train_dataset=data, callbacks=[engine]).train()
    model.zero_grad()
    before = full_tensor(dict(engine.accumulators())["layers.7.weight"]).sum()
    now = int(re.search(r"VmData:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
    resource.setrlimit(resource.RLIMIT_DATA, (now + 250 * 2**20, -1))
    engine.write(folder / "again", args)
    torch.distributed.barrier()
    resource.setrlimit(resource.RLIMIT_DATA, (-1, -1))
    found = classp_hf.ContinualMemory.load(folder / "again").get("accumulator")
    same = bool(found["layers.7.weight"].sum() == before) and float(before) > 0
    local = sum(p.to_local().numel() for p in model.parameters())
    write(folder, "room", {"same": same, "local": local, "whole": sum(t.numel() for t in found.values())})


if __name__ == "__main__":
    report.write_figures = lambda *_: None  # they take longer than the training, and are tested elsewhere
    scenarios = {scenario.__name__: scenario for scenario in (four_sharded, two_copies, room)}
    scenarios[sys.argv[1]](Path(sys.argv[2]), Path(sys.argv[3]))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads of several groups may abort an interpreter that winds down
