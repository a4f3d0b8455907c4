"""A trained model, as Python uses it.

classifier = sst2_xlmr.load("runs/NAME/model")
classifier.predict(["A fine film.", "Not my cup of tea."])
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Union

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
from sst2_xlmr.util.distributed import choose_device
from sst2_xlmr.util.errors import UserError
from sst2_xlmr.util.memory import give_back_memory
from sst2_xlmr.util.precision import choose_precision

Texts = Sequence[Union[str, tuple[str, str]]]


class _Mean(nn.Module):
    """Logits whose probabilities are the mean of several models' probabilities."""

    def __init__(self, modules: list[nn.Module], task: Task) -> None:
        super().__init__()
        self.members, self.task = nn.ModuleList(modules), task

    def forward(self, *batch: Any) -> torch.Tensor:
        found = [self.task.probabilities(member(*batch).float()) for member in self.members]
        mean = torch.stack(found).double().mean(0)
        return torch.from_numpy(self.task.logits_of(mean.cpu().numpy())).to(mean.device)


@dataclass(eq=False, repr=False)
class Classifier:
    """A trained model, ready to classify; several threads may use it at once."""

    folder: Path
    module: nn.Module  # packed token ids -> logits, in evaluation mode
    tokenizer: Tokenizer
    task: Task  # logits -> probabilities -> label
    precision: str  # in which it computes: bf16, fp32 or int8
    device: torch.device
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def load(
        cls, folder: str | os.PathLike[str], precision: str = "auto", device: str | torch.device = "auto"
    ) -> Classifier:
        """Load a trained model's folder; UserError if it is none, or if weights, precision or device cannot be used.

        The device is auto, cpu, cuda, or one of torch's; the precision auto, bf16, fp32, or int8 on a CPU. Where int8
        would not be faster, one line on standard error says so, and the precision is auto.
        """
        if precision not in PRECISIONS:
            raise ValueError(f"precision must be auto, bf16, fp32 or int8, not {precision!r}")
        if not isinstance(device, torch.device):
            if device not in ("auto", "cpu", "cuda"):
                raise ValueError(f"device {device!r} is none of auto, cpu and cuda; others go as torch.device(...)")
            device = choose_device(device)
        folder, is_int8 = model_folder(folder), precision == "int8"
        if is_int8 and device.type != "cpu":
            raise UserError("--precision int8 is for a CPU; use bf16 or fp32, or --device cpu")
        plain = choose_precision("auto" if is_int8 else precision, device)
        if is_int8:
            classifier, tokenizer, task = load_classifier(folder, device, bf16=False)
            module = quantized_model(classifier, task, torch.bfloat16 if plain == "bf16" else torch.float32)
            del classifier
            give_back_memory()
            if module is not None:
                return cls(folder, module, tokenizer, task, precision, device)
            lacks = "int8 needs a CPU with AVX512-VNNI, Linux and GCC"
            print(f"warning: {lacks}: computing in {plain} instead", file=sys.stderr)
        classifier, tokenizer, task = load_classifier(folder, device, plain == "bf16")
        return cls(folder, prediction_model(classifier), tokenizer, task, plain, device)

    @classmethod
    def load_mean(
        cls, folders: Sequence[str | os.PathLike[str]], precision: str = "auto", device: str | torch.device = "auto"
    ) -> Classifier:
        """Load several models' folders as one classifier, which answers with the mean of their probabilities.

        UserError if they have not the same labels, tokenizer and longest input; thresholds are the means of theirs.
        """
        first, *others = (cls.load(folder, precision, device) for folder in folders)
        if not others:
            return first

        def alike(each: Classifier) -> tuple[object, ...]:
            tokens = each.tokenizer
            limits = tokens.max_length, tokens.long_texts
            return each.task.problem_type, each.label_names, tokenizer_digest(tokens.file), limits

        for other in others:
            if alike(other) != alike(first):
                what = "other labels, another tokenizer or another longest input"
                cure = "only models that are alike have a mean"
                raise UserError(f"{other.folder} has {what} than {first.folder}; {cure}")
        members = [first, *others]
        thresholds = np.mean([each.task.thresholds for each in members], axis=0).tolist()
        task = replace(first.task, thresholds=tuple(thresholds))
        module = _Mean([each.module for each in members], task)
        return cls(first.folder, module, first.tokenizer, task, first.precision, first.device)

    @property
    def label_names(self) -> list[str]:
        """The labels, in the order of the probabilities."""
        return self.task.label_names

    def predict(self, texts: Texts, batch_tokens: int = EVAL_BATCH_TOKENS) -> list[Any]:
        """Return every text's answer: its label, list of labels, or score; see `probabilities`."""
        return [self.task.cells(row, False)[0] for row in self.probabilities(texts, batch_tokens).tolist()]

    def probabilities(self, texts: Texts, batch_tokens: int = EVAL_BATCH_TOKENS) -> np.ndarray:
        """Return float32 [texts, labels], every label's probability, or score, in the order of the texts.

        Args:
            texts: strings, or (str, str) pairs for a model that was trained on pairs; else it is a TypeError.
            batch_tokens: per forward pass; a longer text is computed alone.

        Raises:
            UserError: if a text is not Unicode (half a character, NUL), or a probability is not finite.
        """
        return self.probabilities_of_ids(*self.encode(texts), batch_tokens)

    def encode(self, texts: Texts) -> tuple[np.ndarray, np.ndarray]:
        """Return the texts' ids, one text after another, int32 [tokens], and the length of each, int64 [texts].

        For those who want to tokenize the next texts while these are computed; see `probabilities` for the arguments.
        """
        rows = [row if isinstance(row, (tuple, list)) else (row,) for row in texts]
        is_list = not isinstance(texts, str) and {len(row) for row in rows} in (set(), {1}, {2})
        if not is_list or not all(isinstance(text, str) for row in rows for text in row):
            raise TypeError("texts must be a list of strings, or a list of pairs of strings; for one text, [text]")
        for number, row in enumerate(rows, 1):
            for text in row:
                check_text(text, f"text {number}")
        firsts, *seconds = map(list, zip(*rows)) if rows else [[]]
        return self.tokenizer.flat_ids(firsts, *seconds)

    def probabilities_of_ids(
        self, ids: np.ndarray, lengths: np.ndarray, batch_tokens: int = EVAL_BATCH_TOKENS
    ) -> np.ndarray:
        """Return what `probabilities` does, for texts that `encode` has tokenized."""
        with self._lock:
            found = predict(self.module, self.task, ids, lengths, batch_tokens, self.device)
        self.check_finite(found)
        return found

    def check_finite(self, values: np.ndarray | float) -> None:
        """Refuse numbers that are not finite, which a damaged model has computed, by a `UserError`."""
        if not np.isfinite(values).all():
            raise UserError(f"{self.folder}: the model's answers are not finite (NaN); train it again, or use another")
