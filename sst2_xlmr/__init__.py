"""Fine-tune XLM-R for text classification in plain PyTorch.

    model = sst2_xlmr.load("runs/NAME/model")
    model.predict(["A fine film.", "Not my cup of tea."])

Importing the package loads neither torch nor anything else that is slow.
"""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sst2_xlmr.predictor import Classifier

__version__ = "0.2.0"


def load(folder: str | Path, precision: str = "auto", device: str = "auto") -> "Classifier":
    """Load a trained model, `model/` or `best/` of a run or any folder in that layout; see `predictor.Classifier`.

    The precision is auto, bf16, fp32 or int8; the device auto, cpu or cuda. UserError if one of them cannot be used.
    """
    from sst2_xlmr.predictor import Classifier

    return Classifier.load(folder, precision=precision, device=device)
