"""A run's folder: find its last checkpoint, lock it, and keep an earlier run."""

import glob
import importlib.util
import itertools
import math
import os
import shutil

import torch

from extras.tokenizer import copy_tokenizer, tokenizer_files
from model import Mistake

locks = []  # open files, because closing a file ends its lock


def last_checkpoint(out_dir, last=('ckpt', 'ckpt_last')):
    """The path of the last checkpoint by iteration, whole or sharded, else of the best one, else out_dir/ckpt.pt"""
    def iteration(path):
        try:
            path = os.path.join(path, 'rest.pt') if path.endswith('.dcp') else path
            if os.path.isfile(path):  # no pipe, which would never answer
                return torch.load(path, map_location='meta', weights_only=True, mmap=True)['iter_num']
        except Exception:  # damaged, or another program's: the error comes when it is opened
            pass
        return math.inf

    for names in (last, ('ckpt_best',)):
        paths = [os.path.join(out_dir, name + end) for name in names for end in ('.pt', '.dcp')]
        if any(map(os.path.lexists, paths)):  # a link to nothing too: nothing older is read in silence
            return max(filter(os.path.lexists, paths), key=iteration)
    return os.path.join(out_dir, 'ckpt.pt')


def missing(path):
    """The message for a checkpoint that is not at `path`, with a hint where it may be."""
    out_dir = os.path.realpath(os.path.dirname(path))
    kept = sorted(map(os.path.relpath, glob.glob(f'{glob.escape(out_dir)}.old*')))
    hint = f'. Earlier runs are in {", ".join(kept)}' * bool(kept)
    if os.path.exists(os.path.join(out_dir, 'config.json')):
        hint = ". It is in Hugging Face's format: python convert.py import makes a checkpoint of it"
    return f'{path} is missing: train a model first, or name the out_dir it is in{hint}'


def missing_data(path, resume):
    """The message for a train.bin or val.bin that is not at `path`."""
    here = os.path.dirname(path)
    root = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), 'data')
    scripts = [os.path.join(folder, 'prepare.py') for folder in (here, os.path.dirname(here))]
    found = [f'run python {os.path.relpath(script)} first' for script in filter(os.path.isfile, scripts)]
    other = 'run prepare.py again' if os.path.isdir(here) else 'no data set has that name'
    prepared = sorted(os.path.relpath(folder, root) for folder, _, files in os.walk(root) if 'train.bin' in files)
    return (f'{path} is missing: {"a resume needs the --dataset of its run; " * resume}{[*found, other][0]}, or choose '
            f'a prepared one: {", ".join(prepared) or "there is none yet"}')


def lock(folder, out_dir):
    if not importlib.util.find_spec('fcntl'):  # Windows has no such locks, and renames no folder with an open file
        return
    import fcntl
    locks.append(open(os.path.join(folder, '.lock'), 'w'))
    try:
        fcntl.flock(locks[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        if isinstance(e, BlockingIOError):  # others come from a file system without locks
            raise Mistake(f'another process is training in {out_dir}; give this run its own --out_dir') from None


def begin(config, init_from, data_dir, master, max_over_ranks):
    """For train.py: lock out_dir; a new run first renames an earlier run's folder."""
    out_dir = config['out_dir']
    if master and not config['eval_only']:
        take(out_dir, {'resume': None, 'scratch': data_dir}.get(init_from, init_from), data_dir)
        if init_from == 'resume':
            keep_names(out_dir, config['always_save_checkpoint'])
    max_over_ranks(0)  # a barrier
    if max_over_ranks(not os.path.exists(out_dir)) and master and not config['eval_only']:
        print(f'note: {out_dir} is not one folder for all machines: to resume, copy its checkpoint to all of them')


def take(out_dir, tokenizer_from=None, *must_stay):
    """Lock out_dir for this process. tokenizer_from: begin a new run with this folder's tokenizer; an earlier run's
    folder becomes out_dir.old1, .old2, ..., unless it holds must_stay. A full disk is noticed before that.
    """
    folder = new = os.path.realpath(out_dir)
    try:
        earlier = os.path.isdir(folder) and any(name.startswith(('ckpt', 'log.jsonl')) for name in os.listdir(folder))
        if tokenizer_from is None:
            return lock(folder, out_dir)
        tokenizer_files(tokenizer_from)  # what is wrong with them is said before anything is written
        if earlier:
            check_rename(out_dir, folder, (os.getcwd(), os.path.dirname(__file__), tokenizer_from, *must_stay))
            lock(folder, out_dir)
            old, new = (next(path for n in itertools.count(1) if not os.path.lexists(path := f'{folder}.{word}{n}'))
                        for word in ('old', 'new'))
        os.makedirs(new, exist_ok=True)
        lock(new, out_dir)
        with open(os.path.join(new, '.lock'), 'wb') as f:
            f.write(b' ' * 100_000)  # fails if the disk is full
            f.flush()
            os.fsync(f.fileno())
            f.truncate(0)
        copy_tokenizer(tokenizer_from, new)
        if earlier:
            os.rename(folder, old)
            os.rename(new, folder)
            print(f'the earlier run in {out_dir} is now in {os.path.relpath(old)}')
    except OSError as e:
        if new != folder:
            shutil.rmtree(new, ignore_errors=True)
        why = 'it is a file' if isinstance(e, FileExistsError) else e.strerror
        raise Mistake(f'out_dir={out_dir!r} cannot be written: {why}') from None


def check_rename(out_dir, folder, must_stay):
    why = [f'{path} is in it' for path in must_stay if (os.path.realpath(path) + os.sep).startswith(folder + os.sep)]
    if why or os.path.ismount(folder):
        raise Mistake(f'out_dir={out_dir!r} holds an earlier run and cannot be renamed: '
                      f'{(why or ["it is a mount"])[0]}; give this run its own --out_dir')


def keep_names(folder, always_save):
    """Rename the checkpoints, of both forms, if always_save_checkpoint has changed, so that the run overwrites none."""
    old_main, new_main = ('ckpt_best', 'ckpt_last') if always_save else ('ckpt_last', 'ckpt_best')
    pairs = ('ckpt', old_main), (new_main, 'ckpt')
    renames = [[os.path.join(folder, name + end) for name in pair] for pair in pairs for end in ('.pt', '.dcp')]
    if any(os.path.lexists(old) for old, _ in renames[2:]):  # the setting has changed
        for old, new in renames:
            if os.path.lexists(old) and not os.path.lexists(new):  # a kill between two: the next resume goes on
                os.rename(old, new)
