"""What the scripts share: the device, a folder's model and tokenizer, the ranks, a run's log."""

import contextlib
import dataclasses
import inspect
import json
import math
import os
import platform
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist

from extras import architecture, decode, experts, folder, guard, integrity, tokenizer
from model import Mistake, first_line


def read_text(path):
    """The text of a UTF-8 file that the user named."""
    try:
        with open(path, encoding='utf-8-sig') as f:  # without Windows' mark and line ends, as prepare.py reads
            return f.read()
    except (OSError, UnicodeDecodeError) as e:
        hint = '; convert it to UTF-8, as iconv does' * isinstance(e, UnicodeDecodeError)
        raise Mistake(f'{path} cannot be read: {first_line(e)}{hint}') from None


def write_whole(setting, path, lines):
    """Write the lines to the new file that a setting names: it is whole, or not there."""
    try:
        with tempfile.TemporaryDirectory(dir=os.path.dirname(path) or '.') as unfinished:
            with open(os.path.join(unfinished, 'new'), 'w', encoding='utf-8') as f:
                f.writelines(lines)
            os.replace(f.name, path)
    except OSError as e:
        raise Mistake(f'{setting}={path!r} cannot be written: {e.strerror}') from None


def for_output(text):
    """The text as a script prints it: for a pipe or a file as it is; for a terminal with the code points of control
    characters, as U+001B, in their places, because a terminal obeys them. Line ends and tabs stay.
    """
    from configurator import shown  # here, as in load_reward()
    return shown(text) if sys.stdout.isatty() else text


# -----------------------------------------------------------------------------
# device and model


def default_device():
    return 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu'


def autocast(device_type, dtype):
    """The context in which matrix products run in dtype ('float32', 'bfloat16' or 'float16')."""
    return contextlib.nullcontext() if dtype == 'float32' else torch.autocast(device_type, getattr(torch, dtype))


def open_checkpoint(out_dir, device='cpu', assign=False, **overrides):
    """A run's folder -> the path of its checkpoint, the model, and the checkpoint; one of shards without its optimizer.
    assign: leave the weights of a whole one in the file, in its dtypes. overrides: GPTConfig fields to replace
    """
    path = folder.last_checkpoint(out_dir, ['ckpt'])
    guard.need(os.path.exists(path), folder.missing(path))
    if path.endswith('.dcp'):
        from extras import dcp  # a slow import
        path = os.path.relpath(os.path.realpath(path))  # the run may set the link to another one meanwhile
        model, checkpoint = dcp.from_checkpoint(path, device, with_optimizer=False, **overrides)
    else:
        GPT = architecture.of_config(integrity.check_sizes(path, **overrides))
        with torch.device('meta') if assign else contextlib.nullcontext():
            model, checkpoint = GPT.from_checkpoint(path, device, assign, **overrides)
    integrity.check_checkpoint(path, model, checkpoint)
    return path, model, checkpoint


def load_checkpoint(out_dir, device, **overrides):
    """The model of a run's folder on the device, the checkpoint itself, and its tokenizer."""
    path, model, checkpoint = open_checkpoint(out_dir, device, **overrides)
    config = checkpoint.get('config') or {}
    guard.need(type(config) is dict and (config.get('dtype') or 'float32') in guard.DTYPES,
               f'{path} is no checkpoint of this model: its config is no table with a dtype of '
               f'{", ".join(guard.DTYPES)}')
    speaks = tokenizer.of_checkpoint(out_dir, checkpoint.get('meta') or {}, model.config.vocab_size)
    decode.check_absorption(model)
    return model.to(device), checkpoint, speaks


def choose_experts(model, experts):
    """From now on each token goes to this number of routed experts ('all', or a number as text), not to as many as in
    training; '' changes nothing. Gates that are normalised sum to what they did, but that of one expert is its score.
    """
    if experts == '':
        return
    cfg = model.config
    most = cfg.topk_group * cfg.n_routed_experts // max(1, cfg.n_group)
    guard.need(len(model.moe_layers()) > 0, f'experts={experts!r}: this model has no routed experts')
    guard.need(getattr(cfg, 'num_hash_layers', 0) == 0, f'experts={experts!r}: a table chooses experts in this model, '
               f'{cfg.num_experts_per_tok} for each token')
    guard.need(experts == 'all' or experts.isascii() and experts.isdigit() and 1 <= int(experts[:9]) <= most,
               f"experts={experts!r} must be 'all' or a number in 1..{most}")
    cfg.norm_topk_prob &= cfg.num_experts_per_tok > 1  # trained with one, the model has not seen a normalised gate
    cfg.num_experts_per_tok = most if experts == 'all' else int(experts)


def use_few_threads(model, rows):
    """For decoding a few rows of a small model on a CPU, use one thread. It is as fast as several on an idle machine,
    and faster on a busy one, where threads wait for each other: 1.3 s, not 9.8 s, for 40 tokens, while five other
    programs ran on two cores.
    """
    small = rows * model.get_num_active_params() < 4e6  # about a millisecond of work
    if small and model.lm_head.weight.device.type == 'cpu' and 'OMP_NUM_THREADS' not in os.environ:
        torch.set_num_threads(1)


def use_kernels(model):
    """From now on the model chooses the fastest way for its experts: extras/experts.py, and on a GPU extras/kernels.py.
    True if these kernels run.
    """
    experts.enable(model)
    if model.lm_head.weight.device.type != 'cuda':
        return False
    try:
        from extras import kernels
        fault = kernels.enable(model)
    except ImportError as e:  # triton is missing
        fault = first_line(e)
    if fault:
        print(f'going on without extras/kernels.py: {fault}', file=sys.stderr)
    return not fault


def keep_activations(share):
    """torch.compile keeps about this share of a block's activations. The name is private: another torch may lack it."""
    try:
        import torch._functorch.config as config
        config.activation_memory_budget = share
    except (ImportError, AttributeError) as e:
        raise Mistake(f'this torch has no activation_memory ({first_line(e)}): try --recompute=True') from None


def check_weights(model, path):
    """Call before the checkpoint at `path` is written. Mistake if a weight is not finite."""
    finite = integrity.all_finite(model.state_dict())
    guard.need(finite, f'the weights are not finite any more: {path} is not written, and what was saved before stays; '
               'try a smaller learning_rate')


def load_reward(path):
    """The reward() of a file, which is any Python: whatever goes wrong there becomes a Mistake. `ended` is whether the
    model ended its response; a reward() gets it if it has an argument of this name.
    """
    from configurator import failed_at  # here: beside nanoGPT's configurator.py train.py imports this module too
    try:
        reward = runpy.run_path(path)['reward']
        asks = 'ended' in inspect.signature(reward).parameters
    except BaseException as e:  # SystemExit and KeyboardInterrupt too
        raise Mistake(f'reward_file={path}{failed_at(e, path)} must define reward(prompt, response, answer): '
                      f'{type(e).__name__}: {first_line(e)}') from None

    def checked(prompt, response, answer, ended):
        more = {'ended': ended} if asks else {}
        call = f'{path}: reward({prompt!r}, {response!r}, {answer!r}{"".join(f", {k}={v}" for k, v in more.items())})'
        try:
            accuracy, form = map(float, reward(prompt, response, answer, **more))
        except BaseException as e:  # SystemExit and KeyboardInterrupt too
            raise Mistake(f'{call}{failed_at(e, path)}: {type(e).__name__}: {first_line(e)}') from None
        guard.need(math.isfinite(accuracy + form), f'{call} is {accuracy}, {form}: not finite')
        return accuracy, form

    return checked


def load_prompts(data_dir, split, tokenizer, max_new_tokens, block_size):
    """[(prompt, answer)] of a data set's file, whose lines are a prompt, a tab and its answer."""
    path = os.path.join(data_dir, f'{split}_prompts.txt')
    guard.need(os.path.exists(path) or not os.path.exists(os.path.join(data_dir, 'train.bin')),
               f'{path} is missing: this data set has no prompts; choose one with prompts, such as arithmetic/add3')
    try:
        guard.need(os.path.isfile(path), 'no regular file is there')
        with open(path, encoding='utf-8') as f:
            pairs = [tuple(line.removesuffix('\n').split('\t')) for line in f]
        lengths = [len(tokenizer.begin + tokenizer.encode(pair[0])) for pair in pairs]
    except (OSError, ValueError) as e:  # not there, not UTF-8, or no tokens for a prompt
        raise Mistake(f'{path} cannot be used ({first_line(e)}): run the prepare.py of {data_dir}') from None
    guard.need(pairs, f'{path} is empty')
    for pair, length in zip(pairs, lengths):
        guard.need(len(pair) == 2 and pair[0], f'{path}: a line is a prompt, a tab and its answer, not {pair!r}')
        guard.need(length + max_new_tokens <= block_size, f'{path}: {pair[0]!r} and max_new_tokens={max_new_tokens} do '
                   f'not fit in the checkpoint\'s block_size={block_size}')
    return pairs


def load_tasks(root, dataset, reward_file, splits, tokenizer, *lengths):
    """dataset and reward_file: names with commas between -> {split: for each data set [(prompt, answer, reward)]}"""
    names, files = dataset.split(','), reward_file.split(',')
    guard.need(len(files) in (1, len(names)), f'reward_file={reward_file!r} must be one file, or one for each data set '
               f'of dataset={dataset!r}')
    rules = [load_reward(os.path.join(root, file)) for file in files] * (len(names) // len(files))
    return {split: [[(*pair, rule) for pair in load_prompts(os.path.join(root, 'data', name), split, tokenizer,
                                                            *lengths)]
                    for name, rule in zip(names, rules)] for split in splits}


def catch_signals():
    """From now on SIGTERM and Ctrl-C only append to the list that is returned; a second Ctrl-C ends at once."""
    caught = []

    def on_signal(number, frame):
        if number == signal.SIGINT and caught:
            os._exit(130)
        caught.append(number)

    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, on_signal)
    return caught


# -----------------------------------------------------------------------------
# torchrun's ranks


def connect(backend, device_type):
    """Join torchrun's ranks -> the store that outlives its restarts."""
    guard.need('MASTER_ADDR' in os.environ, 'the ranks cannot be connected: start them with torchrun')
    # torchrun serves its store before it starts a rank; without torchrun the first rank does, whenever it starts
    served = os.environ.get('TORCHELASTIC_USE_AGENT_STORE') == 'True'
    patience = timedelta(seconds=30) if served else dist.constants.default_pg_timeout
    store, rank, world = next(dist.rendezvous('env://', timeout=patience))
    store.set_timeout(dist.constants.default_pg_timeout)  # for what it is asked
    # the store still holds the addresses of lost ranks: each attempt gets its own part
    attempt = dist.PrefixStore('attempt' + os.environ.get('TORCHELASTIC_RESTART_COUNT', '0'), store)
    guard.check_ranks(attempt, device_type)
    dist.init_process_group(backend if device_type == 'cuda' else 'gloo', store=attempt, rank=rank, world_size=world)
    return store


def leave():
    """End a process of torchrun's, when no rank needs another one any more."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
        sys.stdout.flush()
        os._exit(0)  # at once: gloo's threads may outlive Python and abort it (pytorch#190489)


def all_reduce(x, op=dist.ReduceOp.SUM):
    if dist.is_initialized():
        dist.all_reduce(x, op)
    return x


# -----------------------------------------------------------------------------
# a run's log


def header(model, config):
    """The first line of a run's log: what it is, and where its numbers come from."""
    here = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    git = ['git', '-C', here, 'describe', '--always', '--dirty']
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() if shutil.which('git') else ''
    device = model.lm_head.weight.device
    hardware = torch.cuda.get_device_name(device) if device.type == 'cuda' else \
        f'{platform.machine()} {device.type}, {os.cpu_count()} cores'
    return {'command': shlex.join(sys.argv), 'config': config, 'world_size': int(os.environ.get('WORLD_SIZE', 1)),
            'model_args': dataclasses.asdict(model.config),  # with every derived size
            'parameters': model.get_num_params(), 'active_parameters': model.get_num_active_params(),
            'flops_per_token': model.flops_per_token(),
            'versions': {'python': platform.python_version(), 'torch': torch.__version__, 'numpy': np.__version__},
            'hardware': hardware, 'git_commit': commit or None}


def start_wandb(**settings):
    """Begin a run of wandb. wandb puts a hook before the project's that prints a traceback: it goes again."""
    import wandb
    hook = sys.excepthook
    try:
        wandb.init(**settings)
    finally:
        sys.excepthook = hook


def open_log(path, header):
    """A run's log, to append lines to; the header is one, in JSON. A Mistake if it cannot be written."""
    try:
        os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
        file = open(path, 'ab', buffering=0)
        # a run that was killed may have left half a line
        file.write(b'\n' * (file.tell() > 0) + json.dumps(header).encode() + b'\n')
        return file
    except OSError as e:
        raise Mistake(f'{path} cannot be written: {e.strerror}') from None
