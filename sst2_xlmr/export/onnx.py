"""A trained classifier as one ONNX file, which runs in onnxruntime without torch.

It takes texts, with the tokenizer inside (the SentencePiece operator of onnxruntime-extensions; for an example see
docs/from-csv-to-service.md), or `input_ids` and `attention_mask`, int64 [texts, length], padded with 1. Its metadata
are `label_names`, `max_length` and `problem_type`.

The graph is built operator by operator, so it is the same with every torch, and activations are quantized per row (see
engines/cpu/int8.c). onnxruntime's dynamic quantization is per tensor, which costs XLM-R points of accuracy. On x86 CPUs
without VNNI its int8 products may overflow (onnxruntime.ai/docs/performance/model-optimizations/quantization.html).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Union

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from sst2_xlmr.model.encoders import EncoderFolder, EncoderShape
from sst2_xlmr.model.roberta import FIRST_POSITION, PAD_ID
from sst2_xlmr.model.tokenizer_files import sentencepiece_model
from sst2_xlmr.model.vocabulary import EMBEDDING
from sst2_xlmr.task import Task
from sst2_xlmr.util.errors import UserError
from sst2_xlmr.util.tensors import quantize_weights

OPSET, IR_VERSION = 20, 9  # the first with Gelu, and the format that came with it; onnxruntime 1.17 reads both
_EXTENSIONS = "ai.onnx.contrib"
_LARGEST_FILE = 2**31 - (1 << 24)  # bytes: protobuf's limit, less what is not weights
_BEGIN, _END, _UNKNOWN = 0, 2, 3
Value = Union[str, np.ndarray]
Weights = Mapping[str, np.ndarray]


class _Graph:
    """Operators and constants, in the order in which they are added; with `int8`, weights are in 8 bits."""

    def __init__(self, weights: Weights, int8: bool) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.weights, self.int8 = weights, int8
        self._in_bytes: dict[str, tuple[str, str, str]] = {}

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

    def in_bytes(self, x: str) -> tuple[str, str, str]:
        """Quantize a tensor, once; returns its uint8 values, and each row's scale and minimum."""
        if x not in self._in_bytes:
            least = self.add("Min", self.add("ReduceMin", x, _int(-1), keepdims=1), _float(0))
            largest = self.add("Max", self.add("ReduceMax", x, _int(-1), keepdims=1), _float(0))
            scale = self.add("Max", self.add("Div", self.add("Sub", largest, least), _float(255)), _float(1e-30))
            steps = self.add("Round", self.add("Div", self.add("Sub", x, least), scale))
            self._in_bytes[x] = (self.add("Cast", steps, to=TensorProto.UINT8), scale, least)
        return self._in_bytes[x]

    def pair(self, name: str, rows: slice = slice(None)) -> tuple[np.ndarray, np.ndarray]:
        """Return rows of a weight and of its bias."""
        return self.weights[f"{name}.weight"][rows], self.weights[f"{name}.bias"][rows]

    def linear(self, x: str, name: str, rows: slice = slice(None)) -> str:
        """Return x weight^T + bias."""
        weight, bias = self.pair(name, rows)
        if not self.int8:
            return self.add("Add", self.add("MatMul", x, weight.T), bias)
        values, scales = _quantized(weight)
        in_bytes, scale, least = self.in_bytes(x)
        sums = self.add("Cast", self.add("MatMulInteger", in_bytes, values.T), to=TensorProto.FLOAT)
        shift = self.add("Add", self.add("Mul", least, values.sum(1, dtype=np.float32) * scales), bias)
        return self.add("Add", self.add("Mul", self.add("Mul", sums, scale), scales), shift)


def _int(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def _float(value: float) -> np.ndarray:
    return np.array(value, np.float32)


def _quantized(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    values, scales = quantize_weights(torch.from_numpy(weight))
    return values.numpy(), scales.numpy()


def _layer(graph: _Graph, shape: EncoderShape, number: int, x: str, mask: str) -> str:
    """Return a layer's output for x, [texts, length, hidden]; the last layer's only for `<s>`.

    The mask, fp32 [texts, 1, 1, length], is added to attention scores.
    """
    add, width, head_size = graph.add, shape.hidden, shape.hidden // shape.heads
    prefix = f"encoder.layers.{number}"

    def heads(source: str, part: int) -> str:
        """Return queries (0), keys (1) or values (2), [texts, heads, length, size]."""
        projected = graph.linear(source, f"{prefix}.qkv", slice(part * width, (part + 1) * width))
        return add("Transpose", add("Reshape", projected, _int(0, 0, shape.heads, head_size)), perm=[0, 2, 1, 3])

    def norm(y: str, name: str) -> str:
        return add("LayerNormalization", y, *graph.pair(f"{prefix}.{name}"), axis=-1, epsilon=shape.layer_norm_eps)

    queries = add("Slice", x, _int(0), _int(1), _int(1)) if number == shape.layers - 1 else x
    query, key, value = heads(queries, 0), heads(x, 1), heads(x, 2)
    query = add("Mul", query, _float(head_size**-0.5))
    scores = add("Add", add("MatMul", query, add("Transpose", key, perm=[0, 1, 3, 2])), mask)
    mixed = add("Transpose", add("MatMul", add("Softmax", scores, axis=-1), value), perm=[0, 2, 1, 3])
    attended = graph.linear(add("Reshape", mixed, _int(0, 0, width)), f"{prefix}.out")
    y = norm(add("Add", queries, attended), "norm1")
    inner = add("Gelu", graph.linear(y, f"{prefix}.up"))
    return norm(add("Add", y, graph.linear(inner, f"{prefix}.down")), "norm2")


def _logits(graph: _Graph, shape: EncoderShape, ids: str, mask: str, share: str | None = None) -> str:
    """Return logits [texts, labels]; `ids` are int64 [windows, length], `mask` is True at tokens.

    `share`, fp32 [texts, windows], is each window's weight in its text; None if each text is one window.
    """
    add, words, length = graph.add, graph.weights[EMBEDDING], graph.add("Shape", ids, start=1, end=2)
    if graph.int8:
        values, scales = _quantized(words)
        in_bytes = add("Cast", add("Gather", values, ids), to=TensorProto.FLOAT)
        words = add("Mul", in_bytes, add("Gather", scales[:, None], ids))
    else:
        words = add("Gather", words, ids)
    positions = graph.weights["encoder.positions.weight"][FIRST_POSITION:]
    hidden = add("Add", words, add("Slice", positions, _int(0), length, _int(0)))
    x = add("LayerNormalization", hidden, *graph.pair("encoder.norm"), axis=-1, epsilon=shape.layer_norm_eps)
    scores = add("Unsqueeze", add("Where", mask, _float(0), _float(-np.inf)), _int(1, 2))
    for number in range(shape.layers):
        x = _layer(graph, shape, number, x, scores)
    first = add("Reshape", x, _int(0, shape.hidden))
    if share:
        first = add("MatMul", share, first)
    inner = add("Tanh", add("Gemm", first, *graph.pair("head.dense"), transB=1))
    return add("Gemm", inner, *graph.pair("head.out"), transB=1)


def _tokenize(graph: _Graph, texts: str, encoder: EncoderFolder) -> tuple[str, str, str | None]:
    """Tokenize like `model.tokenizer.Tokenizer`; returns ids, mask and share (see `_logits`)."""
    add, room, share, long_texts = graph.add, encoder.max_length - 2, None, encoder.long_texts

    def column(vector: str) -> str:
        return add("Unsqueeze", vector, _int(1))

    def numbers_to(count: Value) -> str:
        return add("Range", np.array(0, np.int64), count, np.array(1, np.int64))

    # No sampling (the first two), no <s> or </s>, no reversal.
    options = (_int(0), np.array([0], np.float32), *[np.array([False])] * 4)
    how: dict[str, Any] = {"domain": _EXTENSIONS, "model": sentencepiece_model(encoder.tokenizer_file)}
    pieces, starts = add("SentencepieceTokenizer", texts, *options, outputs=2, **how)
    pieces = add("Cast", pieces, to=TensorProto.INT64)
    ids = add("Where", add("Equal", pieces, _int(0)), _int(_UNKNOWN), add("Add", pieces, _int(1)))
    ids = add("Concat", ids, _int(PAD_ID), axis=0)  # so that there is one, if all texts are empty
    first = add("Slice", starts, _int(0), _int(-1), _int(0))
    lengths = add("Sub", add("Slice", starts, _int(1), _int(2**31), _int(0)), first)
    more = add("Max", add("Sub", lengths, _int(room)), _int(0))  # of a text's tokens than there is room for
    if long_texts.kind == "windows":
        counts = add("Div", add("Add", more, _int(long_texts.stride - 1)), _int(long_texts.stride))
        counts = add("Add", counts, _int(1))  # of each text's windows
        ends = add("CumSum", counts, np.array(0, np.int64))
        window = numbers_to(add("Squeeze", add("Slice", ends, _int(-1), _int(2**31), _int(0)), _int(0)))
        is_behind = add("GreaterOrEqual", column(window), add("Unsqueeze", ends, _int(0)))
        text = add("ReduceSum", add("Cast", is_behind, to=TensorProto.INT64), _int(1), keepdims=0)
        number = add("Sub", window, add("Gather", add("Sub", ends, counts), text))
        start = add("Min", add("Mul", number, _int(long_texts.stride)), add("Gather", more, text))
        is_of = add("Equal", column(numbers_to(add("Squeeze", add("Shape", counts), _int(0)))), text)
        per_window = add("Cast", column(counts), to=TensorProto.FLOAT)
        share = add("Div", add("Cast", is_of, to=TensorProto.FLOAT), per_window)
        first, lengths = add("Add", add("Gather", first, text), start), add("Gather", lengths, text)
    kept = column(add("Min", lengths, _int(room)))  # [windows, 1]
    length = add("Add", add("ReduceMax", kept, keepdims=0), np.array(2, np.int64))
    places, end = add("Unsqueeze", numbers_to(length), _int(0)), add("Add", kept, _int(1))
    source = add("Add", column(first), add("Sub", places, _int(1)))
    if long_texts.kind == "head-tail":
        is_tail = add("Greater", places, _int(room // 4))
        source = add("Add", source, add("Where", is_tail, column(more), _int(0)))
    last = add("Sub", add("Shape", ids), _int(1))
    words = add("Gather", ids, add("Max", add("Min", source, last), _int(0)))
    padded = add("Where", add("Equal", places, end), _int(_END), _int(PAD_ID))
    padded = add("Where", add("Less", places, end), words, padded)
    padded = add("Where", add("Equal", places, _int(0)), _int(_BEGIN), padded)
    return padded, add("LessOrEqual", places, end), share


def write_onnx(
    file: Path, weights: Weights, encoder: EncoderFolder, task: Task, takes_texts: bool, int8: bool, logits_only: bool
) -> None:
    """Write a file that takes texts, or ids, with the encoder quantized if `int8`; UserError if it would be too large.

    Weights are fp32, by the classifier's parameter names; the encoder's own are not read. With `logits_only`, the only
    output is `logits`, fp32 [texts, labels], instead of labels and probabilities.
    """
    if sum(weight.size for weight in weights.values()) * (1 if int8 else 4) > _LARGEST_FILE:
        raise UserError("the model is larger than the 2 GB of an ONNX file; trim its vocabulary, or use onnx-int8")
    graph, share = _Graph(weights, int8), None
    value = helper.make_tensor_value_info
    if takes_texts:
        inputs = [value("text", TensorProto.STRING, ["texts"])]
        ids, mask, share = _tokenize(graph, "text", encoder)
    else:
        inputs = [value(name, TensorProto.INT64, ["texts", "length"]) for name in ("input_ids", "attention_mask")]
        ids, mask = "input_ids", graph.add("Cast", "attention_mask", to=TensorProto.BOOL)
    logits = _logits(graph, encoder.shape, ids, mask, share)
    own = {"logits": (logits, "FLOAT", [task.outputs])}
    answer = own if logits_only else task.append_to_onnx(graph.add, logits)
    outputs = [value(name, getattr(TensorProto, kind), ["texts", *sizes]) for name, (_, kind, sizes) in answer.items()]
    graph.nodes += [helper.make_node("Identity", [result], [name]) for name, (result, *_) in answer.items()]
    model = helper.make_model(
        helper.make_graph(graph.nodes, "classifier", inputs, outputs, graph.constants),
        opset_imports=[helper.make_opsetid("", OPSET), *[helper.make_opsetid(_EXTENSIONS, 1)] * takes_texts],
        ir_version=IR_VERSION,
        producer_name="sst2_xlmr",
    )
    about = {"label_names": json.dumps(task.label_names), "max_length": str(encoder.max_length)}
    helper.set_model_props(model, {**about, "problem_type": task.problem_type})
    file.write_bytes(model.SerializeToString())
