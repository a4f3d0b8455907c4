"""transformers' Trainer on the same rows, under a Python that has transformers 5; needs nothing of the package.

    PYTHON peer.py ORDER RESULT

ORDER is what `write_peer_inputs` returns (study_with_trainer.py), and `seed`; RESULT gets order, versions, rates, and
the predictions on all `splits`; both are JSON files. With `split`, an order says to evaluate on these rows, with bf16
weights instead of autocast in bf16, and not to train.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

# With more than one GPU the Trainer would use them all.
os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]

import accelerate
import numpy as np
import torch
import transformers
from torch.nn.utils.rnn import pad_sequence
from transformers import Trainer, TrainerCallback, TrainingArguments, XLMRobertaForSequenceClassification, set_seed

PAD_ID = 1


def clock() -> float:
    """Return the time in seconds, once the GPU has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def read_rows(order: dict[str, Any], split: str) -> list[dict[str, Any]]:
    """Return a split's rows; their ids are views of one array, so that a large file costs little."""
    with np.load(order["rows_file"]) as arrays:
        ids, offsets, labels = (arrays[f"{split}_{part}"] for part in ("ids", "offsets", "labels"))
    return [{"input_ids": ids[a:b], "labels": label} for a, b, label in zip(offsets, offsets[1:], labels.tolist())]


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Return a batch, padded to its longest row."""
    texts = [torch.from_numpy(row["input_ids"]).long() for row in rows]
    ids = pad_sequence(texts, batch_first=True, padding_value=PAD_ID)
    labels = torch.tensor([row["labels"] for row in rows])
    return {"input_ids": ids, "attention_mask": ids.ne(PAD_ID).long(), "labels": labels}


def rates(rows: list[dict[str, Any]], seconds: float) -> dict[str, float]:
    tokens = sum(len(row["input_ids"]) for row in rows)
    return {"samples_per_s": len(rows) / seconds, "tokens_per_s": tokens / seconds}


def build_trainer(order: dict[str, Any]) -> Trainer:
    """Return a quiet Trainer with torch's fused AdamW that saves nothing; bf16 means autocast."""
    set_seed(order["seed"])  # the Trainer does so too, but only after from_pretrained has drawn the head
    model = XLMRobertaForSequenceClassification.from_pretrained(
        order["encoder"],
        num_labels=order["labels"],
        problem_type=order["problem_type"],
        num_hidden_layers=order["layers"],  # the lowest of them
        hidden_dropout_prob=order["dropout"],
        attention_probs_dropout_prob=order["dropout"],
        classifier_dropout=order["head_dropout"],
        ignore_mismatched_sizes=True,
    )
    arguments = TrainingArguments(
        output_dir=str(Path(order["rows_file"]).with_name("peer")),
        per_device_train_batch_size=order["batch_size"],
        per_device_eval_batch_size=64,
        learning_rate=order["lr"],
        weight_decay=order["weight_decay"],
        max_grad_norm=order["max_grad_norm"],
        max_steps=order["max_steps"],
        lr_scheduler_type="linear",
        optim="adamw_torch_fused",
        adam_epsilon=1e-6,
        bf16=order["precision"] == "bf16",
        bf16_full_eval=order["precision"] == "bf16" and "split" in order,
        use_cpu=order["device"] == "cpu",
        dataloader_pin_memory=order["device"] == "cuda",
        seed=order["seed"],
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        train_sampling_strategy="group_by_length",
        warmup_steps=order["warmup_ratio"],  # below 1 it is a ratio
    )
    return Trainer(model, arguments, train_dataset=read_rows(order, "train"), data_collator=collate)


def train(order: dict[str, Any]) -> dict[str, Any]:
    """Train; returns, for each split, logits and labels of its rows, and if there is a second epoch the rates."""
    trainer, batches, callback = build_trainer(order), order["batches"], TrainerCallback()
    times: list[float] = []  # after each step
    callback.on_step_end = lambda *_, **__: times.append(clock())
    trainer.add_callback(callback)
    trainer.train()
    result: dict[str, Any] = {"predictions": {}}
    if len(times) >= 2 * batches:
        result |= rates(trainer.train_dataset, times[2 * batches - 1] - times[batches - 1])
    for split in order["splits"]:
        found = trainer.predict(read_rows(order, split))  # in an order of its own, so its labels are needed
        result["predictions"][split] = [found.predictions.tolist(), found.label_ids.tolist()]
    return result


def evaluate(order: dict[str, Any]) -> dict[str, float]:
    """Return the rates of `Trainer.predict` on rows sorted by length."""
    trainer = build_trainer(order)
    rows = sorted(read_rows(order, order["split"]), key=lambda row: len(row["input_ids"]))
    trainer.predict(rows[:: max(1, len(rows) // 64)])  # of all lengths, to warm up
    start = clock()
    trainer.predict(rows)
    return rates(rows, clock() - start)


def main() -> None:
    order_file, result_file = map(Path, sys.argv[1:])
    order = json.loads(order_file.read_text(encoding="utf-8"))
    if order["threads"]:
        torch.set_num_threads(order["threads"])
    versions = {module.__name__: module.__version__ for module in (torch, transformers, accelerate)}
    result = {"order": order, "versions": versions, **(evaluate(order) if "split" in order else train(order))}
    if order["device"] == "cuda":
        result["peak_cuda_bytes"] = torch.cuda.max_memory_allocated()
    unfinished = result_file.with_suffix(".tmp")
    unfinished.write_text(json.dumps(result), encoding="utf-8")
    unfinished.replace(result_file)


if __name__ == "__main__":
    main()
