"""ONNX Runtime or OpenVINO on an exported model, under a Python that has it; needs nothing of the package.

    PYTHON runtimes.py ORDER RESULT

ORDER has `runtime`, `precision`, `onnx` (the model), `rows_file` (see `write_peer_inputs`) and `threads`; RESULT gets
versions and rates, without the time to load and to quantize. Each is at its best: rows sorted by length, and of some
numbers of tokens in a batch the fastest. ONNX Runtime quantizes dynamically, OpenVINO by nncf, from a sample of rows.
"""

import importlib.metadata
import itertools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

PAD_ID, BATCH_TOKENS = 1, (256, 1024, 4096, 16384)
Batch = dict[str, np.ndarray]


def batches(ids: np.ndarray, offsets: np.ndarray, tokens: int) -> list[Batch]:
    """Return all rows, the longest first, in padded batches of at most so many tokens, int64 [texts, length]."""
    rows, found = sorted((ids[a:b] for a, b in itertools.pairwise(offsets)), key=len, reverse=True), []
    while rows:
        group = rows[: max(1, tokens // len(rows[0]))]
        del rows[: len(group)]
        padded = np.full((len(group), len(group[0])), PAD_ID, np.int64)
        for line, row in zip(padded, group):
            line[: len(row)] = row
        found.append({"input_ids": padded, "attention_mask": (padded != PAD_ID).astype(np.int64)})
    return found


def onnxruntime(order: dict[str, Any], sample: list[Batch]) -> Callable[[list[Batch]], object]:
    import onnxruntime
    from onnxruntime.quantization import quantize_dynamic

    model, settings = order["onnx"], onnxruntime.SessionOptions()
    if order["precision"] == "int8":
        quantize_dynamic(model, model := f"{model}.int8")
    settings.intra_op_num_threads = order["threads"]
    session = onnxruntime.InferenceSession(model, settings)
    return lambda asked: [session.run(None, batch) for batch in asked]


def openvino(order: dict[str, Any], sample: list[Batch]) -> Callable[[list[Batch]], object]:
    import openvino

    core, precision = openvino.Core(), order["precision"]
    model = core.read_model(order["onnx"])
    if precision == "int8":
        import nncf

        model = nncf.quantize(model, nncf.Dataset(sample), model_type=nncf.ModelType.TRANSFORMER)
    settings = {"PERFORMANCE_HINT": "THROUGHPUT", "INFERENCE_NUM_THREADS": order["threads"]}
    settings["INFERENCE_PRECISION_HINT"] = "bf16" if precision == "bf16" else "f32"
    queue = openvino.AsyncInferQueue(core.compile_model(model, "CPU", settings))
    return lambda asked: [*map(queue.start_async, asked), queue.wait_all()]


def main() -> None:
    order = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    with np.load(order["rows_file"]) as arrays:
        ids, offsets = arrays["eval_ids"], arrays["eval_offsets"]
    ask = {"onnxruntime": onnxruntime, "openvino": openvino}[order["runtime"]](order, batches(ids, offsets, 256)[::4])
    seconds = []
    for tokens in BATCH_TOKENS:
        asked = batches(ids, offsets, tokens)
        ask(asked[:: max(1, len(asked) // 20)])  # of all lengths, to warm up
        start = time.perf_counter()
        ask(asked)
        seconds.append(time.perf_counter() - start)
    rates = {"samples_per_s": (len(offsets) - 1) / min(seconds), "tokens_per_s": len(ids) / min(seconds)}
    versions = {order["runtime"]: importlib.metadata.version(order["runtime"])}
    Path(sys.argv[2]).write_text(json.dumps({**rates, "versions": versions}), encoding="utf-8")


if __name__ == "__main__":
    main()
