"""
What a config costs, without building its model: parameters, FLOPs, cache, and an estimate of the memory of training.

The model is built of torch's fake tensors: they have shapes and no numbers, so 671B parameters need no memory. The
settings are train.py's, and so are its config files and flags.
"""

import dataclasses
import os
import sys

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from extras import architecture, guard
from model import Mistake, first_line, load_meta


def read_settings(root):
    """train.py's settings with the config files and flags of the command line -> {name: value}"""
    settings = {'__name__': '__main__', '__file__': os.path.join(root, 'train.py')}
    for name, end in (('train.py', '\nconfig_keys'), ('configurator.py', None)):
        with open(os.path.join(root, name), encoding='utf-8') as f:
            source = f.read()
        exec(compile(source.partition(end)[0] if end else source, name, 'exec'), settings)
    return settings


def config_of(settings, root):
    """-> the GPT and the config that train.py builds from scratch with these settings, and with the data if prepared"""
    GPT, GPTConfig = architecture.named(settings['architecture'])
    meta = load_meta(os.path.join(root, 'data', settings['dataset'], 'meta.pkl'))
    vocab_size = settings['vocab_size'] or meta.get('vocab_size', 50304)
    fields = {field.name: settings[field.name] for field in dataclasses.fields(GPTConfig)}
    config = GPTConfig(**fields | {'vocab_size': vocab_size})
    if not (meta or settings['vocab_size']):
        print(f"note: data/{settings['dataset']} is not prepared: GPT-2's vocabulary is assumed, or set --vocab_size",
              file=sys.stderr)
    return GPT, config


def cache_bytes(model):
    """-> bytes in bf16 that the main blocks' caches grow by with each token, and that they hold besides (rings)"""
    length = model.config.block_size
    with torch.autocast('cpu', torch.bfloat16):
        long, short = (sum(x.nbytes for x in tree_leaves(model.make_cache(1, n))) for n in (2 * length, length))
    return (long - short) / length, 2 * short - long


def saved_bytes(model):
    """What a forward pass of one sequence keeps for the backward under bf16 autocast, with the loss's gradients, but
    without the weights and autocast's copies of them.
    """
    saved = {}  # the tensors themselves: alive, no two storages have one address

    def keep(x):
        saved[x.untyped_storage()._cdata] = x
        return x

    idx = torch.zeros(1, model.config.block_size, dtype=torch.long)
    with torch.autocast('cpu', torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        model.train()(idx, idx)
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    sizes = {2 * p.numel() for p in model.parameters() if p.dim() > 1}
    return sum(x.untyped_storage().nbytes() for address, x in saved.items()
               if address not in weights and not (x.dtype == torch.bfloat16 and x.untyped_storage().nbytes() in sizes))


def training_bytes(model, settings):
    """{part: bytes} of a training step on one device, in eager mode."""
    n, blocks = model.get_num_params(non_embedding=False), model.blocks()
    matrices = sum(p.numel() for block in blocks for p in block.parameters() if p.dim() > 1)
    moments = 2 * n * (2 if settings['bf16_moments'] else 4)
    if settings['optimizer'] != 'adamw':
        moments = 4 * (2 * n - matrices)  # one moment for the blocks' matrices
    saved = settings['batch_size'] * saved_bytes(model)
    if settings['recompute']:  # each block's fp32 input, and one block's tensors at a time
        rows = settings['batch_size'] * model.config.block_size
        saved = saved / len(blocks) + 4 * rows * model.config.n_embd * len(blocks)
    vocab, head = model.config.vocab_size, model.lm_head.weight.numel()
    copies = 2 * n / (len(blocks) if settings['recompute'] else 1)
    # 2,048 rows of logits in bf16, 512 of them twice in fp32, and the head's gradient
    loss = vocab * (2048 * 2 + 512 * 2 * 4) + 4 * head
    return {'weights': 4 * n, 'gradients': 4 * n, "optimizer's state": moments, 'bf16 copies': copies,
            'activations': saved, 'loss': loss}


def measure(settings, root, memory=True):
    """-> {name: number} of the config with these settings. memory: of training too, which takes longest"""
    guard.check_ranges(settings, [('batch_size', lambda x: 1 <= x <= 2**20, 'lie in 1..2**20')])
    GPT, config = config_of(settings, root)
    with FakeTensorMode():
        try:
            model = GPT(config)
        except RuntimeError as e:  # numbers beyond 64 bits
            raise Mistake(f'no model has these sizes: {first_line(e)}') from None
        whole, inner = model.get_num_params(non_embedding=False), model.get_num_params()
        found = {'parameters': whole, 'without embedding and head': inner,
                 'active parameters': model.get_num_active_params() + whole - inner,
                 'FLOPs a token, training': model.flops_per_token()}
        found['cache bytes a token'], found['cache bytes besides'] = cache_bytes(model)
        if memory:
            found['training'] = training_bytes(model, settings)
    return found | {'settings': {name: settings[name] for name in ('batch_size', 'recompute', 'optimizer')},
                    'block_size': config.block_size}


def big(n):
    """1234567 -> '1.23M'"""
    unit, size = next((u, s) for u, s in (('T', 1e12), ('G', 1e9), ('M', 1e6), ('', 1)) if n >= s or s == 1)
    return f'{n / size:,.{2 if unit else 0}f}{unit}'


def cached(found):
    besides = f', and {found["cache bytes besides"]:,.0f} besides' if found['cache bytes besides'] else ''
    return f'{found["cache bytes a token"]:,.0f}{besides}'


def table(found):
    rows = [(name, big(found[name])) for name in ('parameters', 'without embedding and head', 'active parameters',
                                                   'FLOPs a token, training')]
    rows.append(('cache bytes a token, bf16', cached(found)))
    parts = found['training']
    rows.append((f'training memory, {found["settings"]["batch_size"]} x {found["block_size"]:,} tokens',
                 f'about {big(sum(parts.values()))}B on one device, uncompiled:'))
    rows += [('  ' + name, big(size) + 'B') for name, size in parts.items()]
    width = max(len(name) for name, _ in rows)
    return '\n'.join(f'{name:<{width}}  {value}' for name, value in rows)
