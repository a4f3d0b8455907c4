"""What transformers' Trainer is to learn beside train.py: the same rows, as ids, with the same options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from sst2_xlmr.cli import parse_args
from sst2_xlmr.config import Config, flag
from sst2_xlmr.data.prepare import prepare
from sst2_xlmr.training.schedule import Schedule
from sst2_xlmr.util.distributed import choose_device
from sst2_xlmr.util.errors import UserError
from sst2_xlmr.util.precision import choose_precision

PEER_PROGRAM = Path(__file__).with_name("peer_training.py")
_LACKS = (
    "max_steps",
    "schedule",
    "layerwise_lr_decay",
    "label_smoothing",
    "class_weights",
    "freeze_encoder",
    "early_stopping_patience",
)
_SAME = ("batch_size", "epochs", "lr", "warmup_ratio", "weight_decay", "max_grad_norm", "dropout", "head_dropout")


def write_peer_inputs(words: list[str], folder: Path) -> dict[str, Any]:
    """Write the rows of all files, as ids, into a folder; returns what `PEER_PROGRAM` is to do, but for the seed.

    Args:
        words: options of train.py.

    Raises:
        UserError: if the Trainer cannot do what they say.
    """
    config, _ = parse_args([*words, "--output-dir", str(folder / "unused")])
    inputs = prepare(config, quiet=True)
    config = inputs.config
    if not Path(config.encoder).is_dir():
        raise UserError(f"--peer needs an encoder in a folder that transformers opens, not {config.encoder}")
    defaults = Config()
    for name in _LACKS:
        if getattr(config, name) != getattr(defaults, name):
            raise UserError(f"--peer: the Trainer knows no {flag(name)}; put it into a --setting")
    arrays: dict[str, np.ndarray] = {}
    for split, cache in inputs.caches.items():
        if split == "train" and inputs.train_rows is not None:
            cache = cache.subset(inputs.train_rows)
        arrays.update({f"{split}_ids": cache.ids, f"{split}_offsets": cache.offsets, f"{split}_labels": cache.labels})
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "rows.npz", **arrays)
    device = choose_device(config.device)
    batches = -(-len(inputs.train_labels) // config.batch_size)
    return {
        **{name: getattr(config, name) for name in _SAME},
        "encoder": config.encoder,
        "layers": inputs.encoder.shape.layers,
        "rows_file": str(folder / "rows.npz"),
        "splits": [split for split in inputs.caches if split != "train"],
        "labels": len(config.classes),
        "batches": batches,
        "max_steps": Schedule(config, batches).total_steps,
        "precision": choose_precision(config.precision, device),
        "device": device.type,
        "threads": config.threads,
    }
