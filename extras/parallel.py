"""
A model over many ranks, with torch's own tools (DeviceMesh, FSDP2), for train.py's --shard and --expert_parallel.

The weights, their gradients and the optimizer's state are DTensors; each rank holds one shard of each. The model is
built without memory and then filled one tensor at a time, so that no rank ever holds the whole.
"""

import functools
import logging
import math
import warnings
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard

import model as model_file
from extras import architecture, dcp
from extras.dcp import Reader, load_optimizer, load_tensors, tensors_of
from model import Gather, Mistake, compute_dtype, first_line

try:  # private names: another torch may lack one
    import torch.distributed._functional_collectives as funcol
    from torch.distributed.fsdp._fully_shard._fsdp_common import ShardPlacementResult
    from torch.distributed.fsdp._fully_shard._fsdp_init import _get_mesh_info
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
    from torch.utils._pytree import tree_map_only
except ImportError as e:
    raise Mistake(f'shard and expert_parallel do not know torch {torch.__version__}: {first_line(e)}') from None

# a block returns the scores of its experts as a view, and no in-place operation changes them
warnings.filterwarnings('ignore', r'FSDP2-wrapped module \(FSDPBlock\) returned a view tensor')
# it advises every rank to merge collectives that do not merge in these meshes
logging.getLogger('torch.distributed.tensor._redistribute').setLevel(logging.ERROR)

# -----------------------------------------------------------------------------
# the layout


def check(config, world):
    """Mistake if train.py's settings contradict each other or the number of ranks (0: no torchrun)."""
    if world == 0:
        raise Mistake('shard and expert_parallel need several ranks: start them with torchrun')
    for name, value in (('fp8', True), ('dtype', 'float16')):
        if config[name] == value:
            raise Mistake(f'{name}={value} goes with neither shard nor expert_parallel')
    size, N = group_size(config['shard'], world), config['expert_parallel']
    for name, ranks in (('shard', size), ('expert_parallel', N)):
        if world % ranks != 0:
            raise Mistake(f'{name}={ranks}: {ranks} must divide the number of ranks, {world}')
    if size > N and size % N != 0:
        raise Mistake(f'expert_parallel={N} does not divide the {size} ranks that share the weights')


def group_size(shard, world):
    """The setting `shard` -> how many ranks share the weights: 1 is off, 0 is all."""
    return shard or world


class Layout(NamedTuple):
    """How a model is spread over the ranks. It builds and loads a sharded model by the same calls as GPT."""
    device: str
    dtype: str
    shard: int
    expert_parallel: int

    def __call__(self, config):
        return distribute(config, None, *self)

    def from_checkpoint(self, path, map_location=None, **overrides):
        """GPT.from_checkpoint() for ckpt.pt and ckpt.dcp; each rank reads what its shards need."""
        sharded = path.endswith('.dcp')
        with torch.device('meta'):
            source = dcp if sharded else architecture.of_file(path)[0]
            model, checkpoint = source.from_checkpoint(path, 'cpu', assign=True, **overrides)
        return distribute(model.config, path if sharded else model.state_dict(), *self), checkpoint

    def from_pretrained(self, folder, overrides=None):
        from extras import hf
        model, tensors = hf.open_model(folder, overrides, 'meta')
        return distribute(model.config, tensors, *self)


def layout(config, device):
    """train.py's settings -> Layout"""
    if config['dtype'] == 'float16':  # chosen for this GPU, not by a flag
        raise Mistake('shard and expert_parallel need bfloat16 or float32: say --dtype=float32')
    return Layout(device, config['dtype'], config['shard'], config['expert_parallel'])


def distribute(config, source, device, dtype, shard, expert_parallel):
    """The GPT on this rank's device, in shards, its weights filled from the source: see reader()."""
    with torch.device('meta'):
        model = architecture.of_config(config)(config)
    E, N, world, kind = config.n_routed_experts, expert_parallel, dist.get_world_size(), torch.device(device).type
    if N > 1 and (E == 0 or E % N != 0):
        raise Mistake(f'expert_parallel={N} does not divide the {E} routed experts of a layer')
    size = group_size(shard, world)
    mesh, shards = data_parallel(kind, replicate=world // size, shard=size), size
    if N > 1:
        shards = max(1, size // N)  # of an expert
        expert_mesh, spread = data_parallel(kind, replicate=world // N // shards, shard=shards, experts=N)
        expert_info = _get_mesh_info(expert_mesh)
        for moe in model.moe_layers():
            spread_experts(moe, spread)

    def place(p):
        """FSDP shards a layer's experts by expert. If the ranks do not divide the experts, shard each expert's rows."""
        if p.dim() < 3:
            return None
        mine, rows, _ = local(p).shape                                      # (E/N, out, in)
        cut = Shard(1 if mine % shards != 0 and rows % shards == 0 else 0)
        return ShardPlacementResult(cut, expert_info) if N > 1 else cut

    # blocks are gathered in the dtype that autocast multiplies in; embedding, head and the last norms, which are
    # gathered first and kept, stay in fp32 as in V3 section 3.3.1, and so does the residual stream
    low = MixedPrecisionPolicy(param_dtype=getattr(torch, dtype), reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.blocks():
        fully_shard(block, mesh=mesh, shard_placement_fn=place,
                    mp_policy=MixedPrecisionPolicy() if dtype == 'float32' else low)
    fully_shard(model, mesh=mesh)
    register_fsdp_forward_method(model, 'generate')
    model.to_empty(device=device)
    fill(model, source)
    return model


def data_parallel(kind, replicate, shard, experts=None):
    """FSDP's device mesh: (replicate, shard), or (shard,) for one replica. With `experts` it also returns the
    expert-parallel mesh of this rank, the innermost dimension, because these ranks exchange most and are neighbours.
    """
    sizes = {'replicate': replicate, 'shard': shard} | ({'experts': experts} if experts else {})
    mesh = init_device_mesh(kind, tuple(sizes.values()), mesh_dim_names=tuple(sizes))
    data = mesh['shard'] if replicate == 1 else mesh['replicate', 'shard']
    return (data, mesh['experts']) if experts else data


# -----------------------------------------------------------------------------
# expert parallelism

def spread_experts(moe, mesh):
    """Rank r of the mesh's N keeps experts r E/N .. (r + 1) E/N - 1. The layer is not filled yet."""
    for name in ('experts_gate_up', 'experts_down'):
        E, *sizes = getattr(moe, name).shape
        mine = torch.empty(E // mesh.size(), *sizes, device='meta')
        setattr(moe, name, nn.Parameter(DTensor.from_local(mine, mesh, [Shard(0)], run_check=False)))
    moe.routed = functools.partial(routed, moe, mesh.get_group())


@torch.compiler.disable
def routed(moe, group, x, gates, experts):
    """MoE.routed() for experts spread over a group (V3 section 3.2). x (n, C), gates, experts (n, K) -> (n, C)

    One all-to-all takes a token with its gate to each of its K experts; another brings their outputs back.
    """
    E, N, K = moe.config.n_routed_experts, group.size(), experts.size(1)
    expert, order = experts.flatten().sort(stable=True)                     # (n*K,): by expert, and so by rank
    token, position = order // K, torch.arange(len(order), device=x.device)
    place = torch.empty_like(order).scatter_(0, order, position).view(-1, K)
    load = expert.new_zeros(E).scatter_add_(0, expert, torch.ones_like(expert))
    sent = load.view(N, E // N)                                             # to each rank, for each of its experts
    came = travel(sent, None, None, group)                                  # (N, E/N): from each rank, for each of mine
    there, here = torch.stack((sent.sum(dim=1), came.sum(dim=1))).tolist()  # the one host sync: all-to-all asks for it

    x = travel(Gather.apply(x.to(compute_dtype(x)), token, place), there, here, group)        # (R, C)
    gates = travel(gates.flatten()[order], there, here, group)                                # (R,)
    R = len(x)
    mine = torch.arange(E // N, device=x.device).repeat(N).repeat_interleave(came.flatten(), output_size=R)
    if R == 0:  # a product without rows is refused; a row of zeros with gate 0 gives gradients of zero
        x, gates, mine = F.pad(x, (0, 0, 0, 1)), F.pad(gates, (0, 1)), mine.new_zeros(1)
    gate_up, down = (weights_of_all(w, N) for w in (moe.experts_gate_up, moe.experts_down))
    out = moe.experts_fn(x, gates.unsqueeze(1), mine.unsqueeze(1), gate_up, down,
                         moe.config.swiglu_limit)                                         # (R, C)
    return Gather.apply(travel(out[:R], here, there, group), place, token)                    # (n, C)


def travel(rows, there, here, group):
    """Exchange rows within a group: there[r] rows go to rank r, here[r] rows come from it; None: equal numbers."""
    return funcol.wait_tensor(funcol.all_to_all_single_autograd(rows.contiguous(), here, there, group))


def weights_of_all(w, N):
    """This rank's experts (E/N, out, in). FSDP averages their gradient over the ranks that hold the same experts. It
    does not know that the gradient is already a sum over the tokens of N ranks, so that sum is divided by N here.
    """
    w = w.to_local()
    if w.requires_grad:
        w.register_hook(lambda grad: grad / N)
    return w


# -----------------------------------------------------------------------------
# whole tensors into shards, and back

def piece(whole, like):
    """A view of the part of a whole tensor that this rank holds of the DTensor `like`."""
    if not isinstance(like, DTensor):
        return whole
    sizes, starts = compute_local_shape_and_global_offset(like.shape, like.device_mesh, like.placements)
    return whole[tuple(slice(start, start + size) for start, size in zip(starts, sizes))]


def local(x):
    return x.to_local() if isinstance(x, DTensor) else x


@torch.no_grad()
def fill(model, source):
    """Fill this rank's shards from a sharded checkpoint (its path), or by reader()."""
    for name, table in model.tables().items():
        model.get_buffer(name).copy_(table)
    if isinstance(source, str):
        load_tensors(Reader(source), {f'model.{name}': x.detach() for name, x in tensors_of(model).items()})
        return
    read = reader(model, source)
    for name, tensor in tensors_of(model).items():
        local(tensor).copy_(piece(read(name, tensor), tensor))


def reader(model, source):
    """-> read(name, tensor), the whole tensor of that name; only the part that this rank holds must be right.

    source: None, for the initial weights that one process draws with the same seed; the state dict of a whole model,
    mapped from its file; or the tensors of hf.open_model(), in Hugging Face's format.
    """
    if source is None:
        for module in model.modules():  # torch's own initial values are overwritten, but they advance the seed
            if isinstance(module, nn.Linear):
                nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
            elif isinstance(module, nn.Embedding):
                nn.Embedding(module.num_embeddings, module.embedding_dim)

    def read(name, tensor):
        if source is not None and isinstance(source.get(name), torch.Tensor):
            return source[name]
        whole = torch.zeros(tensor.shape)  # untouched pages use no memory
        if source is not None:
            read_rows(source, model.config, name, whole, piece(whole, tensor))
        elif not name.endswith('e_score_correction_bias'):  # b begins at 0
            model.initialise(name, whole.fill_(math.nan))
            if whole.isnan().any():
                raise Mistake(f'{name} has no initial value in shards: add it to GPT.initialise() in model.py')
        return whole

    return read


def read_rows(tensors, config, name, whole, mine):
    """Fill the rows of `whole` that reach into its part `mine` from the files of a Hugging Face folder."""
    from extras import hf
    if mine.numel() == 0:
        return
    begin = mine.storage_offset()
    end = begin + sum((size - 1) * stride for size, stride in zip(mine.shape, mine.stride())) + 1
    for part, view in hf.parts(config, name, whole):
        start, row = view.storage_offset(), view.stride(0)
        first, last = max(0, (begin - start) // row), min(len(view), -((start - end) // row))
        if first < last:
            view[first:last].copy_(hf.read(tensors, part)[first:last])


def optimizer_state(state, optimizer):
    """full optimizer state dict -> this rank's shards"""
    params = [p for group in optimizer.param_groups for p in group['params']]
    if 'folder' in state:
        return load_optimizer(state, params)

    def shard(p, value):
        if value.shape != p.shape:  # a step
            return value
        mine = torch.zeros_like(p, dtype=value.dtype)
        local(mine).copy_(piece(value, p))
        return mine

    return state | {'state': {i: {key: shard(params[i], value) for key, value in entries.items()}
                              for i, entries in state['state'].items()}}


@torch.no_grad()
def save_checkpoint(checkpoint, path, best_path=None):
    """model.save_checkpoint() for shards: all ranks gather whole tensors, rank 0 writes them."""
    def gather(x):
        full = x.full_tensor()
        return full.detach().cpu() if dist.get_rank() == 0 else None

    tied = checkpoint['model_args']['tie_word_embeddings']
    weights = {name: x for name, x in checkpoint['model'].items() if not (tied and name == 'lm_head.weight')}
    checkpoint = tree_map_only(DTensor, gather, checkpoint | {'model': weights})
    if dist.get_rank() > 0:
        return
    if tied:
        checkpoint['model']['lm_head.weight'] = checkpoint['model']['transformer.wte.weight']
    model_file.save_checkpoint(checkpoint, path, best_path)


# -----------------------------------------------------------------------------
# a step

@torch.no_grad()
def clip_grad_norm_(parameters, max_norm):
    """torch.nn.utils.clip_grad_norm_ for tensors of several meshes -> the whole gradient's norm, a plain tensor"""
    meshes = {}
    for p in parameters:
        if p.grad is not None:
            meshes.setdefault(p.grad.device_mesh, []).append(p.grad)
    norms = [torch.nn.utils.get_total_norm(grads).full_tensor() for grads in meshes.values()]
    norm = torch.linalg.vector_norm(torch.stack(norms))
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for grads in meshes.values():
        torch._foreach_mul_([grad.to_local() for grad in grads], scale)
    return norm
