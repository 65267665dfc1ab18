"""
Are a checkpoint's bytes those that were written? Each script asks when it has opened one, before it uses the weights.

Then train.py asks check_run() whether it can begin with it.
A .pt file is a zip file with the CRC-32 of each of its parts; a sharded checkpoint keeps its files' CRC-32 in rest.pt.
A data set's meta.pkl keeps the CRC-32 of its .bin files. Checking reads every byte once: 0.3 s for 1 GB from memory.
A safetensors file has no checksum: a changed weight is found only if it is not finite.
"""

import os
import zipfile
import zlib

import torch

from model import Mistake, first_line

OTHER = '{} has another checksum than was written'
ADVICE = 'restore it from a copy, or take another checkpoint'


def check_checkpoint(path, model, checkpoint, max_over_ranks=int):
    """Mistake if the file or folder at `path` has changed since it was written, or if a weight is not finite."""
    changed = changed_part(path, checkpoint) if os.environ.get('RANK', '0') == '0' else ''
    if max_over_ranks(changed != ''):
        raise Mistake(f'{path} is damaged: {changed or OTHER.format("a part")}: {ADVICE}')
    check_finite(path, model.state_dict(), max_over_ranks)


def check_run(init_from, path, checkpoint, config, max_over_ranks):
    """For train.py: Mistake if it cannot begin with the checkpoint at `path`. Says where the run begins, if it may
    surprise.
    """
    number, best, meta = (checkpoint.get(key) for key in ('iter_num', 'best_val_loss', 'meta'))
    out_dir, resume = os.path.dirname(path), init_from == 'resume'
    if (type(number), type(best), type(meta or {})) != (int, float, dict) or number < 0:
        raise Mistake(f'{path} is no checkpoint of a run: its iter_num, best_val_loss or meta has a wrong type')
    if max_over_ranks(number) != -max_over_ranks(-number):
        raise Mistake(f'the ranks hold checkpoints of different iterations: {out_dir} must be one folder for all')
    if resume and 'seconds' in checkpoint:  # only grpo.py saves them
        raise Mistake(f'{path} was written by grpo.py: begin with --init_from={out_dir} and another out_dir')
    if os.environ.get('RANK', '0') != '0':
        return
    if not resume:
        print(f'beginning with the weights of {path}, iteration {number}')
    elif number >= config['max_iters'] and not config['eval_only']:
        print(f'note: {path} has all {number} iterations: to train on, raise max_iters={config["max_iters"]}')


def check_finite(path, state, max_over_ranks=int):
    """Mistake if a weight of the state dict, which `path` holds, is not finite."""
    if max_over_ranks(not all_finite(state)):
        raise Mistake(f'{path} holds weights that are not finite: {ADVICE}')


def all_finite(state):
    tensors = [x.to_local() if hasattr(x, 'to_local') else x for x in state.values()]
    ends = [end.float() for x in tensors if x.numel() for end in x.aminmax()]  # nan if there is one
    return not ends or bool(torch.stack(ends).isfinite().all())  # a rank may hold no rows of any tensor


def changed_part(path, checkpoint):
    """In words, the first part of the file or folder that is not as it was written; an empty text if all are."""
    try:
        if isinstance(checkpoint.get('crc32'), dict):
            there = os.listdir(path)  # perhaps with a file of another program, which nothing reads
            for name, crc32 in checkpoint['crc32'].items():
                if name not in there or crc32_of(os.path.join(path, name)) != crc32:
                    return OTHER.format(name)
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
