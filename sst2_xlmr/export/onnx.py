"""A trained classifier as one ONNX file, for onnxruntime: no torch is needed where it runs.

From raw texts, with the tokenizer inside (onnxruntime-extensions' SentencePiece operator):

    import numpy, onnxruntime, onnxruntime_extensions
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(onnxruntime_extensions.get_library_path())
    session = onnxruntime.InferenceSession("classifier.onnx", options)
    labels, probabilities = session.run(None, {"text": numpy.array(["A fine film."], dtype=object)})

or from ids, padded with 1: inputs `input_ids` and `attention_mask`, int64 [texts, length]. The metadata has
`label_names` and `max_length`.

The graph is written operator by operator, so that it is the same on every torch, and so that 8-bit products can have a
range for every row of activations (see engines/cpu/int8.c): onnxruntime's own dynamic quantization has one for a whole
tensor, which costs XLM-R points of accuracy. On x86 processors without VNNI, onnxruntime's 8-bit products of this kind
may overflow (https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html), so compare there too.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Union

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from sst2_xlmr.model.encoders import EncoderShape
from sst2_xlmr.model.quantized import quantize_weights
from sst2_xlmr.model.roberta import FIRST_POSITION, PAD_ID
from sst2_xlmr.util.errors import UserError

OPSET, IR_VERSION = 20, 9  # the first with Gelu, and the format that came with it; onnxruntime 1.17 reads both
_EXTENSIONS = "ai.onnx.contrib"
_LARGEST_FILE = 2**31 - (1 << 24)  # bytes: protobuf's limit, less what is not weights
_BEGIN, _END, _UNKNOWN = 0, 2, 3
Value = Union[str, np.ndarray]
Tensors = dict[str, np.ndarray]


class _Graph:
    """Operators and constants, in the order in which they are added."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def add(self, kind: str, *inputs: Value, outputs: int = 1, domain: str = "", **attributes: Any) -> Any:
        """Add an operator; arrays among its inputs are constants. Returns its output's name, or a list of names."""
        names = [value if isinstance(value, str) else self._constant(value) for value in inputs]
        results = [f"{kind}_{len(self.nodes)}_{number}" for number in range(outputs)]
        self.nodes.append(helper.make_node(kind, names, results, domain=domain, **attributes))
        return results[0] if outputs == 1 else results

    def _constant(self, array: np.ndarray) -> str:
        name = f"constant_{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name


def _int(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def _float(value: float) -> np.ndarray:
    return np.array(value, np.float32)


def _quantized(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    values, scales = quantize_weights(torch.from_numpy(weight))
    return values.numpy(), scales.numpy()


class _Activations:
    """A tensor, and once it is needed also in 8 bits: bytes, scale and least value of every row."""

    def __init__(self, graph: _Graph, name: str) -> None:
        self.graph, self.name = graph, name
        self._in_bytes: tuple[str, str, str] | None = None

    def in_bytes(self) -> tuple[str, str, str]:
        if self._in_bytes is None:
            add = self.graph.add
            least = add("Min", add("ReduceMin", self.name, _int(-1), keepdims=1), _float(0))
            largest = add("Max", add("ReduceMax", self.name, _int(-1), keepdims=1), _float(0))
            scale = add("Max", add("Div", add("Sub", largest, least), _float(255)), _float(1e-30))
            steps = add("Round", add("Div", add("Sub", self.name, least), scale))
            self._in_bytes = (add("Cast", steps, to=TensorProto.UINT8), scale, least)
        return self._in_bytes


class _Model:
    """Adds the classifier's parts to a graph.

    Args:
        tensors: fp32, under the classifier's names.
        int8: whether the encoder's products and embeddings are in 8 bits.
    """

    def __init__(self, graph: _Graph, tensors: Tensors, shape: EncoderShape, int8: bool) -> None:
        self.graph, self.tensors, self.shape, self.int8 = graph, tensors, shape, int8

    def linear(self, x: _Activations, weight: np.ndarray, bias: np.ndarray) -> str:
        """Return x weight^T + bias."""
        add = self.graph.add
        if not self.int8:
            return str(add("Add", add("MatMul", x.name, weight.T), bias))
        values, scales = _quantized(weight)
        in_bytes, scale, least = x.in_bytes()
        sums = add("Cast", add("MatMulInteger", in_bytes, values.T), to=TensorProto.FLOAT)
        shift = add("Add", add("Mul", least, values.sum(1, dtype=np.float32) * scales), bias)
        return str(add("Add", add("Mul", add("Mul", sums, scale), scales), shift))

    def norm(self, x: str, prefix: str) -> _Activations:
        parameters = (self.tensors[f"{prefix}.weight"], self.tensors[f"{prefix}.bias"])
        name = self.graph.add("LayerNormalization", x, *parameters, axis=-1, epsilon=self.shape.layer_norm_eps)
        return _Activations(self.graph, name)

    def embeddings(self, ids: str, prefix: str) -> _Activations:
        """Return the first layer's input, [texts, length, hidden]; ids: int64 [texts, length]."""
        add, table = self.graph.add, self.tensors[f"{prefix}.token_embedding.weight"]
        if self.int8:
            values, scales = _quantized(table)
            in_bytes = add("Cast", add("Gather", values, ids), to=TensorProto.FLOAT)
            words = add("Mul", in_bytes, add("Gather", scales[:, None], ids))
        else:
            words = add("Gather", table, ids)
        length = add("Shape", ids, start=1, end=2)
        positions = self.tensors[f"{prefix}.positional_embedding.embedding.weight"][FIRST_POSITION:]
        hidden = add("Add", words, add("Slice", positions, _int(0), length, _int(0)))
        return self.norm(hidden, f"{prefix}.embedding_layer_norm")

    def heads(self, x: str) -> str:
        """Cut [texts, length, hidden] into heads: [texts, heads, length, size]."""
        size = self.shape.hidden // self.shape.heads
        cut = self.graph.add("Reshape", x, _int(0, 0, self.shape.heads, size))
        return str(self.graph.add("Transpose", cut, perm=[0, 2, 1, 3]))

    def layer(self, x: _Activations, mask: str, prefix: str, is_last: bool) -> _Activations:
        """Return the layer's output; the last one's for `<s>` only.

        Args:
            mask: fp32 [texts, 1, 1, length], added to attention scores.
        """
        add, tensors, width = self.graph.add, self.tensors, self.shape.hidden
        weight, bias = tensors[f"{prefix}.self_attn.in_proj_weight"], tensors[f"{prefix}.self_attn.in_proj_bias"]
        queries = _Activations(self.graph, add("Slice", x.name, _int(0), _int(1), _int(1))) if is_last else x
        parts = [slice(0, width), slice(width, 2 * width), slice(2 * width, None)]
        query, key, value = (
            self.heads(self.linear(source, weight[part], bias[part])) for source, part in zip((queries, x, x), parts)
        )
        query = add("Mul", query, _float((width // self.shape.heads) ** -0.5))
        scores = add("Add", add("MatMul", query, add("Transpose", key, perm=[0, 1, 3, 2])), mask)
        mixed = add("Transpose", add("MatMul", add("Softmax", scores, axis=-1), value), perm=[0, 2, 1, 3])
        joined = _Activations(self.graph, add("Reshape", mixed, _int(0, 0, width)))
        attended = self.of_layer(joined, prefix, "self_attn.out_proj")
        y = self.norm(add("Add", queries.name, attended), f"{prefix}.norm1")
        inner = _Activations(self.graph, add("Gelu", self.of_layer(y, prefix, "linear1")))
        return self.norm(add("Add", y.name, self.of_layer(inner, prefix, "linear2")), f"{prefix}.norm2")

    def of_layer(self, x: _Activations, prefix: str, name: str) -> str:
        return self.linear(x, self.tensors[f"{prefix}.{name}.weight"], self.tensors[f"{prefix}.{name}.bias"])

    def logits(self, ids: str, mask: str) -> str:
        """Return [texts, labels]; ids: int64 [texts, length], mask: bool, where there is a token."""
        add, prefix = self.graph.add, "encoder.transformer"
        scores = add("Where", mask, _float(0), _float(-np.inf))
        scores = add("Unsqueeze", scores, _int(1, 2))
        x = self.embeddings(ids, prefix)
        for number in range(self.shape.layers):
            x = self.layer(x, scores, f"{prefix}.layers.layers.{number}", number == self.shape.layers - 1)
        first = add("Reshape", x.name, _int(0, self.shape.hidden))
        inner = add("Tanh", add("Gemm", first, *self.of_head("dense"), transB=1))
        return str(add("Gemm", inner, *self.of_head("out_proj"), transB=1))

    def of_head(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        return self.tensors[f"head.{name}.weight"], self.tensors[f"head.{name}.bias"]


def _tokenize(graph: _Graph, texts: str, tokenizer: bytes, max_length: int) -> tuple[str, str]:
    """Return ids, int64 [texts, length], and where there is a token, bool; as `model.tokenizer.Tokenizer`."""
    add = graph.add
    no = np.array([False])
    pieces, starts = add(
        "SentencepieceTokenizer",
        texts,
        _int(0),
        np.array([0], np.float32),
        no,
        no,
        no,
        no,
        outputs=2,
        domain=_EXTENSIONS,
        model=tokenizer,
    )
    pieces = add("Cast", pieces, to=TensorProto.INT64)
    ids = add("Where", add("Equal", pieces, _int(0)), _int(_UNKNOWN), add("Add", pieces, _int(1)))
    ids = add("Concat", ids, _int(PAD_ID), axis=0)  # so that there is one, if all texts are empty
    first = add("Slice", starts, _int(0), _int(-1), _int(0))
    lengths = add("Sub", add("Slice", starts, _int(1), _int(2**31), _int(0)), first)
    kept = add("Unsqueeze", add("Min", lengths, _int(max_length - 2)), _int(1))  # [texts, 1]
    length = add("Add", add("ReduceMax", kept, keepdims=0), np.array(2, np.int64))
    places = add("Unsqueeze", add("Range", np.array(0, np.int64), length, np.array(1, np.int64)), _int(0))
    end = add("Add", kept, _int(1))
    source = add("Add", add("Unsqueeze", first, _int(1)), add("Sub", places, _int(1)))
    last = add("Sub", add("Shape", ids), _int(1))
    words = add("Gather", ids, add("Max", add("Min", source, last), _int(0)))
    padded = add("Where", add("Equal", places, end), _int(_END), _int(PAD_ID))
    padded = add("Where", add("Less", places, end), words, padded)
    padded = add("Where", add("Equal", places, _int(0)), _int(_BEGIN), padded)
    return padded, add("LessOrEqual", places, end)


def build_onnx(
    tensors: Tensors,
    shape: EncoderShape,
    label_names: list[str],
    max_length: int,
    tokenizer: bytes | None,
    int8: bool,
) -> onnx.ModelProto:
    """Build the model.

    Args:
        tensors: fp32, under the classifier's names.
        max_length: of a row in tokens; longer texts are cut.
        tokenizer: content of the SentencePiece model, for a file that takes raw texts; None for one that takes ids.
        int8: whether the encoder computes in 8 bits.

    Raises:
        UserError: if it would be too large for a file.
    """
    if sum(tensor.size for tensor in tensors.values()) * (1 if int8 else 4) > _LARGEST_FILE:
        raise UserError("the model is larger than the 2 GB of an ONNX file; trim its vocabulary, or take onnx-int8")
    graph = _Graph()
    if tokenizer is None:
        names = {"input_ids": TensorProto.INT64, "attention_mask": TensorProto.INT64}
        inputs = [helper.make_tensor_value_info(name, kind, ["texts", "length"]) for name, kind in names.items()]
        ids, mask = "input_ids", graph.add("Cast", "attention_mask", to=TensorProto.BOOL)
    else:
        inputs = [helper.make_tensor_value_info("text", TensorProto.STRING, ["texts"])]
        ids, mask = _tokenize(graph, "text", tokenizer, max_length)
    logits = _Model(graph, tensors, shape, int8).logits(ids, mask)
    probabilities = graph.add("Softmax", logits, axis=-1)
    best = graph.add("ArgMax", logits, axis=-1, keepdims=0)
    label = graph.add("Gather", np.array(label_names, dtype=object), best)
    for name, value in (("label", label), ("probabilities", probabilities)):
        graph.nodes.append(helper.make_node("Identity", [value], [name]))
    outputs = [
        helper.make_tensor_value_info("label", TensorProto.STRING, ["texts"]),
        helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["texts", len(label_names)]),
    ]
    model = helper.make_model(
        helper.make_graph(graph.nodes, "classifier", inputs, outputs, graph.constants),
        opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(_EXTENSIONS, 1)],
        ir_version=IR_VERSION,
        producer_name="sst2_xlmr",
    )
    helper.set_model_props(model, {"label_names": json.dumps(label_names), "max_length": str(max_length)})
    return model


def write_onnx(model: onnx.ModelProto, file: Path) -> None:
    """Write the file.

    Raises:
        OSError: if it cannot be written.
    """
    file.write_bytes(model.SerializeToString())
