"""The other side of study.py and time_to_accuracy.py: transformers' Trainer, under a Python that has transformers.

    PYTHON peer_training.py ORDER RESULT

ORDER is a JSON file (see trainer_side.py); RESULT gets the order and the accuracy on every file. With
`evaluations_file` in the order, the Trainer also evaluates on dev during training, at the steps at which train.py
would with `--eval-every`, and adds a line to that file each time, as in metrics.jsonl.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from peer import ARGUMENTS, Collator, Rows, grouping, training_arguments
from transformers import Trainer, TrainerCallback, XLMRobertaForSequenceClassification, set_seed


def warmup(ratio: float) -> dict[str, Any]:
    return {"warmup_ratio": ratio} if "warmup_ratio" in ARGUMENTS else {"warmup_steps": ratio}  # transformers 5


def build_trainer(order: dict[str, Any]) -> Trainer:
    set_seed(order["seed"])  # the Trainer does so too, but only after from_pretrained has drawn the head
    model = XLMRobertaForSequenceClassification.from_pretrained(
        order["encoder"],
        num_labels=order["labels"],
        num_hidden_layers=order["layers"],  # the lowest of them
        hidden_dropout_prob=order["dropout"],
        attention_probs_dropout_prob=order["dropout"],
        classifier_dropout=order["head_dropout"],
        ignore_mismatched_sizes=True,
    )
    arguments = training_arguments(
        order,
        order["rows_file"],
        per_device_eval_batch_size=64,
        max_steps=order["max_steps"],
        lr_scheduler_type="linear",
        adam_epsilon=1e-6,
        **grouping(),
        **warmup(order["warmup_ratio"]),
    )
    return Trainer(model, arguments, train_dataset=Rows(order["rows_file"], "train"), data_collator=Collator(0))


def accuracy(trainer: Trainer, rows_file: str, split: str) -> float:
    """Return the accuracy on a file, whose rows the Trainer takes in an order of its own: it gives the labels too."""
    result = trainer.predict(Rows(rows_file, split))
    return float((result.predictions.argmax(-1) == result.label_ids).mean())


class Evaluations(TrainerCallback):
    """Evaluates on dev after every so many steps of an epoch and at its end."""

    def __init__(self, trainer: Trainer, order: dict[str, Any]) -> None:
        self.trainer, self.order = trainer, order

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        place = (state.global_step - 1) % self.order["batches"] + 1
        is_end = place == self.order["batches"] or state.global_step == state.max_steps
        if is_end or (self.order["eval_every"] and place % self.order["eval_every"] == 0):
            reached = accuracy(self.trainer, self.order["rows_file"], "dev")
            self.trainer.model.train()
            entry = {"step": state.global_step, "split": "dev", "accuracy": reached}
            with Path(self.order["evaluations_file"]).open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")


def main() -> None:
    order_file, result_file = map(Path, sys.argv[1:])
    order = json.loads(order_file.read_text(encoding="utf-8"))
    if order["threads"]:
        torch.set_num_threads(order["threads"])
    trainer = build_trainer(order)
    if "evaluations_file" in order:
        trainer.add_callback(Evaluations(trainer, order))
    start = time.monotonic()
    trainer.train()
    result = {
        "order": order,
        "train_s": time.monotonic() - start,
        "accuracy": {split: accuracy(trainer, order["rows_file"], split) for split in order["splits"]},
    }
    unfinished = result_file.with_suffix(".tmp")
    unfinished.write_text(json.dumps(result), encoding="utf-8")
    unfinished.replace(result_file)


if __name__ == "__main__":
    main()
