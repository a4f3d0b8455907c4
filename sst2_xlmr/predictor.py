"""A trained model for use in Python; see `sst2_xlmr.load`."""

import functools
import os
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from sst2_xlmr.backend import prediction_model, quantized_model
from sst2_xlmr.config import EVAL_BATCH_TOKENS, PRECISIONS
from sst2_xlmr.data.rows import check_text
from sst2_xlmr.evaluation.evaluate import predict
from sst2_xlmr.model.classifier import load_classifier
from sst2_xlmr.model.encoders import model_folder
from sst2_xlmr.model.tokenizer import Tokenizer
from sst2_xlmr.model.tokenizer_files import tokenizer_digest
from sst2_xlmr.task import Task
from sst2_xlmr.util.device import choose_device, choose_precision, trim_malloc
from sst2_xlmr.util.errors import UserError

Texts = Sequence[str | tuple[str, str]]
Folder = str | os.PathLike[str]
Device = str | torch.device


class _Ensemble(nn.Module):
    """Its logits give the mean of several models' probabilities."""

    def __init__(self, members: list[nn.Module], task: Task) -> None:
        super().__init__()
        self.members, self.task = nn.ModuleList(members), task

    def forward(self, *batch: Any) -> torch.Tensor:
        probabilities = [self.task.probabilities(member(*batch).float()) for member in self.members]
        mean = torch.stack(probabilities).double().mean(0)
        return torch.from_numpy(self.task.logits_of(mean.cpu().numpy())).to(mean.device)


@dataclass(eq=False, repr=False)
class Classifier:
    """A trained model, ready to classify; several threads may use it at once."""

    folder: Path
    module: nn.Module  # packed token ids -> logits
    tokenizer: Tokenizer
    task: Task  # logits -> probabilities -> label
    precision: str  # bf16, fp32 or int8
    device: torch.device
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def load(cls, folder: Folder, precision: str = "auto", device: Device = "auto") -> "Classifier":
        """Load a trained model's folder; UserError if the folder, its weights, precision or device cannot be used.

        The device is auto, cpu, cuda or a torch.device; the precision is auto, bf16, fp32, or int8 on a CPU. If int8 is
        not supported, a line on standard error says so, and the precision is auto.
        """
        if precision not in PRECISIONS:
            raise ValueError(f"precision must be auto, bf16, fp32 or int8, not {precision!r}")
        if not isinstance(device, torch.device):
            if device not in ("auto", "cpu", "cuda"):
                raise ValueError(f"device must be auto, cpu, cuda or a torch.device, not {device!r}")
            device = choose_device(device)
        folder, is_int8 = model_folder(folder), precision == "int8"
        if is_int8 and device.type != "cpu":
            raise UserError("--precision int8 is for a CPU; use bf16 or fp32, or --device cpu")
        plain = choose_precision("auto" if is_int8 else precision, device)
        if is_int8:
            convert = functools.partial(quantized_model, dtype=torch.bfloat16 if plain == "bf16" else torch.float32)
            module, tokenizer, task = load_classifier(folder, device, False, convert)
            trim_malloc()
            if module is not None:
                return cls(folder, module, tokenizer, task, precision, device)
            print(f"warning: int8 needs a CPU with AVX512-VNNI, Linux and GCC: computing in {plain}", file=sys.stderr)
        classifier, tokenizer, task = load_classifier(folder, device, plain == "bf16")
        return cls(folder, prediction_model(classifier), tokenizer, task, plain, device)

    @classmethod
    def load_ensemble(cls, folders: Sequence[Folder], precision: str, device: Device) -> "Classifier":
        """Load models as one that averages probabilities and thresholds; UserError if labels or tokenization differ."""
        members = [cls.load(folder, precision, device) for folder in folders]
        first, signatures = members[0], []
        if len(members) == 1:
            return first
        for member in members:
            tokenizer, task = member.tokenizer, member.task
            limits = tokenizer.max_length, tokenizer.long_texts
            signatures.append((task.problem_type, task.label_names, tokenizer_digest(tokenizer.file), limits))
            if signatures[-1] != signatures[0]:
                what = "other labels, another tokenizer or another longest input"
                raise UserError(f"{member.folder} has {what} than {first.folder}, so they cannot be averaged")
        thresholds = np.mean([member.task.thresholds for member in members], axis=0).tolist()
        task = replace(first.task, thresholds=tuple(thresholds))
        module = _Ensemble([member.module for member in members], task)
        return cls(first.folder, module, first.tokenizer, task, first.precision, first.device)

    @property
    def label_names(self) -> list[str]:
        """The labels, in the order of the probabilities."""
        return self.task.label_names

    def predict(self, texts: Texts, batch_tokens: int = EVAL_BATCH_TOKENS) -> list[Any]:
        """Return each text's label, list of labels, or score; see `probabilities` for the arguments."""
        return [self.task.prediction_cells(row, False)[0] for row in self.probabilities(texts, batch_tokens).tolist()]

    def probabilities(self, texts: Texts, batch_tokens: int = EVAL_BATCH_TOKENS) -> np.ndarray:
        """Return float32 [texts, labels], the probabilities (or scores) of each text.

        Texts are strings, or (str, str) pairs for a model that was trained on pairs; TypeError if they are anything
        else. `batch_tokens` are tokens per forward pass; a longer text is computed alone. UserError if a text has NUL
        or a lone surrogate, or if a probability is not finite.
        """
        return self.probabilities_of_ids(*self.encode(texts), batch_tokens)

    def encode(self, texts: Texts) -> tuple[np.ndarray, np.ndarray]:
        """Return the concatenated ids, int32 [tokens], and each text's length, int64 [texts]; see `probabilities`.

        With it, the next texts can be tokenized while the model computes.
        """
        rows = [row if isinstance(row, (tuple, list)) else (row,) for row in texts]
        is_valid = not isinstance(texts, str) and {len(row) for row in rows} in (set(), {1}, {2})
        if not is_valid or not all(isinstance(text, str) for row in rows for text in row):
            raise TypeError("texts must be a list of strings, or a list of pairs of strings; for one text, [text]")
        for number, row in enumerate(rows, 1):
            for text in row:
                check_text(text, f"text {number}")
        firsts, *seconds = map(list, zip(*rows)) if rows else [[]]
        return self.tokenizer.flat_ids(firsts, *seconds)

    def probabilities_of_ids(self, ids: np.ndarray, lengths: np.ndarray, batch_tokens: int) -> np.ndarray:
        """Like `probabilities`, for texts that `encode` has tokenized."""
        with self._lock:
            probabilities = predict(self.module, self.task, ids, lengths, batch_tokens, self.device)
        self.check_finite(probabilities)
        return probabilities

    def check_finite(self, values: np.ndarray | float) -> None:
        """Raise UserError for numbers that are not finite: the model is damaged."""
        if not np.isfinite(values).all():
            raise UserError(f"{self.folder}: the model's outputs are not finite (NaN); train it again, or use another")
