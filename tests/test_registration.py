from __future__ import annotations

import importlib.util
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import pytest
from warm_python import python

from classp_hf import ContinualTrainer, optim_args, registration

# A Trainer script of the kind people have: it knows nothing of classp_hf.
SCRIPT = """
import sys
from datasets import Dataset
from transformers import BertConfig, BertForSequenceClassification, HfArgumentParser, Trainer, TrainingArguments

if __name__ == "__main__":
    (args,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses()
    config = BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    data = Dataset.from_dict({"input_ids": [[1, 2, 3]] * 8, "labels": [0, 1] * 4})
    trainer = Trainer(model=BertForSequenceClassification(config), args=args, train_dataset=data)
    trainer.train()
    trainer.save_model()
    optimizer = trainer.optimizer.optimizer
    print("INSIDE", type(optimizer).__module__, type(optimizer).__name__, __name__, sys.argv[0])
    print("GROUP", {k: optimizer.param_groups[0][k] for k in ("lr", "power", "density", "apply_decay")})
    print("STATE", sum(float(s["accumulator"].sum()) > 0 for s in optimizer.state.values()) > 0)
"""


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "unedited.py"
    path.write_text(textwrap.dedent(SCRIPT))
    return path


def launch(launcher, script, tmp_path, *flags):
    launcher = launcher if launcher[0] == sys.executable else [python(), *launcher]
    command = [*launcher, str(script), "--output_dir", str(tmp_path / "out"), "--num_train_epochs", "1", "--use_cpu"]
    return subprocess.run([*command, *flags], capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(
    "launcher",
    [
        [sys.executable, "-m", "classp_hf"],
        ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "-m", "classp_hf"],
    ],
    ids=["python -m", "accelerate launch -m"],
)
def test_an_unedited_script_trains_with_classp(launcher, script, tmp_path):
    flags = ["--optim", "classp", "--optim_args", "power=2, density=0.5,apply_decay=true", "--learning_rate", "0.01"]
    run = launch(launcher, script, tmp_path, *flags)
    assert run.returncode == 0, run.stderr
    assert f"INSIDE classp_hf.optim.classp CLASSP __main__ {script}" in run.stdout
    assert "'power': 2.0, 'density': 0.5, 'apply_decay': True" in run.stdout
    assert "STATE True" in run.stdout


def test_other_optimizers_and_modules_still_run(script, tmp_path):
    run = launch(["-m", "classp_hf"], script, tmp_path, "--optim", "sgd")
    assert "INSIDE torch.optim.sgd SGD" in run.stdout, run.stderr
    run = subprocess.run([python(), "-m", "classp_hf", "-m", "json.tool", "--help"], capture_output=True, text=True)
    assert "usage: " in run.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "usage: python -m classp_hf [options] (SCRIPT | -m MODULE)"),
        (["--help"], 0, "--ewc_lambda"),
        (["nowhere.py"], 2, "error: there is no script 'nowhere.py'"),
        (["-m"], 2, "error: -m needs the name of a module"),
        (["--method", "lwf", "x.py"], 2, "error: the method 'lwf' changes the data, the model or the loss"),
        (["--method", "ecw", "x.py"], 2, "error: Unknown method 'ecw'"),
        (["--method", "ewc", "--ewc_lambda", "-1", "x.py"], 2, "error: ewc_lambda must be >= 0, got -1.0"),
        (["--optim", "classp", "--optim_args", "powr=1", "x.py"], 2, "error: Unknown key 'powr' in --optim_args"),
        (["--optim", "adamw_typo", "x.py"], 2, "error: --optim adamw_typo is unknown. Known: "),
        (["--method", "ewc", "--fisher_normalize", "False", "nowhere.py"], 2, "there is no script 'nowhere.py'"),
        (["--optim", "classp", "leaves.py"], 1, "--optim had no effect: 'leaves.py' trained no transformers.Trainer"),
        (["--optim", "classp", "fails.py"], 3, ""),
        (["--memory", "kept", "demo"], 2, "error: --memory stands before 'demo', which has options of its own"),
    ],
)
def test_usage(arguments, code, message, tmp_path):
    (tmp_path / "x.py").touch()
    (tmp_path / "leaves.py").write_text("import sys; sys.exit(0)")
    (tmp_path / "fails.py").write_text("import sys; sys.exit(3)")
    run = subprocess.run([python(), "-m", "classp_hf", *arguments], capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == code
    assert message in run.stdout + run.stderr


def test_options_that_register_does_not_know():
    with pytest.raises(TypeError, match="register.. knows .*method.*; got metod"):
        registration.register(metod="ewc")


def test_without_register_the_name_is_unknown_and_with_it_argparse_lists_it():
    code = """
        from transformers import HfArgumentParser, TrainingArguments
        try:
            TrainingArguments(output_dir="x", optim="classp")
        except ValueError as error:
            assert "classp" in str(error)
        else:
            raise AssertionError("transformers knows classp by itself: registration can go")
        import classp_hf
        classp_hf.register()
        classp_hf.register()
        args = TrainingArguments(output_dir="x", optim="classp")
        assert args.optim == "classp" and args.to_dict()["optim"] == "classp"
        help = HfArgumentParser(TrainingArguments).format_help()
        assert help.count(",classp}") >= 1, help
    """
    subprocess.run([python(), "-c", textwrap.dedent(code)], check=True)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("powr=2", r"Unknown key 'powr' in --optim_args. CLASSP knows: threshold, power, eps, apply_decay, density"),
        ("lr=1", r"Unknown key 'lr' in --optim_args \(use --learning_rate\)"),
        ("power=two", "power=two in --optim_args does not parse: power must be a number"),
        ("apply_decay=maybe", "apply_decay=maybe in --optim_args does not parse: apply_decay must be true or false"),
        ("power", "--optim_args must be key=value pairs separated by commas, got 'power'"),
        ("anchor_strength=-1", "anchor_strength must be finite and >= 0, got -1.0 in --optim_args"),
        ("merge_weight=inf", "merge_weight must be finite and >= 0, got inf in --optim_args"),
        ("power=-1", "power must be finite and > 0, got -1.0"),
        ("threshold=1e-6,density=0.1", "threshold=1e-06 and density=0.1 exclude each other"),
    ],
)
def test_bad_optim_args(text, match):
    with pytest.raises(ValueError, match=match):
        optim_args.parse_optim_args(text)


def test_bad_optim_args_stop_an_unedited_script(script, tmp_path):
    run = launch(["-m", "classp_hf"], script, tmp_path, "--optim", "classp", "--optim_args", "powr=2")
    assert run.returncode != 0
    assert "Unknown key 'powr' in --optim_args" in run.stderr
    assert "INSIDE" not in run.stdout


def test_good_optim_args():
    assert optim_args.parse_optim_args(None) == ({}, {})
    assert optim_args.parse_optim_args("power=2, eps=1e-4,foreach=false,anchor_strength=0.3") == (
        {"power": 2.0, "eps": 1e-4, "foreach": False},
        {"anchor_strength": 0.3},
    )
    assert optim_args.parse_optim_args({"apply_decay": "False", "memory": "none"}) == (
        {"apply_decay": False},
        {"memory": "none"},
    )


def test_optim_args_cover_the_optimizers_hyperparameters():
    import inspect

    import torch

    from classp_hf import CLASSP

    hyperparameters = set(inspect.signature(CLASSP).parameters) - {"params"}
    assert set(optim_args.OPTIM_ARGS) == hyperparameters - {"lr", "weight_decay"}
    assert set(CLASSP([torch.zeros(1)]).defaults) == hyperparameters


@pytest.mark.parametrize(
    ("configuration", "optim_args", "message"),
    [
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, None, "offload_optimizer .* Leave it out"),
        ({"optimizer": {"type": "AdamW"}}, None, "an optimizer in its configuration .* Leave it out"),
        ({"zero_optimization": {"stage": 2}}, "density=0.1", "density is not supported"),
        ({"zero_optimization": {"stage": 2}}, "state_dtype=uint8", "state_dtype is not supported"),
    ],
)
def test_what_deepspeed_cannot_do_is_refused(configuration, optim_args, message):
    """DeepSpeed itself is not among the tests' requirements."""
    plugin = SimpleNamespace(deepspeed_config=configuration)
    args = SimpleNamespace(deepspeed_plugin=plugin, optim_args=optim_args, learning_rate=1e-3)
    with pytest.raises(ValueError, match=message):
        registration._classp(args)
    args.deepspeed_plugin.deepspeed_config, args.optim_args = {}, None
    assert registration._classp(args)[1]["lr"] == 1e-3


def test_a_continual_trainer_does_not_run_under_deepspeed(make_model, make_args):
    args = make_args(optim="adamw_torch")
    args.deepspeed_plugin = SimpleNamespace(deepspeed_config={})
    with pytest.raises(ValueError, match="Use FSDP2 .* Trainer with `--optim classp`"):
        ContinualTrainer(make_model(), args)


@pytest.mark.parametrize(
    ("sabotage", "message"),
    [
        pytest.param(
            "import transformers.trainer_optimizer as t; t._OPTIMIZER_HANDLERS = ()",
            "keeps its optimizer names or default callbacks elsewhere than classp_hf knows",
            marks=pytest.mark.skipif(
                importlib.util.find_spec("transformers.trainer_optimizer") is None, reason="as Transformers 4.57"
            ),
        ),
        (
            "import transformers.trainer as t; del t.DEFAULT_CALLBACKS",
            "keeps its optimizer names or default callbacks elsewhere than classp_hf knows",
        ),
    ],
)
def test_unsupported_transformers(sabotage, message):
    code = f"import transformers\nfrom transformers import Trainer\n{sabotage}\nimport classp_hf\nclassp_hf.register()"
    run = subprocess.run([python(), "-c", code], capture_output=True, text=True)
    assert run.returncode != 0
    assert message in run.stderr
    # nothing is left half registered
    code = code.replace(
        "classp_hf.register()",
        "try:\n    classp_hf.register()\nexcept ImportError: pass\n"
        "from transformers.training_args import OptimizerNames\n"
        "assert 'classp' not in OptimizerNames._value2member_map_",
    )
    subprocess.run([python(), "-c", code], check=True)
