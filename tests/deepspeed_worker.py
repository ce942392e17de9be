"""What tests/test_deepspeed.py runs: `deepspeed_worker.py FOLDER [CONFIGURATION]`, in a script that knows nothing of
classp_hf but `register()`: two trainings of one model, and the second once more from what the first saved."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import conftest
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments, training_args

import classp_hf

FOLDER, CONFIGURATION = Path(sys.argv[1]), (sys.argv[2:] or [None])[0]
WORLD = int(os.environ.get("WORLD_SIZE", 1))


def train(folder, model, task, **changes):
    args = TrainingArguments(
        output_dir=str(folder),
        optim="classp",
        learning_rate=3e-3,
        per_device_train_batch_size=16 // WORLD,
        num_train_epochs=1,
        save_steps=2,
        use_cpu=CONFIGURATION is None,  # with it accelerate leaves DeepSpeed out
        deepspeed=CONFIGURATION,
        bf16=CONFIGURATION is not None and "bf16" in Path(CONFIGURATION).read_text(),
        report_to="none",
        disable_tqdm=True,
        logging_strategy="no",
        average_tokens_across_devices=False,  # as long as it trusts the count of processes below
    )
    if CONFIGURATION is not None:
        state = args.distributed_state
        state.num_processes = WORLD  # on CPUs accelerate 1.15 counts one under DeepSpeed
        state.process_index = state.local_process_index = int(os.environ["RANK"])
    trainer = Trainer(model, args, conftest.collator.__wrapped__(), task.train_dataset)
    trainer.train(**changes)
    trainer.save_model()
    trainer.accelerator.wait_for_everyone()


if __name__ == "__main__":
    training_args.is_torch_bf16_gpu_available = lambda: True  # Transformers allows it on CPUs with use_cpu alone
    classp_hf.register()
    first, second = conftest.make_tasks.__wrapped__()()
    model = conftest.make_model.__wrapped__()()
    train(FOLDER / "first", model, first)
    train(FOLDER / "same", model, second)  # which then has buffers of another engine
    train(FOLDER / "second", AutoModelForSequenceClassification.from_pretrained(FOLDER / "first"), second)
    again = AutoModelForSequenceClassification.from_pretrained(FOLDER / "first")
    train(FOLDER / "second", again, second, resume_from_checkpoint=str(FOLDER / "second" / "checkpoint-2"))
    sys.stdout.flush()
    os._exit(0)  # DeepSpeed leaves threads of gloo behind
