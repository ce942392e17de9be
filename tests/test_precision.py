"""However a step's gradients come about, CLASSP's update is the slow oracle's; through the real Trainer where it has a
flag."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from reference_classp import ReferenceCLASSP
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from classp_hf import EWC, ContinualCallback, ContinualMemory, ContinualTrainer, PseudoRehearsal, register
from classp_hf.names import trainable_parameters
from classp_hf.optim import CLASSP

SMALL = ("classifier.weight", "classifier.bias", "bert.encoder.layer.0.output.LayerNorm.weight")
"""The oracle goes one coordinate at a time."""


class Follow(TrainerCallback):
    """Steps the oracle beside the optimizer, from the same weights and the gradients that the optimizer gets."""

    def __init__(self, tolerance):
        self.tolerance, self.oracles, self.gradients, self.norms = tolerance, {}, [], []

    def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        parameters = dict(trainable_parameters(model))
        self.gradients.append({n: p.grad.double().numpy() for n, p in parameters.items()})
        self.norms.append(np.sqrt(sum((g**2).sum() for g in self.gradients[-1].values())))
        lr = optimizer.param_groups[0]["lr"]
        for n in SMALL:
            oracle = self.oracles.setdefault(n, ReferenceCLASSP(np.zeros(parameters[n].shape), lr))
            oracle.w, oracle.lr = parameters[n].detach().double().numpy().copy(), lr
            oracle.step(self.gradients[-1][n])

    def on_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        parameters = dict(trainable_parameters(model))
        for n, oracle in self.oracles.items():
            accumulator = optimizer.state[parameters[n]]["accumulator"]
            assert accumulator.dtype is torch.float32
            # the state holds eps beside the accumulator
            np.testing.assert_allclose(accumulator.numpy(), oracle.s + oracle.eps, rtol=1e-5)
            after = parameters[n].detach().double().numpy()
            np.testing.assert_allclose(after, oracle.w, rtol=self.tolerance, atol=1e-7, err_msg=n)


@pytest.fixture
def train(make_model, make_tasks, make_args, collator):
    def run(dtype=torch.float32, **changes):
        args = make_args(optim="classp", max_steps=4, **changes)
        trainer = ContinualTrainer(make_model().to(dtype), args, collator, train_dataset=make_tasks()[0].train_dataset)
        # of bfloat16 weights half a unit in the last place, of float32 ones a few
        follow = Follow(2**-8 if dtype is torch.bfloat16 else 1e-6)
        trainer.add_callback(follow)
        trainer.train()
        assert len(follow.gradients) == 4
        return follow

    return run


WAYS = {
    # arguments, and how far the first step's gradients may be from those of plain float32, relative to their norm
    "float32": ({}, 0.0),
    "bf16 autocast": ({"bf16": True}, 0.05),
    "bf16 weights": ({"dtype": torch.bfloat16}, 0.05),
    "compiled": ({"torch_compile": True, "torch_compile_backend": "aot_eager"}, 1e-5),
    "activation checkpointing": ({"activation_checkpointing": True}, 1e-6),
    "accumulation": ({"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}, 1e-5),
}


@pytest.mark.parametrize("max_grad_norm", [0.0, 0.1], ids=["", "clipped"])
@pytest.mark.parametrize("way", WAYS)
def test_the_update_is_the_oracles(way, max_grad_norm, train):
    changes, tolerance = WAYS[way]
    found = train(max_grad_norm=max_grad_norm, **changes)
    if max_grad_norm:
        np.testing.assert_allclose(found.norms, max_grad_norm, rtol=0.01)
        return
    plain = train(max_grad_norm=0.0)
    difference = sum(((g - plain.gradients[0][n]) ** 2).sum() for n, g in found.gradients[0].items())
    assert np.sqrt(difference) <= tolerance * plain.norms[0]


def test_a_grad_scaler_unscales_what_is_remembered_and_skips_what_overflows():
    """fp16 on the CPU, which accelerate refuses: a scaler by hand."""
    torch.manual_seed(0)
    model = nn.Linear(5, 3)
    optimizer = CLASSP(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    oracle = ReferenceCLASSP(model.weight.detach().double().numpy(), lr=0.1)
    for step in range(4):
        x = torch.randn(7, 5) * (1e4 if step == 1 else 1)
        before = model.weight.detach().clone()
        with torch.autocast("cpu", torch.float16):
            loss = model(x).float().square().mean()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        overflows = not model.weight.grad.isfinite().all()
        assert overflows == (step == 1)
        if not overflows:
            oracle.step(model.weight.grad.double().numpy())
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert torch.equal(before, model.weight) == overflows
        np.testing.assert_allclose(optimizer.accumulator(model.weight).numpy(), oracle.s, rtol=1e-5, atol=1e-11)
        np.testing.assert_allclose(model.weight.detach().numpy(), oracle.w, rtol=1e-5, atol=1e-7)
    assert scaler.get_scale() == 2.0**15


SIZES = {"vocab_size": 40, "hidden_size": 64, "intermediate_size": 64, "initializer_range": 0.2}
SIZES |= {"num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture
def train_causal(tmp_path):
    """Two steps of an unedited script's Trainer; the model is saved."""

    def run(model, name, optim="classp", **given):
        rows = [[1, 5, 7, 9]] * 8
        data = Dataset.from_dict({"input_ids": rows, "labels": rows, "attention_mask": [[1] * 4] * 8})
        args = TrainingArguments(
            str(tmp_path / name), optim=optim, learning_rate=1e-2, max_steps=2, per_device_train_batch_size=1,
            use_cpu=True, report_to="none", disable_tqdm=True, gradient_checkpointing=True, save_strategy="no",
        )  # fmt: skip
        trainer = Trainer(model, args, train_dataset=data, callbacks=[ContinualCallback(**given)] if given else None)
        trainer.train()
        trainer.save_model()
        return trainer

    register()
    return run


def test_experts_that_no_token_reaches_keep_weights_and_memory(train_causal, tmp_path):
    """A mixture of experts with tied embeddings, trained in bfloat16; and once more from its memory."""
    torch.manual_seed(0)
    config = MixtralConfig(num_local_experts=8, num_experts_per_tok=2, num_key_value_heads=2, **SIZES)
    config.tie_word_embeddings = True
    model = MixtralForCausalLM(config).to(torch.bfloat16)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    train_causal(model, "one")
    again = MixtralForCausalLM.from_pretrained(tmp_path / "one", dtype=torch.bfloat16)
    train_causal(again, "two")
    first, second = (ContinualMemory.load(tmp_path / name) for name in ("one", "two"))
    assert second.tasks == ["one", "two"] and "lm_head.weight" not in first.get("accumulator")
    for n, old in first.get("accumulator").items():
        new, p = second.get("accumulator")[n], again.get_parameter(n).detach()
        assert (new >= old).all() and (new > old).any(), n
        if "experts" in n and p.ndim == 3:  # all experts of a layer; before transformers 5 a parameter each
            reached = [bool(e.any()) for e in new]
            assert 0 < sum(reached) < 8
            assert [not torch.equal(*e) for e in zip(p, before[n])] == reached, n


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("method", [None, "ewc", "pseudo_rehearsal"])
def test_adapters_on_quantised_weights(bits, method, train_causal, tmp_path):
    """QLoRA with bitsandbytes, whose CPU kernels are enough; the second run goes on from the adapter's folder."""
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(tmp_path / "base")

    def base():
        four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
        quantised = BitsAndBytesConfig(**four) if bits == 4 else BitsAndBytesConfig(load_in_8bit=True)
        given = {"quantization_config": quantised, "device_map": {"": "cpu"}}
        return prepare_model_for_kbit_training(AutoModelForCausalLM.from_pretrained(tmp_path / "base", **given))

    methods = {
        "ewc": EWC(fisher_samples=4),
        "pseudo_rehearsal": PseudoRehearsal(rehearse_samples=4, rehearse_length=8),
    }
    given = {} if method is None else {"method": methods[method]}
    optim = "classp" if method is None else "adamw_torch"
    config = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=2)
    train_causal(get_peft_model(base(), config), "one", optim, **given)
    adapter = PeftModel.from_pretrained(base(), tmp_path / "one", is_trainable=True)
    train_causal(adapter, "two", optim, memory=str(tmp_path / "one"), **given)
    memory = ContinualMemory.load(tmp_path / "two")
    assert memory.tasks == ["one", "two"]
    kind = {None: "accumulator", "ewc": "ewc.importance", "pseudo_rehearsal": "pseudo_rehearsal.pool"}[method]
    assert any(t.any() for t in memory.get(kind).values())
    if method is None:
        old, new = ContinualMemory.load(tmp_path / "one").get("accumulator"), memory.get("accumulator")
        assert all((t >= old[n]).all() for n, t in new.items()) and any((t > old[n]).any() for n, t in new.items())
