"""The tokens that a run was given are in nothing that it writes or says."""

import sys

import pytest

from classp_hf import ContinualTrainer
from classp_hf.redaction import public_arguments, public_command

TOKEN = "Zq-plain-secret"


def test_arguments_that_hold_a_secret_are_left_out_at_any_depth():
    nested = {"client_secret": TOKEN, "api-key": TOKEN, "rate": 1}
    arguments = {"hub_token": TOKEN, "wandb_api_key": TOKEN, "DB_PASSWORD": TOKEN, "nested": nested, "list": [nested]}
    kept = {"tokenizer_name": "kept", "include_num_input_tokens_seen": "no", "push_to_hub": True, "seed": 0}
    assert public_arguments({**arguments, **kept}) == {"nested": {"rate": 1}, "list": [{"rate": 1}], **kept}
    assert arguments["nested"]["client_secret"] == TOKEN  # the trainer still needs its own


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["t.py", "--hub_token", TOKEN, "--seed", "1"], "t.py --hub_token REDACTED --seed 1"),
        (["t.py", f"--hub-token={TOKEN}", "--API-KEY", TOKEN], "t.py --hub-token=REDACTED --API-KEY REDACTED"),
        (["t.py", "--hub_tok", TOKEN, f"--hub_to={TOKEN}"], "t.py --hub_tok REDACTED --hub_to=REDACTED"),
        (["t.py", "--password", "-1234", "two words"], "t.py --password REDACTED 'two words'"),
        # Not secrets: what follows a flag without a value, a file's name, a tokenizer, a number of tokens.
        (["t.py", "--use_auth_token", "--seed", "1"], "t.py --use_auth_token --seed 1"),
        (["token", "x", "--tokenizer_name", "b", "--max_tokens", "8"], "token x --tokenizer_name b --max_tokens 8"),
    ],
)
def test_values_of_flags_that_hold_a_secret_are_replaced(argv, expected):
    assert public_command(argv) == expected


def test_no_file_of_a_run_holds_its_token(make_model, make_tasks, make_args, collator, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(sys, "orig_argv", ["python", "train.py", "--hub_token", TOKEN])
    args = make_args(hub_token=TOKEN, max_steps=2, save_strategy="steps", save_steps=1, report_to="tensorboard")
    trainer = ContinualTrainer(make_model(), args, collator)
    print(args, repr(trainer.args))
    trainer.train_sequence(make_tasks(2))
    assert trainer.args.hub_token == TOKEN
    written = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    names = "/".join(path.name for path in written)
    for name in ("results.json", "README.md", "sequence_state.json", "training_args.bin", "trainer_state", "tfevents"):
        assert name in names
    assert [path for path in written if TOKEN.encode() in path.read_bytes()] == []
    assert TOKEN not in "".join(capfd.readouterr())
    assert "--hub_token REDACTED" in (tmp_path / "run" / "README.md").read_text()
