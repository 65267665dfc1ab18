"""
Triton kernels for GPUs: the experts' grouped products where torch's own wait for the host, and the loss of a row.

torch's grouped_mm is one kernel in bf16 on compute capability 9.0 and 10.0. Elsewhere (A100, RTX 30 and 40, L4) it
copies the offsets to the host and loops over the experts. Here the host never learns how many rows an expert has: a
kernel is launched for as many tiles of rows as there can be at most, and each tile finds its expert from the offsets.

The first product gathers its rows as it reads them, so that no copy of each token for each of its experts is kept for
the backward pass (ScatterMoE, arXiv 2403.08245).

Letters: M rows, E experts, K the contraction and N the width of a product's result.
"""

import torch
import triton
import triton.language as tl

import model as model_file
from model import Combine, compute_dtype, first_line, has_grouped_kernel


@triton.jit
def rows_of_tile(offsets, tile, E: tl.constexpr, E2: tl.constexpr, BLOCK_M: tl.constexpr):
    """Of the tile-th tile of rows: its expert (E where there is none), its first row, and where the expert's rows end.

    Each expert has as many tiles as its rows fill. E2: E, rounded up to a power of two.
    """
    e = tl.arange(0, E2)
    end = tl.load(offsets + e, mask=e < E, other=0)
    start = tl.load(offsets + e - 1, mask=(e > 0) & (e < E), other=0)
    tiles = tl.where(e < E, (end - start + BLOCK_M - 1) // BLOCK_M, 0)
    tiles_up_to = tl.cumsum(tiles, 0)
    expert = tl.sum(((tiles_up_to <= tile) & (e < E)).to(tl.int32), 0)
    mine = e == expert
    first = tl.sum(tl.where(mine, start + (tile - tiles_up_to + tiles) * BLOCK_M, 0), 0)
    return expert, first, tl.sum(tl.where(mine, end, 0), 0)


@triton.jit
def product_kernel(x, token, w, y, offsets, N, K, stride_we, stride_wn, stride_wk, GATHER: tl.constexpr,
                   E: tl.constexpr, E2: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                   BLOCK_K: tl.constexpr, PRECISION: tl.constexpr):
    """y[m, n] = sum_k x[m, k] w[e, n, k] for one tile of rows of an expert e; x[token[m]] where GATHER."""
    columns = tl.cdiv(N, BLOCK_N)
    expert, first, end = rows_of_tile(offsets, tl.program_id(0) // columns, E, E2, BLOCK_M)
    if expert < E:
        m = first + tl.arange(0, BLOCK_M)
        n = (tl.program_id(0) % columns) * BLOCK_N + tl.arange(0, BLOCK_N)
        k = tl.arange(0, BLOCK_K)
        row = tl.load(token + m, mask=m < end, other=0) if GATHER else m
        x_tile = x + row.to(tl.int64)[:, None] * K + k[None, :]
        w_tile = w + expert.to(tl.int64) * stride_we + n[None, :] * stride_wn + k[:, None] * stride_wk
        total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for done in range(0, K, BLOCK_K):
            a = tl.load(x_tile + done, mask=(m[:, None] < end) & (k[None, :] + done < K), other=0.0)
            b = tl.load(w_tile + done * stride_wk, mask=(n[None, :] < N) & (k[:, None] + done < K), other=0.0)
            total = tl.dot(a, b, total, input_precision=PRECISION)
        y_tile = y + m.to(tl.int64)[:, None] * N + n[None, :]
        tl.store(y_tile, total.to(y.dtype.element_ty), mask=(m[:, None] < end) & (n[None, :] < N))


@triton.jit
def weight_grad_kernel(dy, x, token, dw, offsets, N, K, GATHER: tl.constexpr, BLOCK_M: tl.constexpr,
                       BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr):
    """dw[e, n, k] = sum_m dy[m, n] x[m, k] over the rows m of an expert e; x[token[m]] where GATHER."""
    columns = tl.cdiv(K, BLOCK_K)
    expert = tl.program_id(1)
    start = tl.load(offsets + expert - 1, mask=expert > 0, other=0)
    end = tl.load(offsets + expert)
    n = (tl.program_id(0) // columns) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = (tl.program_id(0) % columns) * BLOCK_K + tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    for first in range(start, end, BLOCK_M):
        m = first + tl.arange(0, BLOCK_M)
        row = tl.load(token + m, mask=m < end, other=0) if GATHER else m
        a = tl.load(dy + m.to(tl.int64)[None, :] * N + n[:, None], mask=(m[None, :] < end) & (n[:, None] < N),
                    other=0.0)
        b = tl.load(x + row.to(tl.int64)[:, None] * K + k[None, :], mask=(m[:, None] < end) & (k[None, :] < K),
                    other=0.0)
        total = tl.dot(a, b, total, input_precision=PRECISION)
    dw_tile = dw + expert.to(tl.int64) * N * K + n[:, None] * K + k[None, :]
    tl.store(dw_tile, total.to(dw.dtype.element_ty), mask=(n[:, None] < N) & (k[None, :] < K))


def precision(dtype):
    """Of fp32 products, as torch's own; it does not matter for 16 bits."""
    return 'tf32' if dtype != torch.float32 or torch.backends.cuda.matmul.allow_tf32 else 'ieee'


def tile_sizes(dtype):
    """Of rows, of the result and of the contraction. In every case at most 96 KiB of shared memory."""
    return (128, 128, 32) if dtype.itemsize == 2 else (64, 32, 32)


def product(x, weight, offsets, token=None):
    """x (M, K) times weight (E, N, K), which may have any strides. -> (M, N)

    With token (M,), x is (tokens, K), and row m is x[token[m]]. Rows offsets[e-1]..offsets[e] meet weight[e]. What
    those beyond the last offset become is not defined.
    """
    M = len(x if token is None else token)
    E, N, K = weight.shape
    block_m, block_n, block_k = tile_sizes(x.dtype)
    y = x.new_empty(M, N)
    grid = ((triton.cdiv(M, block_m) + E) * triton.cdiv(N, block_n),)
    product_kernel[grid](x, x if token is None else token, weight, y, offsets, N, K, *weight.stride(),
                         token is not None, E, triton.next_power_of_2(E), block_m, block_n, block_k,
                         precision(x.dtype), num_warps=4, num_stages=3)
    return y


def weight_grad(dy, x, offsets, token=None):
    """dy (M, N), and x as in product() -> (E, N, K): dy^T x over the rows of each expert."""
    N, K, E = dy.size(1), x.size(1), len(offsets)
    block_n, block_k, block_m = tile_sizes(x.dtype)  # the rows are the contraction
    dw = x.new_empty(E, N, K)
    grid = (triton.cdiv(N, block_n) * triton.cdiv(K, block_k), E)
    weight_grad_kernel[grid](dy, x, x if token is None else token, dw, offsets, N, K, token is not None, block_m,
                             block_n, block_k, precision(x.dtype), num_warps=4, num_stages=3)
    return dw


class GroupedLinear(torch.autograd.Function):
    """Rows offsets[e-1]..offsets[e] of x (M, in) times weight[e] of (E, out, in), transposed. -> (M, out)"""

    @staticmethod
    def forward(ctx, x, weight, offsets):
        ctx.save_for_backward(x, weight, offsets)
        return product(x, weight, offsets)

    @staticmethod
    def backward(ctx, grad):
        x, weight, offsets = ctx.saved_tensors
        grad = grad.contiguous()
        return product(grad, weight.transpose(1, 2), offsets), weight_grad(grad, x, offsets), None


class DispatchLinear(torch.autograd.Function):
    """The same of the rows x[token]: x (tokens, in), token (M,); place (tokens, chosen): each token's rows."""

    @staticmethod
    def forward(ctx, x, weight, offsets, token, place):
        ctx.save_for_backward(x, weight, offsets, token, place)
        return product(x, weight, offsets, token)

    @staticmethod
    def backward(ctx, grad):
        x, weight, offsets, token, place = ctx.saved_tensors
        grad = grad.contiguous()
        grad_x = Combine.apply(product(grad, weight.transpose(1, 2), offsets), token, place)
        return grad_x, weight_grad(grad, x, offsets, token), None, None, None


def grouped_linear(x, weight, offsets):
    """model.grouped_linear()"""
    if has_grouped_kernel(x.device, x.dtype):
        return model_file.grouped_linear(x, weight, offsets)
    return GroupedLinear.apply(x.contiguous(), weight.to(x.dtype), offsets)


def dispatch_linear(x, weight, rows):
    """model.dispatch_linear()"""
    dtype = compute_dtype(x)
    if has_grouped_kernel(x.device, dtype):
        return model_file.dispatch_linear(x, weight, rows)
    return DispatchLinear.apply(x.to(dtype).contiguous(), weight.to(dtype), rows.offsets, rows.token, rows.place)


LOSS_BLOCK = 2048  # logits at a time


@triton.jit
def loss_kernel(logits, target, row_weight, loss, V, BLOCK: tl.constexpr):
    """One row of cross_entropy_rows(). It is read twice, and the second time mostly from a cache."""
    row = tl.program_id(0).to(tl.int64)
    z = logits + row * V
    label = tl.maximum(tl.load(target + row), 0)
    weight = tl.load(row_weight + row)
    # read before any thread writes there: the reductions below wait for all of them. A wrong label makes the loss nan
    at_label = tl.load(z + label, mask=label < V, other=float('nan')).to(tl.float32)
    # each lane keeps its largest logit, and the sum of exp(logit - largest)
    largest = tl.full((BLOCK,), -1e30, dtype=tl.float32)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for first in range(0, V, BLOCK):
        v = first + tl.arange(0, BLOCK)
        x = tl.load(z + v, mask=v < V, other=float('-inf')).to(tl.float32)
        new = tl.maximum(largest, x)
        total = total * tl.exp(largest - new) + tl.exp(x - new)
        largest = new
    peak = tl.max(largest, 0)
    lse = peak + tl.log(tl.sum(total * tl.exp(largest - peak), 0))
    log_p = at_label - lse
    tl.store(loss + row, -log_p)
    for first in range(0, V, BLOCK):
        v = first + tl.arange(0, BLOCK)
        p = tl.exp(tl.load(z + v, mask=v < V, other=float('-inf')).to(tl.float32) - lse)
        tl.store(z + v, ((p - (v == label)) * weight).to(logits.dtype.element_ty), mask=v < V)


def cross_entropy_rows(logits, target, row_weight):
    """model.cross_entropy_rows(), in one kernel; at the target p - 1 is a plain difference."""
    n, V = logits.shape
    loss = torch.empty(n, dtype=torch.float32, device=logits.device)
    loss_kernel[(n,)](logits, target.contiguous(), row_weight.contiguous(), loss, V, LOSS_BLOCK, num_warps=8)
    return loss


def enable(model):
    """From now on the experts of a GPT and its loss use these kernels. Returns why they cannot, or ''."""
    device = model.lm_head.weight.device
    if torch.cuda.get_device_capability(device) < (8, 0):
        return 'Triton has no tensor-core products there'
    torch.cuda.set_device(device)  # where Triton launches, wherever the tensors are
    fault = fault_of_kernels(model)
    if not fault:
        model.rows_fn = model.plain_rows_fn = cross_entropy_rows
        for moe in model.moe_layers():
            moe.dispatch_linear, moe.grouped_linear, moe.kernels = dispatch_linear, grouped_linear, True
    return fault


@torch.no_grad()
def fault_of_kernels(model):
    """Why the kernels cannot be used on this model's device; '' where they give what torch does.

    Triton compiles them for the alignment of their sizes, so the sizes are the model's.
    """
    config, device = model.config, model.lm_head.weight.device
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator, device=device)

    C, h = config.n_embd, config.moe_intermediate_size
    ends = [0, 0, 150, 151, 200]  # of the rows of four experts; the first has none
    offsets = torch.tensor(ends[1:], dtype=torch.int32, device=device)
    parts = list(zip(range(4), ends, ends[1:]))
    token = torch.randperm(200, generator=generator, device=device)
    target, weight = torch.arange(9, device=device) * (config.vocab_size - 1) // 8, normal(9)
    try:
        for dtype in (torch.float32, torch.bfloat16):
            x, up, hidden, down, logits = (a.to(dtype) for a in (
                normal(200, C), normal(4, 2 * h, C), normal(200, h), normal(4, C, h), normal(9, config.vocab_size)))
            dy, rows = normal(200, 2 * h).to(dtype), x[token]
            pairs = [('product', product(x, up, offsets, token),
                      torch.cat([rows[a:b] @ up[e].t() for e, a, b in parts])),
                     ('product', product(hidden, down, offsets),
                      torch.cat([hidden[a:b] @ down[e].t() for e, a, b in parts])),
                     ('gradient', product(dy, up.transpose(1, 2), offsets),
                      torch.cat([dy[a:b] @ up[e] for e, a, b in parts])),
                     ('gradient', weight_grad(dy, x, offsets, token),
                      torch.stack([dy[a:b].t() @ rows[a:b] for e, a, b in parts])),
                     ('gradient', weight_grad(x, hidden, offsets),
                      torch.stack([x[a:b].t() @ hidden[a:b] for e, a, b in parts]))]
            ours, torchs = logits.clone(), logits.clone()
            pairs += [('loss', cross_entropy_rows(ours, target, weight),
                       model_file.cross_entropy_rows(torchs, target, weight)), ("loss's gradient", ours, torchs)]
            for name, ours, torchs in pairs:
                if not (ours.float() - torchs.float()).norm() <= 0.02 * torchs.float().norm():
                    return f'they give another {name} in {dtype}'
    except Exception as e:  # no compiler for Triton's launchers, a kernel that does not fit this GPU
        return f'{type(e).__name__}: {first_line(e)}'
    return ''
