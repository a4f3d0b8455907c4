"""A trained classifier as one ONNX file, which runs in onnxruntime without torch.

It takes texts, with the tokenizer inside (the SentencePiece operator of onnxruntime-extensions; for an example see
docs/from-csv-to-service.md), or `input_ids` and `attention_mask`, int64 [texts, length], padded with 1. Its metadata
are `label_names`, `max_length` and `problem_type`.

The graph is built operator by operator, so it is the same with every torch, and activations are quantized per row (see
engines/cpu/int8.c). onnxruntime's dynamic quantization is per tensor, which costs XLM-R points of accuracy. Weights are
unsigned, with 128 as zero: on x86 CPUs without VNNI, onnxruntime's products of signed ones overflow
(onnxruntime.ai/docs/performance/model-optimizations/quantization.html), and on others its speed is the same.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from sst2_xlmr.model.encoders import EncoderFolder, EncoderShape
from sst2_xlmr.model.roberta import FIRST_POSITION, PAD_ID
from sst2_xlmr.model.tokenizer import BEGIN, END, UNKNOWN
from sst2_xlmr.model.tokenizer_files import sentencepiece_model
from sst2_xlmr.model.vocabulary import EMBEDDING
from sst2_xlmr.task import Task
from sst2_xlmr.util.errors import UserError
from sst2_xlmr.util.tensors import quantize_weights

OPSET, IR_VERSION = 20, 9  # the first with Gelu, and the format that came with it; onnxruntime 1.17 reads both
_EXTENSIONS = "ai.onnx.contrib"
_LARGEST_FILE = 2**31 - (1 << 24)  # bytes: protobuf's limit, less what is not weights
Value = str | np.ndarray
Weights = Mapping[str, np.ndarray]


class _Graph:
    """Operators and constants, in the order in which they are added; with `int8`, weights are in 8 bits."""

    def __init__(self, weights: Weights, int8: bool) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.weights, self.int8 = weights, int8
        self._quantized_rows: dict[str, tuple[str, str, str]] = {}

    def add(self, kind: str, *inputs: Value, outputs: int = 1, domain: str = "", **attributes: Any) -> Any:
        """Add an operator; arrays among its inputs are constants. Returns its output's name, or a list of several."""
        names = []
        for value in inputs:
            names.append(value if isinstance(value, str) else f"constant_{len(self.constants)}")
            if not isinstance(value, str):
                self.constants.append(numpy_helper.from_array(np.ascontiguousarray(value), names[-1]))
        results = [f"{kind}_{len(self.nodes)}_{number}" for number in range(outputs)]
        self.nodes.append(helper.make_node(kind, names, results, domain=domain, **attributes))
        return results[0] if outputs == 1 else results

    def quantize_rows(self, x: str) -> tuple[str, str, str]:
        """Quantize a tensor, once; returns its uint8 values, and each row's scale and minimum."""
        if x not in self._quantized_rows:
            least = self.add("Min", self.add("ReduceMin", x, int64(-1), keepdims=1), scalar(0))
            largest = self.add("Max", self.add("ReduceMax", x, int64(-1), keepdims=1), scalar(0))
            scale = self.add("Max", self.add("Div", self.add("Sub", largest, least), scalar(255)), scalar(1e-30))
            steps = self.add("Round", self.add("Div", self.add("Sub", x, least), scale))
            self._quantized_rows[x] = (self.add("Cast", steps, to=TensorProto.UINT8), scale, least)
        return self._quantized_rows[x]

    def weight_and_bias(self, name: str, rows: slice = slice(None)) -> tuple[np.ndarray, np.ndarray]:
        """Return rows of a weight and of its bias."""
        return self.weights[f"{name}.weight"][rows], self.weights[f"{name}.bias"][rows]

    def linear(self, x: str, name: str, rows: slice = slice(None)) -> str:
        """Return x weight^T + bias."""
        weight, bias = self.weight_and_bias(name, rows)
        if not self.int8:
            return self.add("Add", self.add("MatMul", x, weight.T), bias)
        values, scales = (part.numpy() for part in quantize_weights(torch.from_numpy(weight)))
        quantized, scale, least = self.quantize_rows(x)
        factors = quantized, values.T.view(np.uint8) ^ 128, np.array(0, np.uint8), np.array(128, np.uint8)
        sums = self.add("Cast", self.add("MatMulInteger", *factors), to=TensorProto.FLOAT)
        shift = self.add("Add", self.add("Mul", least, values.sum(1, dtype=np.float32) * scales), bias)
        return self.add("Add", self.add("Mul", self.add("Mul", sums, scale), scales), shift)


def int64(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def scalar(value: float) -> np.ndarray:
    return np.array(value, np.float32)


def _layer(graph: _Graph, shape: EncoderShape, number: int, x: str, mask: str) -> str:
    """Return a layer's output for x, [texts, length, hidden]; the last layer's only for `<s>`.

    The mask, fp32 [texts, 1, 1, length], is added to attention scores.
    """
    add, width, head_size = graph.add, shape.hidden, shape.hidden // shape.heads
    prefix = f"encoder.layers.{number}"

    def heads(source: str, part: int) -> str:
        """Return queries (0), keys (1) or values (2), [texts, heads, length, size]."""
        projected = graph.linear(source, f"{prefix}.qkv", slice(part * width, (part + 1) * width))
        return add("Transpose", add("Reshape", projected, int64(0, 0, shape.heads, head_size)), perm=[0, 2, 1, 3])

    def norm(y: str, name: str) -> str:
        weight_and_bias = graph.weight_and_bias(f"{prefix}.{name}")
        return add("LayerNormalization", y, *weight_and_bias, axis=-1, epsilon=shape.layer_norm_eps)

    queries = add("Slice", x, int64(0), int64(1), int64(1)) if number == shape.layers - 1 else x
    query, key, value = heads(queries, 0), heads(x, 1), heads(x, 2)
    query = add("Mul", query, scalar(head_size**-0.5))
    scores = add("Add", add("MatMul", query, add("Transpose", key, perm=[0, 1, 3, 2])), mask)
    mixed = add("Transpose", add("MatMul", add("Softmax", scores, axis=-1), value), perm=[0, 2, 1, 3])
    attended = graph.linear(add("Reshape", mixed, int64(0, 0, width)), f"{prefix}.out")
    y = norm(add("Add", queries, attended), "norm1")
    inner = add("Gelu", graph.linear(y, f"{prefix}.up"))
    return norm(add("Add", y, graph.linear(inner, f"{prefix}.down")), "norm2")


def _logits(graph: _Graph, shape: EncoderShape, ids: str, mask: str, window_weights: str | None = None) -> str:
    """Return logits [texts, labels]; `ids` are int64 [windows, length], `mask` is True at tokens.

    `window_weights`, fp32 [texts, windows], is each window's weight in its text; None if each text is one window.
    """
    add, words, length = graph.add, graph.weights[EMBEDDING], graph.add("Shape", ids, start=1, end=2)
    if graph.int8:
        values, scales = (part.numpy() for part in quantize_weights(torch.from_numpy(words)))
        quantized = add("Cast", add("Gather", values, ids), to=TensorProto.FLOAT)
        words = add("Mul", quantized, add("Gather", scales[:, None], ids))
    else:
        words = add("Gather", words, ids)
    positions = graph.weights["encoder.positions.weight"][FIRST_POSITION:]
    hidden = add("Add", words, add("Slice", positions, int64(0), length, int64(0)))
    x = add("LayerNormalization", hidden, *graph.weight_and_bias("encoder.norm"), axis=-1, epsilon=shape.layer_norm_eps)
    scores = add("Unsqueeze", add("Where", mask, scalar(0), scalar(-np.inf)), int64(1, 2))
    for number in range(shape.layers):
        x = _layer(graph, shape, number, x, scores)
    first = add("Reshape", x, int64(0, shape.hidden))
    if window_weights:
        first = add("MatMul", window_weights, first)
    inner = add("Tanh", add("Gemm", first, *graph.weight_and_bias("head.dense"), transB=1))
    return add("Gemm", inner, *graph.weight_and_bias("head.out"), transB=1)


def _tokenize(graph: _Graph, texts: str, encoder: EncoderFolder) -> tuple[str, str, str | None]:
    """Tokenize like `model.tokenizer.Tokenizer`; returns ids, mask and window weights (see `_logits`)."""
    add, room, window_weights, long_texts = graph.add, encoder.max_length - 2, None, encoder.long_texts

    def column(vector: str) -> str:
        return add("Unsqueeze", vector, int64(1))

    def numbers_to(count: Value) -> str:
        return add("Range", np.array(0, np.int64), count, np.array(1, np.int64))

    # No sampling (the first two), no <s> or </s>, no reversal.
    options = (int64(0), np.array([0], np.float32), *[np.array([False])] * 4)
    how: dict[str, Any] = {"domain": _EXTENSIONS, "model": sentencepiece_model(encoder.tokenizer_file)}
    pieces, starts = add("SentencepieceTokenizer", texts, *options, outputs=2, **how)
    pieces = add("Cast", pieces, to=TensorProto.INT64)
    ids = add("Where", add("Equal", pieces, int64(0)), int64(UNKNOWN), add("Add", pieces, int64(1)))
    ids = add("Concat", ids, int64(PAD_ID), axis=0)  # so that there is one, if all texts are empty
    first = add("Slice", starts, int64(0), int64(-1), int64(0))
    lengths = add("Sub", add("Slice", starts, int64(1), int64(2**31), int64(0)), first)
    overflow = add("Max", add("Sub", lengths, int64(room)), int64(0))  # a text's tokens beyond the longest input
    if long_texts.kind == "windows":
        counts = add("Div", add("Add", overflow, int64(long_texts.stride - 1)), int64(long_texts.stride))
        counts = add("Add", counts, int64(1))  # of each text's windows
        ends = add("CumSum", counts, np.array(0, np.int64))
        window = numbers_to(add("Squeeze", add("Slice", ends, int64(-1), int64(2**31), int64(0)), int64(0)))
        is_behind = add("GreaterOrEqual", column(window), add("Unsqueeze", ends, int64(0)))
        text = add("ReduceSum", add("Cast", is_behind, to=TensorProto.INT64), int64(1), keepdims=0)
        number = add("Sub", window, add("Gather", add("Sub", ends, counts), text))
        start = add("Min", add("Mul", number, int64(long_texts.stride)), add("Gather", overflow, text))
        is_of = add("Equal", column(numbers_to(add("Squeeze", add("Shape", counts), int64(0)))), text)
        per_window = add("Cast", column(counts), to=TensorProto.FLOAT)
        window_weights = add("Div", add("Cast", is_of, to=TensorProto.FLOAT), per_window)
        first, lengths = add("Add", add("Gather", first, text), start), add("Gather", lengths, text)
    kept = column(add("Min", lengths, int64(room)))  # [windows, 1]
    length = add("Add", add("ReduceMax", kept, keepdims=0), np.array(2, np.int64))
    places, end = add("Unsqueeze", numbers_to(length), int64(0)), add("Add", kept, int64(1))
    source = add("Add", column(first), add("Sub", places, int64(1)))
    if long_texts.kind == "head-tail":
        is_tail = add("Greater", places, int64(room // 4))
        source = add("Add", source, add("Where", is_tail, column(overflow), int64(0)))
    last = add("Sub", add("Shape", ids), int64(1))
    words = add("Gather", ids, add("Max", add("Min", source, last), int64(0)))
    padded = add("Where", add("Equal", places, end), int64(END), int64(PAD_ID))
    padded = add("Where", add("Less", places, end), words, padded)
    padded = add("Where", add("Equal", places, int64(0)), int64(BEGIN), padded)
    return padded, add("LessOrEqual", places, end), window_weights


def write_onnx(
    file: Path, weights: Weights, encoder: EncoderFolder, task: Task, takes_texts: bool, int8: bool, logits_only: bool
) -> None:
    """Write a file that takes texts, or ids, with the encoder quantized if `int8`; UserError if it would be too large.

    Weights are fp32, by parameter name. With `logits_only`, the only output is `logits`, fp32 [texts, labels].
    """
    if sum(weight.size for weight in weights.values()) * (1 if int8 else 4) > _LARGEST_FILE:
        raise UserError("the model is larger than the 2 GB of an ONNX file; trim its vocabulary, or use onnx-int8")
    graph, window_weights = _Graph(weights, int8), None
    value = helper.make_tensor_value_info
    if takes_texts:
        inputs = [value("text", TensorProto.STRING, ["texts"])]
        ids, mask, window_weights = _tokenize(graph, "text", encoder)
    else:
        inputs = [value(name, TensorProto.INT64, ["texts", "length"]) for name in ("input_ids", "attention_mask")]
        ids, mask = "input_ids", graph.add("Cast", "attention_mask", to=TensorProto.BOOL)
    logits = _logits(graph, encoder.shape, ids, mask, window_weights)
    results = {"logits": (logits, "FLOAT", [task.outputs])} if logits_only else task.append_to_onnx(graph.add, logits)
    outputs = [value(name, getattr(TensorProto, kind), ["texts", *sizes]) for name, (_, kind, sizes) in results.items()]
    graph.nodes += [helper.make_node("Identity", [result], [name]) for name, (result, *_) in results.items()]
    model = helper.make_model(
        helper.make_graph(graph.nodes, "classifier", inputs, outputs, graph.constants),
        opset_imports=[helper.make_opsetid("", OPSET), *[helper.make_opsetid(_EXTENSIONS, 1)] * takes_texts],
        ir_version=IR_VERSION,
        producer_name="sst2_xlmr",
    )
    about = {"label_names": json.dumps(task.label_names), "max_length": str(encoder.max_length)}
    helper.set_model_props(model, {**about, "problem_type": task.problem_type})
    file.write_bytes(model.SerializeToString())
