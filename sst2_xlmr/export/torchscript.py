"""A trained classifier as one TorchScript file: raw texts in, labels and probabilities out, tokenizer included.

Only the stack with torchtext can write it. Reading it needs torch and torchtext, whose library has the SentencePiece
operator, but not this package:

    import torch, torchtext
    classify = torch.jit.load("classifier.pt")
    labels, probabilities = classify(["A fine film.", "Not my cup of tea."])
"""

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

warnings.filterwarnings("ignore", message=r"\s*/!\\ IMPORTANT WARNING ABOUT TORCHTEXT STATUS")  # once per submodule
from torchtext.functional import to_tensor  # noqa: E402

from sst2_xlmr.model.roberta import PAD_ID, SequenceClassifier  # noqa: E402
from sst2_xlmr.model.tokenizer import Tokenizer, add_special_tokens  # noqa: E402
from sst2_xlmr.task import Task  # noqa: E402

BATCH_SIZE = 32


class TextClassifier(nn.Module):
    """The scriptable module in the file; the loaded module also has `label_names`."""

    def __init__(self, model: SequenceClassifier, tokenizer: Tokenizer, task: Task) -> None:
        super().__init__()
        example = torch.tensor([[0, 3, 2], [0, 2, PAD_ID]])
        with torch.no_grad():  # traced, as its control flow does not depend on the batch
            self.model = torch.jit.trace_module(model, {"padded": (example, example.ne(PAD_ID))})
        self.sentencepiece = torch.ops.torchtext.load_sp_model_string(tokenizer.pieces.serialized_model_proto())
        self.max_length, self.head_tail = tokenizer.max_length, tokenizer.long_texts.kind == "head-tail"
        self.label_names: list[str] = task.label_names
        self.prediction, self.outputs = task.torchscript_prediction, task.outputs
        self.thresholds = torch.tensor(task.thresholds_in_use)
        self.batch_size, self.pad_id = BATCH_SIZE, PAD_ID

    def ids_of(self, text: str, pair: str | None) -> list[int]:
        """Return a row's ids, like `Tokenizer`."""
        second = None if pair is None else self.sentencepiece.EncodeAsIds(pair)
        ids = add_special_tokens(self.sentencepiece.EncodeAsIds(text), second, self.max_length, self.head_tail)
        return [3 if piece_id == 0 else piece_id + 1 for piece_id in ids]  # 3 is <unk>

    def forward(self, texts: list[str], pairs: list[str] | None = None) -> Any:
        """Return the task's prediction, in the order of the texts: labels, and probabilities, fp32 [texts, labels].

        `pairs` are the second texts of all rows. Texts of similar length share a batch.
        """
        if pairs is not None:
            assert len(pairs) == len(texts), "there must be as many pairs as texts"
        ids = [self.ids_of(text, None if pairs is None else pairs[row]) for row, text in enumerate(texts)]
        by_length = torch.argsort(torch.tensor([len(row) for row in ids], dtype=torch.int64), stable=True)
        logits = torch.zeros(len(ids), self.outputs)
        with torch.no_grad():
            for start in range(0, len(ids), self.batch_size):
                chosen = by_length[start : start + self.batch_size]
                rows: list[int] = chosen.tolist()
                tokens = to_tensor([ids[row] for row in rows], self.pad_id)
                logits[chosen] = self.model.padded(tokens, tokens.ne(self.pad_id))
        return self.prediction(logits, self.label_names, self.thresholds)


def save_torchscript(model: SequenceClassifier, tokenizer: Tokenizer, task: Task, file: Path) -> None:
    """Write the file; `model` is fp32 on the CPU, in evaluation mode, with the whole vocabulary."""
    scripted = torch.jit.script(TextClassifier(model, tokenizer, task).eval())
    with file.open("wb") as opened:  # if torch opened the file itself, a failed write would be no OSError
        torch.jit.save(scripted, opened)
