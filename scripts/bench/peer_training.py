"""The other side of study.py: transformers' Trainer, under a Python that has transformers.

    PYTHON peer_training.py ORDER RESULT

ORDER is a JSON file (see `write_peer_inputs` in study.py); RESULT gets the order and the accuracy on every file. With
`eval_every` steps in the order, RESULT also has a curve: [time.time(), accuracy on dev].
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from peer import ARGUMENTS, Collator, Rows, grouping, training_arguments
from transformers import Trainer, TrainerCallback, XLMRobertaForSequenceClassification


def warmup(ratio: float) -> dict[str, Any]:
    return {"warmup_ratio": ratio} if "warmup_ratio" in ARGUMENTS else {"warmup_steps": ratio}  # transformers 5


def build_trainer(order: dict[str, Any]) -> Trainer:
    model = XLMRobertaForSequenceClassification.from_pretrained(
        order["encoder"],
        num_labels=order["labels"],
        hidden_dropout_prob=order["dropout"],
        attention_probs_dropout_prob=order["dropout"],
        classifier_dropout=order["head_dropout"],
        ignore_mismatched_sizes=True,
    )
    arguments = training_arguments(
        order,
        order["rows_file"],
        per_device_eval_batch_size=64,
        num_train_epochs=order["epochs"],
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


class Curve(TrainerCallback):
    """Evaluates on dev every so many steps."""

    def __init__(self, trainer: Trainer, order: dict[str, Any]) -> None:
        self.trainer, self.order = trainer, order
        self.points: list[tuple[float, float]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % self.order["eval_every"] == 0:
            reached = accuracy(self.trainer, self.order["rows_file"], "dev")
            self.trainer.model.train()
            self.points.append((time.time(), reached))


def main() -> None:
    order_file, result_file = map(Path, sys.argv[1:])
    order = json.loads(order_file.read_text(encoding="utf-8"))
    if order["threads"]:
        torch.set_num_threads(order["threads"])
    trainer = build_trainer(order)
    curve = Curve(trainer, order)
    if order.get("eval_every"):
        trainer.add_callback(curve)
    start = time.monotonic()
    trainer.train()
    result = {
        "order": order,
        "train_s": time.monotonic() - start,
        "accuracy": {split: accuracy(trainer, order["rows_file"], split) for split in order["splits"]},
        "curve": curve.points,
    }
    unfinished = result_file.with_suffix(".tmp")
    unfinished.write_text(json.dumps(result), encoding="utf-8")
    unfinished.replace(result_file)


if __name__ == "__main__":
    main()
