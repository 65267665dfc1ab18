"""
Checks of a checkpoint. Before a script builds the model, the tensors must be those of the checkpoint's config. Before
it uses the weights, the bytes must be those that were written. Then train.py asks check_run() whether it can begin with
the checkpoint.

A .pt file is a zip file with the CRC-32 of each of its parts; a sharded checkpoint keeps its files' CRC-32 in rest.pt.
A data set's meta.pkl keeps the CRC-32 of its .bin files. Checking reads every byte once: 0.3 s for 1 GB from memory.
A safetensors file has no checksum: a changed weight is found only if it is not finite.
"""

import math
import os
import re
import zipfile
import zlib
from dataclasses import replace

import torch

from extras import architecture
from extras.folder import missing
from model import Mistake, first_line, is_out_of_memory

OTHER = '{} has another checksum than was written'
ADVICE = 'restore it from a copy, or take another checkpoint'


def check_checkpoint(path, model, checkpoint, max_over_ranks=int):
    """Mistake if the file or folder at `path` has changed since it was written, or if a weight is not finite."""
    changed = changed_part(path, checkpoint)
    if max_over_ranks(changed != ''):
        raise Mistake(f'{path} is damaged: {changed or OTHER.format("a part")}: {ADVICE}')
    check_finite(path, model.state_dict(), max_over_ranks)


def check_run(init_from, path, checkpoint, config, max_over_ranks):
    """For train.py: Mistake if it cannot begin with the checkpoint at `path`. Says where the run begins, if it may
    surprise.
    """
    number, best, meta = (checkpoint.get(key) for key in ('iter_num', 'best_val_loss', 'meta'))
    out_dir, resume = os.path.dirname(path), init_from == 'resume'
    seen, loss, name = (checkpoint.get(key) for key in ('micro_batches', 'val_loss', 'wandb_id'))
    known = (type(number), type(best), type(meta or {})) == (int, float, dict) and number >= 0
    if not known or type(seen or 0) is not int or (seen or 0) < 0 or type(loss or 0.0) is not float or \
            type(name or '') is not str:
        raise Mistake(f'{path} is no checkpoint of a run: one of iter_num, best_val_loss, micro_batches, val_loss, '
                      'wandb_id and meta has a wrong type or is negative')
    if max_over_ranks(number) != -max_over_ranks(-number):
        raise Mistake(f'the ranks hold checkpoints of different iterations: {out_dir} must be one folder for all')
    if resume and 'seconds' in checkpoint:  # only grpo.py saves them
        raise Mistake(f'{path} was written by grpo.py: begin with --init_from={out_dir} and another out_dir')
    # of model_v4.py: whether there is an indexer, and whether it alone has learned
    topk, warmup = (checkpoint['model_args'].get(name, 0) for name in ('index_topk', 'index_warmup'))
    for name, was, now in (('index_topk', topk, topk or config.get('index_topk', 0)),
                           ('index_warmup', warmup, config.get('index_warmup', warmup))):
        if resume and bool(now) != bool(was):
            raise Mistake(f'{path} was trained with {name}={was}: resume with --{name}={was}, or begin another run '
                          f'with --init_from={out_dir} and another out_dir')
    if warmup and 'index_warmup' not in config:
        raise Mistake(f"{path} is of an indexer's warm-up: add --architecture=model_v4 to train the whole model")
    if os.environ.get('RANK', '0') != '0':
        return
    if not resume:
        print(f'beginning with the weights of {path}, iteration {number}')
    elif number >= config['max_iters'] and not config['eval_only']:
        print(f'note: {path} has all {number} iterations: to train on, raise max_iters={config["max_iters"]}')


def check_path(init_from, path, overrides, max_over_ranks, GPT):
    """For train.py. Mistake on all ranks if a machine lacks the checkpoint: the others would wait long for it.
    -> the GPT of the checkpoint's architecture, unless the run's GPT is another than model.py's
    """
    if init_from == 'scratch' or init_from != 'resume' and not os.path.exists(path):
        return GPT
    here, absent = max_over_ranks(os.path.exists(path)), max_over_ranks(not os.path.exists(path))
    if here and absent:
        raise Mistake(f'{path} is missing on some machines: {os.path.dirname(path)} must be one folder for all of them')
    if absent:
        raise Mistake(missing(path))
    whole = path.endswith('.pt')
    found = architecture.of_config(check_sizes(path, **overrides)) if whole else architecture.of_file(path)[0]
    return found if GPT is architecture.named('model')[0] else GPT


def check_context(path, config):
    """Mistake if the tables of cos and sin alone would take gigabytes. No weight has the context's size."""
    if config.block_size * config.qk_rope_head_dim > 2**27:  # a million tokens of V3's 64, and twice as many
        raise Mistake(f'{path}: a context of {config.block_size:,} tokens is too long for RoPE over '
                      f'{config.qk_rope_head_dim} numbers: their product may be {2**27:,}')


def check_sizes(path, **overrides):
    """Mistake if the config of the .pt file at `path` asks for another model than its tensors make. Call it before that
    model is built. overrides: as in GPT.from_checkpoint(). -> the config
    """
    try:
        check_stored(path)
        found = torch.load(path, map_location='meta', weights_only=True, mmap=True)
        tensors = {name.removeprefix('_orig_mod.'): x for name, x in found['model'].items()}
        config = architecture.of_args(found['model_args'])[1](**found['model_args'])
        if 'transformer.wpe.weight' not in tensors:  # nanoGPT's, of which from_checkpoint() tells
            check_tensors(config, tensors, os.path.getsize(path))
    except zipfile.BadZipFile:
        raise Mistake(f'{path} is damaged or cut short, or is no checkpoint of this model: {ADVICE}') from None
    except Exception as e:  # damaged, or another program's
        if is_out_of_memory(e):
            raise
        raise Mistake(f'{path} is no checkpoint of this model: {type(e).__name__}: {first_line(e)}') from None
    # the run's architecture may have more fields than the checkpoint's
    check_context(path, replace(config, **{name: x for name, x in overrides.items() if hasattr(config, name)}))
    return config


def check_memory(settings, ranks):
    """Mistake if weights, gradients and AdamW's moments of the model that train.py's settings ask for take more than
    this machine's memory. The system would not refuse them: it would stop every program, and then kill one.
    """
    GPT, GPTConfig = architecture.named(settings['architecture'])
    fields = {name: settings[name] for name in GPTConfig.__dataclass_fields__ if name in settings}
    config = GPTConfig(**fields | {'vocab_size': settings['vocab_size'] or 64})
    there = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') if hasattr(os, 'sysconf') else math.inf
    blocks = config.n_layer + config.num_nextn_predict_layers * config.mtp_n_layer
    if ranks * blocks * 10 ** 5 > there:  # bytes of a block's Python objects, at least
        raise Mistake(f'{blocks:,} blocks do not fit in the {there / 1e9:,.0f} GB of this machine: choose fewer')
    if 16 * ranks * blocks * 600 * config.n_embd ** 2 < there:
        return  # a block has fewer than 600 matrices of C x C: counting them would take a second of the start
    with torch.device('meta'):
        n = GPT(config).get_num_params(non_embedding=False)
    if 16 * n * ranks > there:
        each = f' on each of {ranks} ranks' if ranks > 1 else ''
        raise Mistake(f'{n / 1e9:,.1f}B parameters need {16 * n / 1e9:,.0f} GB for weights, gradients and moments{each}'
                      f', and this machine has {there / 1e9:,.0f} GB: choose a smaller n_embd or n_layer')


def check_stored(path):
    """ValueError if a .pt file is a pipe, which never answers, or compressed, so that a little becomes a lot."""
    if not os.path.isfile(path):
        raise ValueError('it is no regular file')
    with zipfile.ZipFile(path) as file:
        if any(part.compress_type != zipfile.ZIP_STORED for part in file.infolist()):
            raise ValueError('its parts are compressed, as torch never writes them')


def check_tensors(config, tensors, size):
    """ValueError if the tensors, of `size` bytes together, are not those of a model of this config."""
    D = config.num_nextn_predict_layers
    for there, asked, what in ((r'transformer\.h\.(\d+)\.', config.n_layer, 'n_layer'),
                               (r'mtp\.(\d+)\.', D, 'num_nextn_predict_layers'),
                               (r'mtp\.0\.h\.(\d+)\.', config.mtp_n_layer if D else 0, 'mtp_n_layer')):
        n = len({m[1] for m in (re.match(there, name) for name in tensors) if m})
        if n != asked:
            raise ValueError(f'{what}={asked}, and there are weights for {n}')
    with torch.device('meta'):
        wanted = architecture.of_config(config)(config).state_dict()
    for name in wanted:
        if name not in tensors or tensors[name].shape != wanted[name].shape:
            raise ValueError(f'{name} has the shape {list(tensors[name].shape) if name in tensors else None}, '
                             f'and the config asks for {list(wanted[name].shape)}')
    tied = {'transformer.wte.weight'} if config.tie_word_embeddings else set()
    needed = sum(x.numel() * tensors[name].itemsize for name, x in wanted.items() if name not in tied)
    if needed > size:
        raise ValueError(f'its weights are {needed:,} bytes, and it has {size:,}')


def check_finite(path, state, max_over_ranks=int):
    """Mistake if a weight of the state dict, which `path` holds, is not finite."""
    if max_over_ranks(not all_finite(state)):
        raise Mistake(f'{path} holds weights that are not finite: {ADVICE}')


def all_finite(state):
    tensors = [x.to_local() if hasattr(x, 'to_local') else x for x in state.values()]
    ends = [end.float() for x in tensors if x.numel() for end in x.aminmax()]  # nan if there is one
    return not ends or bool(torch.stack(ends).isfinite().all())  # a rank may hold no rows of any tensor


def changed_part(path, checkpoint):
    """In words, the first part of the file or folder that is not as it was written; an empty text if all are. The ranks
    share the files of shards; the first rank reads the rest.
    """
    rank, world = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
    try:
        if isinstance(checkpoint.get('crc32'), dict):
            there = os.listdir(path)  # perhaps with a file of another program, which nothing reads
            for name, crc32 in sorted(checkpoint['crc32'].items())[rank::world]:
                if name not in there or crc32_of(os.path.join(path, name)) != crc32:
                    return OTHER.format(name)
        if rank > 0:
            return ''
        with zipfile.ZipFile(os.path.join(path, 'rest.pt') if os.path.isdir(path) else path) as file:
            name = file.testzip()
            return OTHER.format(name) if name else ''
    except Exception as e:  # a damaged table of contents raises many kinds; the other ranks must learn of it
        return f'{type(e).__name__}: {first_line(e)}'


def as_prepared(path, meta):
    """True if a data set's file has the CRC-32 that its meta.pkl keeps of it, if it keeps one. The first rank asks."""
    kept = meta.get('crc32', {}).get(os.path.basename(path))
    return kept is None or os.environ.get('RANK', '0') != '0' or os.path.exists(path) and crc32_of(path) == kept


def crc32_of(path):
    crc32 = 0
    with open(path, 'rb') as f:
        while block := f.read(1 << 20):
            crc32 = zlib.crc32(block, crc32)
    return crc32
