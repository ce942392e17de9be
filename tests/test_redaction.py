"""No secret that a run was given is in anything that it writes or says."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
import textwrap
import traceback
from pathlib import Path
from unittest.mock import Mock

import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from classp_hf import ContinualMemory, ContinualTrainingArguments
from classp_hf.hub import push_folder
from classp_hf.redaction import REDACTED, known_secrets, public_arguments, public_command, redact

SECRETS = {
    "flag": "Zq-flag-secret-1",  # no pattern of a token tells them
    "HF_TOKEN": "Zq-environment-secret-2",
    "WANDB_API_KEY": "Zq-environment-secret-3",
    "url": "Zq:url@secret-4",
    "hub": "hf_" + "Zq5" * 10,
}

RUN = """
    import sys, warnings
    from transformers import HfArgumentParser, logging
    from test_hub import tiny
    from classp_hf import ClasspTrainer, ContinualMemory, ContinualTrainingArguments, L2SP
    from classp_hf.hub import push_folder
    logging.set_verbosity_debug()
    args, = HfArgumentParser(ContinualTrainingArguments).parse_args_into_dataclasses()
    model, tasks, collate = tiny()
    trainer = ClasspTrainer(model, args, collate, method=L2SP())
    assert trainer.args.hub_token == args.hub_token == sys.argv[-1]
    print(args, repr(trainer.args), trainer.optimizer, file=sys.stderr)
    trainer.train_sequence(tasks)
    for wrong in (
        lambda: ContinualMemory.load(args.run_name),
        lambda: ContinualMemory.load("me/model"),
        lambda: push_folder(args.output_dir, "me/model", token=args.hub_token),
        lambda: trainer.push_to_hub(),
    ):
        try:
            wrong()
        except Exception:
            import traceback
            traceback.print_exc()
        else:
            raise SystemExit("no error")
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A sequence with a secret in every place that may hold one: its folder, and what it printed."""
    folder = tmp_path_factory.mktemp("secrets") / "run"
    url = f"https://{SECRETS['url']}@example.org"
    argv = ["--output_dir", str(folder), "--use_cpu", "--max_steps", "2", "--save_steps", "1", "--logging_steps", "1"]
    argv += ["--report_to", "tensorboard", "--run_name", f"{url}/x", "--disable_tqdm", "true", "--log_level", "debug"]
    argv += ["--hub_model_id", f"me/{SECRETS['hub']}", "--hub_tok", SECRETS["flag"]]  # argparse takes a shorter flag
    env = {k: v for k, v in os.environ.items() if "PROXY" not in k.upper()}
    env |= {k: SECRETS[k] for k in ("HF_TOKEN", "WANDB_API_KEY")}
    env |= {
        "HF_ENDPOINT": "http://127.0.0.1:9",  # nothing listens there
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(folder.parent / "home"),
        "HF_HUB_DISABLE_XET": "1",
    }
    env["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), env.get("PYTHONPATH", "")])
    script = folder.parent / "script.py"
    script.write_text(textwrap.dedent(RUN))
    done = subprocess.run([sys.executable, str(script), *argv], env=env, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout + done.stderr


def test_no_file_of_a_run_holds_a_secret(run):
    folder, _ = run
    written = [p for p in folder.parent.rglob("*") if p.is_file() and p.name != "script.py"]
    names = {p.name for p in written}
    assert {"results.json", "README.md", "sequence_state.json", "continual_memory.st"} <= names
    assert {"training_args.bin", "trainer_state.json"} <= names and any("tfevents" in name for name in names)
    found = {
        f"{path.relative_to(folder)}: {kind}"
        for path in written
        for kind, secret in SECRETS.items()
        if secret.encode() in path.read_bytes() or secret in str(path)
        # Trainer's pickle of the arguments, to go on with, keeps what other fields than the token hold
        if not (path.name == "training_args.bin" and kind in ("url", "hub"))
    }
    assert not found
    assert f"--hub_tok {REDACTED}" in (folder / "README.md").read_text()


def test_no_log_and_no_error_of_a_run_holds_a_secret(run):
    _, said = run
    for error in ("There is no continual memory at", "is neither a local folder", "Pushing", "ConnectError"):
        assert error in said
    assert [line for line in said.splitlines() if any(secret in line for secret in SECRETS.values())] == []


def test_errors_of_the_hub_do_not_show_the_credentials_of_its_address(monkeypatch, tmp_path):
    def failing(*args, token=None, **kwargs):
        error = HfHubHTTPError(
            f"500 for https://{SECRETS['url']}@host/api with {token}", response=Mock(status_code=500)
        )
        raise error

    monkeypatch.setattr(HfApi, "upload_folder", failing)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", failing)
    for call in (
        lambda: push_folder(tmp_path, "me/model", token=SECRETS["flag"]),
        lambda: ContinualMemory.load("me/model"),
    ):
        with pytest.raises((RuntimeError, FileNotFoundError), match=f"500 for https://{REDACTED}@host/api") as caught:
            call()
        shown = "".join(traceback.format_exception(caught.value))
        assert not any(secret in shown for secret in SECRETS.values())


def test_known_secrets_are_values_by_their_names(monkeypatch):
    monkeypatch.setenv("SOME_PASSWD", "longenough")
    monkeypatch.setenv("MAX_TOKENS", "4096")  # a number, which other words may hold
    monkeypatch.setenv("SECRETS_DIR", "/home/me/project")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "falsefalse")
    found = known_secrets({"hub_token": "x", "push_to_hub_token": None, "seed": 1, "output_dir": "out"})
    assert "longenough" in found and "x" in found
    assert not {"4096", "falsefalse", "out", "/home/me/project"} & set(found)


def test_redacting_by_value():
    assert redact("see longenough.", ["longenough"]) == f"see {REDACTED}."
    assert redact("x", ["x"]) == REDACTED and redact("text", ["x"]) == "text"
    assert public_arguments({"a": ["x", {"b": "x"}], "tokens": 1}, ["x"]) == {"a": [REDACTED, {"b": REDACTED}]}
    assert (
        public_command(["t.py", "--hub_tok", "x", "--hub_to=x"], ["x"])
        == f"t.py --hub_tok {REDACTED} --hub_to={REDACTED}"
    )
    assert redact("https://me:p@ss@host/x@y") == f"https://{REDACTED}@host/x@y"


def test_arguments_are_copied_with_their_token_and_pickled_without(tmp_path):
    args = ContinualTrainingArguments(output_dir=str(tmp_path), hub_token="plain-secret", use_cpu=True)
    for twin in (copy.copy(args), copy.deepcopy(args)):
        assert twin is not args and twin.hub_token == "plain-secret" and twin.to_dict() == args.to_dict()
    dumped = pickle.dumps(args)
    assert b"plain-secret" not in dumped
    assert pickle.loads(dumped).to_dict() == args.to_dict() and pickle.loads(dumped).hub_token is None


@pytest.mark.parametrize("name", ["include_num_input_tokens_seen", "max_new_tokens", "MAX_TOKENS", "num_tokens"])
def test_how_many_tokens_there_are_is_no_secret(name, monkeypatch):
    """ "no", its default in Transformers, would be replaced wherever an argument has that value."""
    monkeypatch.setattr(os, "environ", {})
    assert known_secrets({name: "no"}) == []
    assert public_arguments({name: "no", "eval_strategy": "no"}, ["x"]) == {name: "no", "eval_strategy": "no"}
    assert public_command(["train.py", f"--{name}", "no"]) == f"train.py --{name} no"
    assert known_secrets({f"{name}_api_key": "Zq-secret"}) == ["Zq-secret"]


def test_default_arguments_hold_no_secret(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "environ", {})
    assert known_secrets(vars(ContinualTrainingArguments(output_dir=str(tmp_path), use_cpu=True))) == []
