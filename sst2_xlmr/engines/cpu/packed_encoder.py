"""The encoder's forward and backward pass on a CPU, on packed rows: no padding, one pass over memory per step.

The same mathematics as `model`'s plain path, which autograd differentiates and other devices run; the tests compare
the two. Here matrix products are torch's (oneDNN), everything between them is `cpu_kernels`, and the backward pass is
written by hand, so that it needs few intermediate results and no small operations.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from sst2_xlmr.engines.cpu.kernels import Kernels, Packed, mix
from sst2_xlmr.model.tokenizer import PAD_ID

ATTENTION, AFTER_ATTENTION, AFTER_FEED_FORWARD = (
    1,
    2,
    3,
)  # the dropout sites of layer 0; a layer has three, embeddings 0
Gradients = tuple[Any, ...]


def rounded_up(tokens: int) -> int:
    """Return how many rows the matrices of so many tokens have.

    oneDNN generates code for every new shape of a matrix product, half a millisecond each; multiples of 8 keep them
    few.
    """
    return tokens + -tokens % 8


def pack(tokens: torch.Tensor, keys: torch.Tensor | None, drop_p: float) -> tuple[Packed, torch.Tensor, torch.Tensor]:
    """Leave padding out, but for the few rows that `rounded_up` adds.

    Args:
        tokens: int64 [texts, length], padded with 1.
        keys: int64 [texts], below 2**32, where each text's dropout masks come from; None for zeros.

    Returns:
        The layout; ids and positions (0, 1, ... in every text), int64 [tokens], those behind the last text 1 and 0.
    """
    is_token = tokens != PAD_ID
    lengths = is_token.sum(1).numpy()
    starts = np.concatenate([[0], np.cumsum(lengths)])
    real_tokens = int(starts[-1])
    rounding = rounded_up(real_tokens) - real_tokens
    positions = np.arange(real_tokens) - np.repeat(starts[:-1], lengths)
    token_keys = positions.astype(np.uint32)
    if keys is not None:
        token_keys = mix(token_keys * np.uint32(0x9E3779B9) + np.repeat(keys.numpy().astype(np.uint32), lengths))
    packed = Packed(
        torch.from_numpy(starts.astype(np.int32)),
        torch.from_numpy(np.pad(token_keys, (0, rounding)).view(np.int32)),
        int(lengths.max()),
        drop_p,
    )
    ids = F.pad(tokens[is_token], (0, rounding), value=PAD_ID)
    return packed, ids, torch.from_numpy(np.pad(positions, (0, rounding)))


def encode(
    transformer: nn.Module,
    kernels: Kernels,
    rows: Packed,
    ids: torch.Tensor,
    positions: torch.Tensor,
    epsilon: float,
) -> torch.Tensor:
    """Return the last layer's output at every text's first token, [texts, hidden].

    Args:
        transformer: torchtext's `TransformerEncoder`, with parameters of the kernels' dtype.
        epsilon: LayerNorm's.
    """
    norm = transformer.embedding_layer_norm
    table, position_table = transformer.token_embedding.weight, transformer.positional_embedding.embedding.weight
    # Position 0 of a text is row PAD_ID + 1, as in fairseq.
    where = (ids, positions + PAD_ID + 1)
    hidden = _Embedding.apply(table, position_table, norm.weight, norm.bias, kernels, rows, where, epsilon)
    layers = transformer.layers.layers
    for number, layer in enumerate(layers):
        attention = layer.self_attn
        parameters = [attention.in_proj_weight, attention.in_proj_bias]
        for module in (attention.out_proj, layer.norm1, layer.linear1, layer.linear2, layer.norm2):
            parameters += [module.weight, module.bias]
        facts = (attention.num_heads, epsilon, 3 * number)
        function = _LastLayer if number == len(layers) - 1 else _Layer
        hidden = function.apply(hidden, kernels, rows, facts, *parameters)
    return hidden


def first_token_masks(like: torch.Tensor, kernels: Kernels, rows: Packed, site: int, drop_p: float) -> torch.Tensor:
    """Return dropout masks like `like`, [texts, n], of every text's first token: 0 or 1 / (1 - drop_p)."""
    masks = torch.ones_like(like)
    kernels.dropout_(masks, dataclasses.replace(rows, drop_p=drop_p), site, rows.keys[rows.starts[:-1].long()])
    return masks


def _sum_by_row(like: torch.Tensor, where: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Return zeros like `like` with values[i] added to row where[i]; summed in fp32."""
    found, inverse = where.unique(return_inverse=True)
    sums = torch.zeros(len(found), values.shape[1]).index_add_(0, inverse, values.float())
    result = torch.zeros_like(like)
    result[found] = sums.to(like.dtype)
    return result


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        table: torch.Tensor,
        position_table: torch.Tensor,
        gamma: torch.Tensor,
        beta: torch.Tensor,
        kernels: Kernels,
        rows: Packed,
        where: tuple[torch.Tensor, torch.Tensor],
        epsilon: float,
    ) -> torch.Tensor:
        summed = F.embedding(where[0], table) + F.embedding(where[1], position_table)
        hidden, normed = kernels.add_norm(summed, None, None, gamma, beta, epsilon, rows, 0)
        kernels.dropout_(normed, rows, 0)
        ctx.save_for_backward(table, position_table, gamma, hidden)
        ctx.facts = kernels, rows, where, epsilon
        return normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Gradients:
        table, position_table, gamma, hidden = ctx.saved_tensors
        kernels, rows, where, epsilon = ctx.facts
        grad = grad.clone(memory_format=torch.contiguous_format)
        kernels.dropout_(grad, rows, 0)
        dhidden, _, dgamma, dbeta, _ = kernels.add_norm_backward(grad, hidden, gamma, epsilon, rows, 0, has_y=False)
        tables = (_sum_by_row(table, where[0], dhidden), _sum_by_row(position_table, where[1], dhidden))
        return *tables, dgamma, dbeta, None, None, None, None


class _Layer(torch.autograd.Function):
    """One post-norm transformer layer (https://arxiv.org/abs/1706.03762), all positions."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        kernels: Kernels,
        rows: Packed,
        facts: tuple[int, float, int],
        *parameters: torch.Tensor,
    ) -> torch.Tensor:
        heads, _, site = facts
        projected = F.linear(x, parameters[0], parameters[1])
        q, k, v = projected.chunk(3, dim=1)
        mixed = kernels.attention(q, k, v, heads, rows, site + ATTENTION)
        output, saved = _after_attention(x, mixed, kernels, rows, facts, parameters, None)
        ctx.save_for_backward(x, projected, mixed, *saved, *parameters)
        ctx.facts = kernels, rows, facts
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Gradients:
        x, projected, mixed, *saved = ctx.saved_tensors
        kernels, rows, facts = ctx.facts
        saved, parameters = saved[:-12], saved[-12:]
        dhidden, dmixed, gradients = _after_attention_backward(
            grad, mixed, kernels, rows, facts, saved, parameters, None
        )
        dprojected = torch.empty_like(projected)
        (q, k, v), (dq, dk, dv) = projected.chunk(3, dim=1), dprojected.chunk(3, dim=1)
        kernels.attention_backward(dmixed, (q, k, v), (dq, dk, dv), facts[0], rows, facts[2] + ATTENTION)
        dx = torch.addmm(dhidden, dprojected, parameters[0])
        in_proj = (dprojected.t().mm(x), kernels.column_sums(dprojected))
        return dx, None, None, None, *in_proj, *gradients


class _LastLayer(torch.autograd.Function):
    """The same at the first token of every text only; its keys and values come from all tokens."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        kernels: Kernels,
        rows: Packed,
        facts: tuple[int, float, int],
        *parameters: torch.Tensor,
    ) -> torch.Tensor:
        heads, _, site = facts
        width = x.shape[1]
        firsts = rows.starts[:-1].long()
        at = rows.keys[firsts]
        first = x[firsts]
        q = F.linear(first, parameters[0][:width], parameters[1][:width])
        kv = F.linear(x, parameters[0][width:], parameters[1][width:])
        k, v = kv.chunk(2, dim=1)
        mixed = kernels.attention(q, k, v, heads, rows, site + ATTENTION)
        output, saved = _after_attention(first, mixed, kernels, rows, facts, parameters, at)
        ctx.save_for_backward(x, firsts, at, first, q, kv, mixed, *saved, *parameters)
        ctx.facts = kernels, rows, facts
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Gradients:
        x, firsts, at, first, q, kv, mixed, *saved = ctx.saved_tensors
        kernels, rows, facts = ctx.facts
        saved, parameters = saved[:-12], saved[-12:]
        width = x.shape[1]
        dhidden, dmixed, gradients = _after_attention_backward(
            grad.contiguous(), mixed, kernels, rows, facts, saved, parameters, at
        )
        dq, dkv = torch.empty_like(q), torch.empty_like(kv)
        (k, v), (dk, dv) = kv.chunk(2, dim=1), dkv.chunk(2, dim=1)
        kernels.attention_backward(dmixed, (q, k, v), (dq, dk, dv), facts[0], rows, facts[2] + ATTENTION)
        dx = dkv.mm(parameters[0][width:])
        dx.index_add_(0, firsts, torch.addmm(dhidden, dq, parameters[0][:width]))
        weight = torch.cat([dq.t().mm(first), dkv.t().mm(x)])
        bias = torch.cat([kernels.column_sums(dq), kernels.column_sums(dkv)])
        return dx, None, None, None, weight, bias, *gradients


def _after_attention(
    x: torch.Tensor,
    mixed: torch.Tensor,
    kernels: Kernels,
    rows: Packed,
    facts: tuple[int, float, int],
    parameters: tuple[torch.Tensor, ...],
    at: torch.Tensor | None,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return the layer's output, and what its backward pass needs. All are [rows, ...] for the rows of x."""
    _, epsilon, site = facts
    out, out_bias, gamma1, beta1, linear1, bias1, linear2, bias2, gamma2, beta2 = parameters[2:]
    attended = mixed.mm(out.t())
    hidden1, y = kernels.add_norm(x, attended, out_bias, gamma1, beta1, epsilon, rows, site + AFTER_ATTENTION, at)
    derivative = y.mm(linear1.t())
    inner = kernels.bias_gelu_(derivative, bias1)
    fed = inner.mm(linear2.t())
    hidden2, output = kernels.add_norm(y, fed, bias2, gamma2, beta2, epsilon, rows, site + AFTER_FEED_FORWARD, at)
    return output, [hidden1, y, derivative, inner, hidden2]


def _after_attention_backward(
    grad: torch.Tensor,
    mixed: torch.Tensor,
    kernels: Kernels,
    rows: Packed,
    facts: tuple[int, float, int],
    saved: list[torch.Tensor],
    parameters: list[torch.Tensor],
    at: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, Gradients]:
    """Return the gradients of x (its residual part), of `mixed`, and of the parameters after the input projection."""
    _, epsilon, site = facts
    out, _, gamma1, _, linear1, _, linear2, _, gamma2, _ = parameters[2:]
    hidden1, y, derivative, inner, hidden2 = saved
    site2 = site + AFTER_FEED_FORWARD
    dy, dfed, dgamma2, dbeta2, dbias2 = kernels.add_norm_backward(grad, hidden2, gamma2, epsilon, rows, site2, at)
    dinner = dfed.mm(linear2)
    dlinear2 = dfed.t().mm(inner)
    dbias1 = kernels.bias_gelu_backward_(dinner, derivative)
    dy = torch.addmm(dy, dinner, linear1)
    dlinear1 = dinner.t().mm(y)
    site1 = site + AFTER_ATTENTION
    dx, dattended, dgamma1, dbeta1, dbias = kernels.add_norm_backward(dy, hidden1, gamma1, epsilon, rows, site1, at)
    dmixed = dattended.mm(out)
    dout = dattended.t().mm(mixed)
    return dx, dmixed, (dout, dbias, dgamma1, dbeta1, dlinear1, dbias1, dlinear2, dbias2, dgamma2, dbeta2)
