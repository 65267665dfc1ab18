"""
FP8 training as in DeepSeek-V3 (arXiv 2412.19437, section 3.3); train.py --fp8=True imports this file.

The three products of a linear layer, y = x W^T, dx = dy W and dW = dy^T x, multiply FP8 numbers and add in fp32. Each
operand is quantised online, by the largest magnitude of the tile it lies in:

    tile      1 x 128 tiles of activations and gradients, along the contraction; 128 x 128 blocks of weights (V3's)
    row       one scale for each row of activations and gradients, and for each row of a weight
    tensor    one scale for each tensor

Embedding, head, routers, norms and the attention core stay as they are, and so do the fp32 master weights: a
checkpoint is that of a run without FP8. What the backward pass needs of x is kept in FP8.

The products are emulated: operands are quantised to float8, dequantised, and multiplied in fp32. The numbers are those
of the recipe, the speed is not.
"""

from typing import NamedTuple

import torch
from torch.nn import functional as F

import model as model_file

TILE = 128
MAX = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}


def quantise(x, rows, cols, dtype=torch.float8_e4m3fn, power_of_two=False):
    """x (..., M, K) -> float8 of its shape, and an fp32 scale for each rows x cols tile: (..., M / rows, K / cols).

    x is about float8 * scale. The largest magnitude of a tile becomes the format's largest number, 448 for E4M3; a tile
    of zeros has scale 1. What is not finite makes its tile's scale, and so all of the tile, nan: a training loop sees
    it in the loss without a host sync. power_of_two: scales are rounded up to powers of two, so that scaling is exact.
    rows or cols 0: all of them.
    """
    M, K = x.shape[-2:]
    rows, cols = rows or M, cols or K
    x = x.float()
    padded = F.pad(x, (0, -K % cols, 0, -M % rows))
    tiles = padded.unflatten(-1, (-1, cols)).unflatten(-3, (-1, rows))      # (..., M/rows, rows, K/cols, cols)
    scale = tiles.abs().amax(dim=(-3, -1)) / MAX[dtype]                     # (..., M/rows, K/cols)
    scale = torch.where(scale.isfinite(), scale, float('nan'))
    scale = torch.where(scale == 0, 1.0, scale.clamp(min=2.0 ** -126))      # no subnormal scales
    if power_of_two:
        scale = torch.exp2(torch.ceil(torch.log2(scale)))
    tiles = tiles / scale[..., :, None, :, None]
    tiles = tiles.clamp(-MAX[dtype], MAX[dtype]).to(dtype)  # some builds of torch cast what lies beyond to nan
    return tiles.flatten(-2).flatten(-3, -2)[..., :M, :K].contiguous(), scale


def dequantise(q, scale, rows, cols):
    """What quantise() made of x, multiplied out: (..., M, K), fp32."""
    M, K = q.shape[-2:]
    rows, cols = rows or M, cols or K
    wide = scale.repeat_interleave(rows, dim=-2).repeat_interleave(cols, dim=-1)[..., :M, :K]
    return q.float() * wide


class Recipe(NamedTuple):
    scaling: str = 'tile'
    grad_dtype: torch.dtype = torch.float8_e4m3fn  # of the gradients dy; torch.float8_e5m2 is the older recipes' choice
    power_of_two: bool = False


# the tile (rows, cols) of an operand whose last dimension is the contraction; 0: all of that dimension
ACTIVATION = {'tile': (1, TILE), 'row': (1, 0), 'tensor': (0, 0)}
WEIGHT = {'tile': (TILE, TILE), 'row': (1, 0), 'tensor': (0, 0)}


def rounded(x, tile, recipe, dtype=torch.float8_e4m3fn):
    """x, as FP8 has it: quantised and multiplied out again, fp32."""
    return dequantise(*quantise(x, *tile, dtype, recipe.power_of_two), *tile)


class LinearFunction(torch.autograd.Function):
    """x (N, in), weight (out, in) -> x weight^T (N, out) in `out_dtype`; the products are emulated."""

    @staticmethod
    def forward(ctx, x, weight, recipe, out_dtype):
        tile = ACTIVATION[recipe.scaling]
        q, scale = quantise(x, *tile, power_of_two=recipe.power_of_two)
        ctx.save_for_backward(q, scale, weight)
        ctx.recipe, ctx.x_dtype = recipe, x.dtype
        with torch.autocast(x.device.type, enabled=False):
            y = dequantise(q, scale, *tile) @ rounded(weight, WEIGHT[recipe.scaling], recipe).t()
        return y.to(out_dtype)

    @staticmethod
    def backward(ctx, grad):
        q, scale, weight = ctx.saved_tensors
        recipe, tile = ctx.recipe, ACTIVATION[ctx.recipe.scaling]
        # dx contracts over out: gradients in tiles along it; 128 x 128 blocks of W^T are those of W
        w_t = rounded(weight.t(), WEIGHT[recipe.scaling], recipe)                       # (in, out)
        grad_x = rounded(grad, tile, recipe, recipe.grad_dtype) @ w_t.t()
        # dW contracts over the rows: x, kept in tiles along `in`, is quantised again in tiles along them (V3 3.5.2)
        x = dequantise(q, scale, *tile)
        grad_w = rounded(grad.t(), tile, recipe, recipe.grad_dtype) @ rounded(x.t(), tile, recipe).t()
        return grad_x.to(ctx.x_dtype), grad_w.to(weight.dtype), None, None


class GroupedFunction(torch.autograd.Function):
    """LinearFunction for rows offsets[e-1]..offsets[e] of x (M, in) and weight[e] of (E, out, in). -> (M, out)

    Tiles along the rows, in dW, do not end where an expert's rows do.
    """

    @staticmethod
    def forward(ctx, x, weight, offsets, recipe):
        tile = ACTIVATION[recipe.scaling]
        x = without_idle_rows(x, offsets)
        q, scale = quantise(x, *tile, power_of_two=recipe.power_of_two)
        ctx.save_for_backward(q, scale, weight, offsets)
        ctx.recipe, ctx.x_dtype = recipe, x.dtype
        weight = rounded(weight, WEIGHT[recipe.scaling], recipe)
        return grouped(dequantise(q, scale, *tile), weight, offsets).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        q, scale, weight, offsets = ctx.saved_tensors
        recipe, tile = ctx.recipe, ACTIVATION[ctx.recipe.scaling]
        grad = without_idle_rows(grad, offsets)
        transposed = rounded(weight.transpose(1, 2), WEIGHT[recipe.scaling], recipe)      # (E, in, out)
        grad_x = grouped(rounded(grad, tile, recipe, recipe.grad_dtype), transposed, offsets)
        x = dequantise(q, scale, *tile)
        grad_w = grouped_rows(rounded(grad.t(), tile, recipe, recipe.grad_dtype),
                              rounded(x.t(), tile, recipe), offsets)
        return grad_x.to(ctx.x_dtype), grad_w.to(weight.dtype), None, None


def without_idle_rows(x, offsets):
    """Rows beyond the last offset are nobody's and may hold anything: zeros, that they spoil no tile."""
    used = torch.arange(len(x), device=x.device) < offsets[-1]
    return torch.where(used.unsqueeze(1), x, 0.0)


def grouped(x, weight, offsets):
    with torch.autocast(x.device.type, enabled=False):
        return without_idle_rows(model_file.grouped_linear(x, weight, offsets), offsets)


@torch.compiler.disable
def grouped_rows(grad_t, x_t, offsets):
    """dW of each expert: grad_t (out, M), x_t (in, M) -> (E, out, in), each over its own rows."""
    ends = offsets.tolist()
    return torch.stack([grad_t[:, start:end] @ x_t[:, start:end].t() for start, end in zip([0, *ends], ends)])


class Linear(torch.nn.Linear):
    def forward(self, x):
        dtype = model_file.compute_dtype(x)
        y = LinearFunction.apply(x.flatten(0, -2), self.weight, self.recipe, dtype).unflatten(0, x.shape[:-1])
        return y if self.bias is None else y + self.bias.to(dtype)


class MoE(model_file.MoE):
    def grouped_linear(self, x, weight, offsets):
        return GroupedFunction.apply(x, weight, offsets, self.recipe)


def enable(model, recipe):
    """The linear layers and the experts of a GPT compute in FP8 from now on; its parameters stay what they are."""
    for name, module in model.named_modules():
        if type(module) is torch.nn.Linear and not name.endswith(('lm_head', 'mlp.gate')):
            module.__class__ = Linear
            module.recipe = recipe
        elif type(module) is model_file.MoE:
            module.__class__ = MoE
            module.recipe = recipe
