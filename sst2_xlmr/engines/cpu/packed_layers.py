"""Embeddings and transformer layers over packed rows, each with a backward pass written by hand.

Matrix products are torch's (oneDNN), everything between them is done by the kernels, and few intermediate results are
kept.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from sst2_xlmr.engines.cpu.kernels import Kernels, Packed

# Where dropout is: site 0 after the embeddings, then three sites a layer, then two in the head.
EMBEDDINGS, ATTENTION, AFTER_ATTENTION, AFTER_FEED_FORWARD = range(4)
SITES_PER_LAYER = 3
Gradients = tuple[Any, ...]


class Settings(NamedTuple):
    """What a layer's forward and backward pass need besides tensors."""

    kernels: Kernels  # of the parameters' dtype
    rows: Packed  # the layout of the packed rows, with the probability of dropout on hidden states
    attention_rows: Packed  # the same, with that on attention weights
    heads: int  # of attention
    epsilon: float  # LayerNorm's
    with_grad: bool  # whether a backward pass will follow
    first_site: int  # added to the numbers of a layer's dropout sites


def _sum_by_row(like: Tensor, where: Tensor, values: Tensor) -> Tensor:
    """Return zeros like `like` with values[i] added to row where[i]; summed in fp32."""
    distinct, inverse = where.unique(return_inverse=True)
    sums = torch.zeros(len(distinct), values.shape[1]).index_add_(0, inverse, values.float())
    result = torch.zeros_like(like)
    result[distinct] = sums.to(like.dtype)
    return result


class Embedding(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        table: Tensor,
        position_table: Tensor,
        gamma: Tensor,
        beta: Tensor,
        settings: Settings,
        where: tuple[Tensor, Tensor],
    ) -> Tensor:
        kernels, rows = settings.kernels, settings.rows
        summed = F.embedding(where[0], table) + F.embedding(where[1], position_table)
        norm = gamma, beta, settings.epsilon
        hidden, normed = kernels.add_norm(summed, None, None, *norm, rows, EMBEDDINGS, with_grad=settings.with_grad)
        kernels.dropout_(normed, rows, EMBEDDINGS)
        ctx.save_for_backward(table, position_table, gamma, hidden)
        ctx.settings, ctx.where = settings, where
        return normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Gradients:
        table, position_table, gamma, hidden = ctx.saved_tensors
        kernels, rows, (ids, positions) = ctx.settings.kernels, ctx.settings.rows, ctx.where
        grad = grad.clone(memory_format=torch.contiguous_format)
        kernels.dropout_(grad, rows, EMBEDDINGS)
        inputs = grad, hidden, gamma, ctx.settings.epsilon, rows, EMBEDDINGS
        dhidden, _, dgamma, dbeta, _ = kernels.add_norm_backward(*inputs, has_y=False)
        dtable, dpositions = _sum_by_row(table, ids, dhidden), _sum_by_row(position_table, positions, dhidden)
        return dtable, dpositions, dgamma, dbeta, None, None


class Layer(torch.autograd.Function):
    """One post-norm transformer layer (https://arxiv.org/abs/1706.03762), all positions."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, settings: Settings, *parameters: Tensor) -> Tensor:
        site = settings.first_site + ATTENTION
        projected = F.linear(x, parameters[0], parameters[1])
        q, k, v = projected.chunk(3, dim=1)
        mixed = settings.kernels.attention(q, k, v, settings.heads, settings.attention_rows, site)
        output, saved = _after_attention(x, mixed, settings, parameters, None)
        ctx.save_for_backward(x, projected, mixed, *saved, *parameters)
        ctx.settings = settings
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Gradients:
        x, projected, mixed, *saved = ctx.saved_tensors
        settings: Settings = ctx.settings
        kernels, site = settings.kernels, settings.first_site + ATTENTION
        saved, parameters = saved[:-12], saved[-12:]
        dhidden, dmixed, gradients = _after_attention_backward(grad, mixed, settings, saved, parameters, None)
        dprojected = torch.empty_like(projected)
        (q, k, v), (dq, dk, dv) = projected.chunk(3, dim=1), dprojected.chunk(3, dim=1)
        kernels.attention_backward(dmixed, (q, k, v), (dq, dk, dv), settings.heads, settings.attention_rows, site)
        dx = torch.addmm(dhidden, dprojected, parameters[0])
        in_proj = (dprojected.t().mm(x), kernels.column_sums(dprojected))
        return dx, None, *in_proj, *gradients


class LastLayer(torch.autograd.Function):
    """The same at the first token of every text only; its keys and values come from all tokens."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, settings: Settings, *parameters: Tensor) -> Tensor:
        rows, site = settings.rows, settings.first_site + ATTENTION
        width = x.shape[1]
        firsts = rows.starts[:-1].long()
        at = rows.keys[firsts]
        first = x[firsts]
        q = F.linear(first, parameters[0][:width], parameters[1][:width])
        kv = F.linear(x, parameters[0][width:], parameters[1][width:])
        k, v = kv.chunk(2, dim=1)
        mixed = settings.kernels.attention(q, k, v, settings.heads, settings.attention_rows, site)
        output, saved = _after_attention(first, mixed, settings, parameters, at)
        ctx.save_for_backward(x, firsts, at, first, q, kv, mixed, *saved, *parameters)
        ctx.settings = settings
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Gradients:
        x, firsts, at, first, q, kv, mixed, *saved = ctx.saved_tensors
        settings: Settings = ctx.settings
        kernels, site = settings.kernels, settings.first_site + ATTENTION
        saved, parameters = saved[:-12], saved[-12:]
        width = x.shape[1]
        grad = grad.contiguous()
        dhidden, dmixed, gradients = _after_attention_backward(grad, mixed, settings, saved, parameters, at)
        dq, dkv = torch.empty_like(q), torch.empty_like(kv)
        (k, v), (dk, dv) = kv.chunk(2, dim=1), dkv.chunk(2, dim=1)
        kernels.attention_backward(dmixed, (q, k, v), (dq, dk, dv), settings.heads, settings.attention_rows, site)
        dx = dkv.mm(parameters[0][width:])
        dx.index_add_(0, firsts, torch.addmm(dhidden, dq, parameters[0][:width]))
        weight = torch.cat([dq.t().mm(first), dkv.t().mm(x)])
        bias = torch.cat([kernels.column_sums(dq), kernels.column_sums(dkv)])
        return dx, None, weight, bias, *gradients


def _after_attention(
    x: Tensor, mixed: Tensor, settings: Settings, parameters: tuple[Tensor, ...], at: Tensor | None
) -> tuple[Tensor, list[Tensor]]:
    """Return the layer's output, and what its backward pass needs. All are [rows, ...] for the rows of x."""
    kernels, rows, epsilon, site = settings.kernels, settings.rows, settings.epsilon, settings.first_site
    out, out_bias, gamma1, beta1, linear1, bias1, linear2, bias2, gamma2, beta2 = parameters[2:]
    after_attention, after_feed_forward = (
        (rows, site + n, at, settings.with_grad) for n in (AFTER_ATTENTION, AFTER_FEED_FORWARD)
    )
    attended = mixed.mm(out.t())
    hidden1, y = kernels.add_norm(x, attended, out_bias, gamma1, beta1, epsilon, *after_attention)
    derivative = y.mm(linear1.t())
    inner = kernels.bias_gelu_(derivative, bias1, settings.with_grad)
    fed = inner.mm(linear2.t())
    hidden2, output = kernels.add_norm(y, fed, bias2, gamma2, beta2, epsilon, *after_feed_forward)
    return output, [hidden1, y, derivative, inner, hidden2]


def _after_attention_backward(
    grad: Tensor, mixed: Tensor, settings: Settings, saved: list[Tensor], parameters: list[Tensor], at: Tensor | None
) -> tuple[Tensor, Tensor, Gradients]:
    """Return the gradients of x (its residual part), of `mixed`, and of the parameters after the input projection."""
    kernels, rows, epsilon, site = settings.kernels, settings.rows, settings.epsilon, settings.first_site
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
