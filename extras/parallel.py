"""
A model over many ranks, by torch's own engine (DeviceMesh, FSDP2): what train.py's --shard and --expert_parallel ask for.

The weights, their gradients and the optimizer's state are DTensors, of which each rank holds a shard. The model is built
without memory and then filled one tensor at a time, so that no rank ever holds the whole.
"""

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.utils._pytree import tree_map_only

from model import GPT, rope_table

# -----------------------------------------------------------------------------
# the layout


def group_size(shard, world):
    """The flag --shard -> the number of ranks that share the weights: 1 where it is off. ValueError if it does not fit."""
    size = {'': 1, 'False': 1, 'True': world}.get(shard) or int(shard)
    if world % size != 0:
        raise ValueError(f'shard={shard}: groups of {size} do not fit the {world} ranks')
    return size


def distribute(config, source, device, dtype, shard):
    """The GPT on this rank's device, in shards, its weights filled from the source: see reader()."""
    with torch.device('meta'):
        made = GPT(config)
    world, kind = dist.get_world_size(), torch.device(device).type
    size = group_size(shard, world)
    mesh = data_parallel(init_device_mesh(kind, (world // size, size), mesh_dim_names=('replicate', 'shard')))
    # blocks are gathered in the dtype that autocast multiplies in; embedding, head and the last norms, which are
    # gathered first and kept, stay in fp32 as in V3 section 3.3.1, and so does the residual stream
    low = MixedPrecisionPolicy(param_dtype=getattr(torch, dtype), reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in made.blocks():
        fully_shard(block, mesh=mesh, mp_policy=MixedPrecisionPolicy() if dtype == 'float32' else low)
    fully_shard(made, mesh=mesh)
    register_fsdp_forward_method(made, 'generate')
    made.to_empty(device=device)
    fill(made, reader(made, source))
    return made


def data_parallel(mesh):
    """The dimensions of a mesh over which data are split, in FSDP's form: without a `replicate` of one rank."""
    return mesh['shard'] if mesh['replicate'].size() == 1 else mesh['replicate', 'shard']


# -----------------------------------------------------------------------------
# whole tensors into shards, and back

def piece(whole, like):
    """The part of a whole tensor that this rank's shard of the DTensor `like` holds: a view."""
    if not isinstance(like, DTensor):
        return whole
    sizes, starts = compute_local_shape_and_global_offset(like.shape, like.device_mesh, like.placements)
    return whole[tuple(slice(start, start + size) for start, size in zip(starts, sizes))]


def local(x):
    return x.to_local() if isinstance(x, DTensor) else x


@torch.no_grad()
def fill(model, read):
    """Each rank's shards; read(name, tensor): the whole tensor of that name, right at least where `tensor` has a shard."""
    for buffer, table in zip((model.rope_cos, model.rope_sin), rope_table(model.config)):
        buffer.copy_(table)
    biases = [(name, b) for name, b in model.named_buffers() if name.endswith('e_score_correction_bias')]
    for name, tensor in [*model.named_parameters(), *biases]:
        local(tensor).copy_(piece(read(name, tensor), tensor))


def reader(model, source):
    """read() of fill(). source: None, for the initial weights that one process draws with the same seed; the state dict of a
    whole model, best mapped from its file; or an opened folder in Hugging Face's format, convert.open_folder()'s tensors.
    """
    if source is None:
        for module in model.modules():  # what its layers draw for themselves is written over, and yet drawn
            if isinstance(module, nn.Linear):
                nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
            elif isinstance(module, nn.Embedding):
                nn.Embedding(module.num_embeddings, module.embedding_dim)

    def read(name, tensor):
        if source is not None and name in source:
            return source[name]
        import convert  # not needed for other sources
        whole = torch.zeros(tensor.shape)  # pages that nobody writes take no memory
        if source is None:
            if isinstance(tensor, nn.Parameter):
                model.initialise(name, whole)
            return whole
        mine = piece(whole, tensor)
        begin = mine.storage_offset()
        end = begin + sum((size - 1) * stride for size, stride in zip(mine.shape, mine.stride())) + 1
        for part, view in convert.parts(model.config, name, whole):
            if mine.numel() > 0 and view.storage_offset() < end and begin < view.storage_offset() + view.numel():
                view.copy_(convert.read(source, part))
        return whole

    return read


def shards(state, optimizer):
    """The state dict of a whole optimizer -> that of this rank's shards."""
    params = [p for group in optimizer.param_groups for p in group['params']]

    def shard(p, value):
        if not isinstance(value, torch.Tensor) or value.shape != p.shape:
            return value
        mine = torch.zeros_like(p, dtype=value.dtype)
        local(mine).copy_(piece(value, p))
        return mine

    return state | {'state': {i: {key: shard(params[i], value) for key, value in entries.items()}
                              for i, entries in state['state'].items()}}


@torch.no_grad()
def whole(state):
    """A state dict whose DTensors are whole tensors in rank 0's memory, and None on other ranks. All ranks take part."""
    gathered = {}

    def gather(x):
        if id(x) not in gathered:  # the tied embedding has two names
            full = x.full_tensor()
            gathered[id(x)] = full.detach().cpu() if dist.get_rank() == 0 else None
        return gathered[id(x)]

    return tree_map_only(DTensor, gather, state)


# -----------------------------------------------------------------------------
# a step

@torch.no_grad()
def clip_grad_norm_(parameters, max_norm):
    """torch.nn.utils.clip_grad_norm_ over tensors of several meshes: the norm of the whole gradient, a plain tensor."""
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
