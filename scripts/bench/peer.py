"""The other side of bench.py: transformers' Trainer on the same files, under a Python that has transformers.

    PYTHON peer.py SPEC CONFIGURATION

SPEC is the file that bench.py wrote (spec.py); one JSON object comes on standard output, all else on standard error.
Only this file, peer_training.py, measuring.py and sampling.py run in the peer's environment; they need nothing of the
package. Configurations:

    padded    every row to the longest length (128 tokens). Such rows all cost the same, so a tenth of the steps, at
              least 3, gives the rate.
    dynamic   every batch to its longest row
    grouped   dynamic, rows of like length in one batch (the Trainer's `group_by_length`)

              These three order the whole train split as the Trainer does, and train on batches of that order.
    eval      `Trainer.predict` on rows sorted by length, dynamic; bf16 means autocast, as when a Trainer in training
              evaluates
    eval_bf16 the same with `bf16_full_eval`: the weights in bf16, which a Trainer does only outside training
    eval_fp32 the same in fp32, as `pipeline` computes
    versions  measures nothing, and says what is installed

The model is `XLMRobertaForSequenceClassification` with random weights and the whole vocabulary; AdamW is torch's fused
one, and bf16 means autocast, which is what the Trainer does.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

# With more than one GPU the Trainer would take them all.
os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]

import accelerate
import numpy as np
import torch
import transformers
from measuring import clock, peak_memory
from sampling import choose_batches
from transformers import (
    Trainer,
    TrainerCallback,
    TrainingArguments,
    XLMRobertaConfig,
    XLMRobertaForSequenceClassification,
)

PAD_ID = 1
ON_CUDA = torch.cuda.is_available()
ARGUMENTS = {field.name for field in dataclasses.fields(TrainingArguments)}
Row = dict[str, Any]


def versions() -> dict[str, str]:
    libraries = {module.__name__: module.__version__ for module in (torch, transformers, accelerate)}
    return {"python": platform.python_version(), **libraries}


class Rows:
    """A set of rows (spec.py) as a data set; a row becomes a list when asked for, so that a large file costs little."""

    def __init__(self, rows_file: str, name: str) -> None:
        with np.load(rows_file) as arrays:
            self.ids, self.offsets, self.labels = (arrays[f"{name}_{part}"] for part in ("ids", "offsets", "labels"))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> Row:
        label = int(self.labels[row])  # beyond the last row an IndexError, which ends a loop over the data set
        return {"input_ids": self.ids[self.offsets[row] : self.offsets[row + 1]].tolist(), "labels": label}

    def lengths(self) -> np.ndarray:
        """Return int64 [rows], tokens per row."""
        return np.diff(self.offsets)


def build_model(shape: dict[str, Any], config: dict[str, Any]) -> XLMRobertaForSequenceClassification:
    torch.manual_seed(config["seed"])
    return XLMRobertaForSequenceClassification(
        XLMRobertaConfig(
            vocab_size=shape["vocab_size"],
            hidden_size=shape["hidden"],
            num_hidden_layers=shape["layers"],
            num_attention_heads=shape["heads"],
            intermediate_size=shape["ffn"],
            max_position_embeddings=shape["positions"],
            layer_norm_eps=shape["layer_norm_eps"],
            type_vocab_size=1,
            num_labels=len(config["label_names"]),
            bos_token_id=0,
            pad_token_id=PAD_ID,
            eos_token_id=2,
        )
    )


def grouping() -> dict[str, Any]:
    """Return the arguments that put rows of like length into one batch."""
    if "train_sampling_strategy" in ARGUMENTS:  # transformers 5
        return {"train_sampling_strategy": "group_by_length"}
    return {"group_by_length": True}


def training_arguments(config: dict[str, Any], rows_file: str, **more: Any) -> TrainingArguments:
    """Return the arguments of a quiet Trainer with torch's fused AdamW that saves nothing.

    Args:
        config: options under the names of train.py's.
        more: arguments of the Trainer's own.
    """
    return TrainingArguments(
        output_dir=str(Path(rows_file).with_name("peer")),
        per_device_train_batch_size=config["batch_size"],
        learning_rate=config["lr"],
        weight_decay=config["weight_decay"],
        max_grad_norm=config["max_grad_norm"],
        optim="adamw_torch_fused",
        bf16=config["precision"] == "bf16",
        use_cpu=config["device"] == "cpu",
        dataloader_pin_memory=config["device"] == "cuda",
        seed=config["seed"],
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        **more,
    )


def arguments_for(spec: dict[str, Any], configuration: str, max_steps: int) -> TrainingArguments:
    """Return the arguments of a configuration; see the top of this file."""
    precision = {"precision": "fp32"} if configuration == "eval_fp32" else {}
    return training_arguments(
        {**spec["config"], **precision},
        spec["rows_file"],
        per_device_eval_batch_size=spec["eval_batch_size"],
        max_steps=max_steps,
        bf16_full_eval=spec["config"]["precision"] == "bf16" and configuration == "eval_bf16",
        **(grouping() if configuration == "grouped" else {}),
    )


class Collator:
    """Pads rows to the longest of them, at least to `length`; notes every batch's tokens without and with padding."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.real_tokens: list[int] = []
        self.computed_tokens: list[int] = []

    def __call__(self, rows: list[Row]) -> dict[str, torch.Tensor]:
        lengths = [len(row["input_ids"]) for row in rows]
        ids = torch.full((len(rows), max(self.length, *lengths)), PAD_ID)
        for line, row, length in zip(ids, rows, lengths):
            line[:length] = torch.tensor(row["input_ids"])
        self.real_tokens.append(sum(lengths))
        self.computed_tokens.append(ids.numel())
        labels = torch.tensor([row["labels"] for row in rows])
        return {"input_ids": ids, "attention_mask": ids.ne(PAD_ID).long(), "labels": labels}


class Stopwatch(TrainerCallback):
    """Takes the time after every step."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.times.append(clock(ON_CUDA))


class MeasuredTrainer(Trainer):
    """A Trainer that orders the whole data set in its own way, and trains on a few batches of that order.

    Attributes:
        warmup_steps: how many batches come first, for warming up.
        steps: how many batches come then.
    """

    train_dataset: Rows
    warmup_steps = steps = 0

    def _get_train_sampler(self, *_: Any) -> list[int]:
        sampler = super()._get_train_sampler()
        assert sampler is not None
        order, batch_size = np.array(list(sampler)), self.args.train_batch_size
        batches = order[: len(order) // batch_size * batch_size].reshape(-1, batch_size)
        chosen = choose_batches(batches, self.train_dataset.lengths(), self.warmup_steps, self.steps)
        return np.concatenate(chosen).ravel().tolist()


def train(spec: dict[str, Any], configuration: str) -> dict[str, float]:
    warmup_steps, steps = spec["warmup_steps"], spec["steps"]
    if configuration == "padded":
        steps = max(3, steps // 10)
    collator = Collator(spec["config"]["max_length"] if configuration == "padded" else 0)
    stopwatch = Stopwatch()
    trainer = MeasuredTrainer(
        build_model(spec["shape"], spec["config"]),
        arguments_for(spec, configuration, warmup_steps + steps),
        train_dataset=Rows(spec["rows_file"], "train"),
        data_collator=collator,
        callbacks=[stopwatch],
    )
    trainer.warmup_steps, trainer.steps = warmup_steps, steps
    trainer.train()
    seconds = stopwatch.times[warmup_steps + steps - 1] - stopwatch.times[warmup_steps - 1]
    rows = steps * spec["config"]["batch_size"]
    tokens = sum(collator.real_tokens[warmup_steps:])
    return {
        "samples_per_s": rows / seconds,
        "tokens_per_s": tokens / seconds,
        "tokens_per_row": tokens / rows,
        "computed_tokens_per_row": sum(collator.computed_tokens[warmup_steps:]) / rows,
    }


def evaluate(spec: dict[str, Any], configuration: str) -> dict[str, float]:
    model, arguments = build_model(spec["shape"], spec["config"]), arguments_for(spec, configuration, 1)
    collator = Collator(0)
    trainer = Trainer(model, arguments, data_collator=collator)
    dev = Rows(spec["rows_file"], "dev")
    rows = [dev[row] for row in np.argsort(dev.lengths(), kind="stable")]
    trainer.predict(Rows(spec["rows_file"], "warmup"))
    warmup_batches = len(collator.real_tokens)
    start = clock(ON_CUDA)
    trainer.predict(rows)
    seconds = clock(ON_CUDA) - start
    tokens = sum(collator.real_tokens[warmup_batches:])
    return {
        "samples_per_s": len(rows) / seconds,
        "tokens_per_s": tokens / seconds,
        "tokens_per_row": tokens / len(rows),
        "computed_tokens_per_row": sum(collator.computed_tokens[warmup_batches:]) / len(rows),
    }


def main() -> None:
    file, configuration = sys.argv[1:]
    answer = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # the Trainer prints what it logs
    spec = json.loads(Path(file).read_text(encoding="utf-8"))
    torch.set_num_threads(spec["config"]["threads"])
    result: dict[str, Any]
    if configuration == "versions":
        result = {"versions": versions()}
    else:
        figures = (evaluate if configuration.startswith("eval") else train)(spec, configuration)
        result = {**figures, **peak_memory(spec["config"]["device"] == "cuda")}
    print(json.dumps(result), file=answer, flush=True)


if __name__ == "__main__":
    main()
