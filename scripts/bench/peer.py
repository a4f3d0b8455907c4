"""The other side of bench.py: the same rows under transformers' Trainer, in whatever Python has that.

    PYTHON peer.py SPEC CONFIGURATION

SPEC is the file that bench.py wrote; one JSON object comes on standard output, all else on standard error. It
is the only file that runs in the peer's environment, and it needs nothing of this project. Configurations:

    padded    every row to the longest length (128 tokens). Such rows all cost the same, so a tenth of the steps, at
              least 3, gives the rate.
    dynamic   every batch to its longest row
    grouped   dynamic, rows of like length in one batch (the Trainer's `group_by_length`)
    eval      `Trainer.predict` on rows sorted by length, dynamic; bf16 means autocast, as when a Trainer in training
              evaluates
    eval_bf16 the same with `bf16_full_eval`: the weights in bf16, which a Trainer does only outside training
    versions  nothing but what is installed

The model is `XLMRobertaForSequenceClassification` with random weights and the whole vocabulary; AdamW is torch's fused
one, and bf16 means autocast, which is what the Trainer does.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import re
import resource
import sys
import time
from pathlib import Path
from typing import Any

# With more than one GPU the Trainer would take them all.
os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]

import accelerate
import numpy as np
import torch
import transformers
from transformers import (
    Trainer,
    TrainerCallback,
    TrainingArguments,
    XLMRobertaConfig,
    XLMRobertaForSequenceClassification,
)

PAD_ID = 1
Row = dict[str, Any]


def versions() -> dict[str, str]:
    found = {module.__name__: module.__version__ for module in (torch, transformers, accelerate)}
    return {"python": platform.python_version(), **found}


def clock() -> float:
    """Return the time in seconds, once the device has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_memory(on_cuda: bool) -> dict[str, int]:
    """Return what this process has had in memory at most; `ru_maxrss` would begin with the peak of its parent."""
    status = Path("/proc/self/status")
    if status.is_file() and (found := re.search(r"VmHWM:\s*(\d+) kB", status.read_text(encoding="utf-8"))):
        peak = {"peak_rss_bytes": int(found[1]) * 1024}
    else:
        unit = 1 if sys.platform == "darwin" else 1024
        peak = {"peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if on_cuda:
        peak["peak_cuda_bytes"] = torch.cuda.max_memory_allocated()
    return peak


def read_rows(rows_file: str, split: str) -> list[Row]:
    with np.load(rows_file) as arrays:
        ids, offsets, labels = (arrays[f"{split}_{part}"] for part in ("ids", "offsets", "labels"))
    spans = zip(offsets[:-1], offsets[1:], labels)
    return [{"input_ids": ids[start:end].tolist(), "labels": int(label)} for start, end, label in spans]


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


def training_arguments(spec: dict[str, Any], configuration: str, max_steps: int) -> TrainingArguments:
    config = spec["config"]
    bf16 = config["precision"] == "bf16"
    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    grouping: dict[str, Any] = {}
    if configuration == "grouped":
        new = "train_sampling_strategy" in known  # transformers 5
        grouping = {"train_sampling_strategy": "group_by_length"} if new else {"group_by_length": True}
    return TrainingArguments(
        output_dir=str(Path(spec["rows_file"]).with_name("peer")),
        per_device_train_batch_size=config["batch_size"],
        per_device_eval_batch_size=spec["eval_batch_size"],
        max_steps=max_steps,
        learning_rate=config["lr"],
        weight_decay=config["weight_decay"],
        max_grad_norm=config["max_grad_norm"],
        optim="adamw_torch_fused",
        bf16=bf16,
        bf16_full_eval=bf16 and configuration == "eval_bf16",
        use_cpu=config["device"] == "cpu",
        dataloader_pin_memory=config["device"] == "cuda",
        seed=config["seed"],
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        **grouping,
    )


class Collator:
    """Pads rows to the longest of them, at least to `length`, and counts the real tokens of every batch."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.tokens: list[int] = []

    def __call__(self, rows: list[Row]) -> dict[str, torch.Tensor]:
        lengths = [len(row["input_ids"]) for row in rows]
        self.tokens.append(sum(lengths))
        ids = torch.full((len(rows), max(self.length, *lengths)), PAD_ID)
        for line, row, length in zip(ids, rows, lengths):
            line[:length] = torch.tensor(row["input_ids"])
        labels = torch.tensor([row["labels"] for row in rows])
        return {"input_ids": ids, "attention_mask": ids.ne(PAD_ID).long(), "labels": labels}


class Stopwatch(TrainerCallback):
    """Takes the time after every step."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.times.append(clock())


class WarmTrainer(Trainer):
    """A Trainer that first trains on the `warm` first rows as they come, then on all others in its own order.

    Its own order may begin with the longest batch and end with the shortest; if a part of it were not timed, the timed
    rows would not be those that this project is measured on.
    """

    warm = 0
    train_dataset: list[Row]

    def _get_train_sampler(self, *_: Any) -> list[int]:
        whole = self.train_dataset
        self.train_dataset = whole[self.warm :]
        own = super()._get_train_sampler()
        self.train_dataset = whole
        assert own is not None
        return [*range(self.warm), *(self.warm + row for row in own)]


def train(spec: dict[str, Any], configuration: str) -> dict[str, float]:
    batch_size, warmup = spec["config"]["batch_size"], spec["warmup_steps"]
    steps = max(3, spec["steps"] // 10) if configuration == "padded" else spec["steps"]
    collator = Collator(spec["config"]["max_length"] if configuration == "padded" else 0)
    stopwatch = Stopwatch()
    trainer = WarmTrainer(
        build_model(spec["shape"], spec["config"]),
        training_arguments(spec, configuration, warmup + steps),
        train_dataset=read_rows(spec["rows_file"], "warmup") + read_rows(spec["rows_file"], "train"),
        data_collator=collator,
        callbacks=[stopwatch],
    )
    trainer.warm = warmup * batch_size
    trainer.train()
    seconds = stopwatch.times[warmup + steps - 1] - stopwatch.times[warmup - 1]
    tokens = sum(collator.tokens[warmup : warmup + steps])  # the loader may have fetched one batch more
    return {"samples_per_s": steps * batch_size / seconds, "tokens_per_s": tokens / seconds}


def evaluate(spec: dict[str, Any], configuration: str) -> dict[str, float]:
    model, arguments = build_model(spec["shape"], spec["config"]), training_arguments(spec, configuration, 1)
    trainer = Trainer(model, arguments, data_collator=Collator(0))
    rows = sorted(read_rows(spec["rows_file"], "dev"), key=lambda row: len(row["input_ids"]))
    trainer.predict(read_rows(spec["rows_file"], "warmup"))
    start = clock()
    trainer.predict(rows)
    seconds = clock() - start
    tokens = sum(len(row["input_ids"]) for row in rows)
    return {"samples_per_s": len(rows) / seconds, "tokens_per_s": tokens / seconds}


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
