"""
Checks of a run before it starts: settings, ranks, data, whether a checkpoint fits, a trial micro-batch, an earlier
run's folder. train.py calls these functions if the folder extras/ exists. A failed check raises Mistake.
"""

import math
import os
import socket
import sys

import numpy as np
import torch

from extras import architecture, integrity
from extras.folder import begin, last_checkpoint, missing_data  # noqa: F401 (train.py calls guard.begin)
from extras.integrity import as_prepared, check_checkpoint, check_context, check_finite, check_path, check_run  # noqa: F401
from extras.optim import load_optimizer  # noqa: F401 (train.py and grpo.py call guard.load_optimizer)
from extras.tokenizer import check_data
from model import Mistake, first_line, is_out_of_memory

DTYPES = ('float32', 'bfloat16', 'float16')
RANGES = [  # settings, a test that their values must pass, and the test in words
    ('batch_size block_size gradient_accumulation_steps eval_interval eval_iters log_interval max_skipped_iters '
     'expert_parallel', lambda x: 0 < x < 2**31, 'be positive and below 2**31'),
    ('learning_rate min_lr weight_decay grad_clip qk_clip max_iters warmup_iters lr_decay_iters mtp_lambda_late '
     'mtp_late_from', lambda x: 0 <= x < 2**63, 'be finite, not negative, and below 2**63'),
    ('beta1 beta2', lambda x: 0 <= x < 1, 'lie in [0, 1)'),
    ('activation_memory', lambda x: 0 <= x <= 1, 'lie in 0..1'),
    ('shard', lambda x: 0 <= x < 2**31, 'be 1 (off), 0 (all ranks) or a number of ranks'),
    ('seed', lambda x: 0 <= x < 2**32, 'lie in 0..2**32 - 1'),
    ('optimizer', lambda x: x in ('adamw', 'muon', 'muon_split'), "be 'adamw', 'muon' or 'muon_split'"),
    ('checkpoint', lambda x: x in ('whole', 'dcp'), "be 'whole' or 'dcp'"),
    ('dtype', lambda x: x in ('', *DTYPES), "be 'float32', 'bfloat16' or 'float16'"),
    ('fp8_scaling', lambda x: x in ('tile', 'row', 'tensor'), "be 'tile', 'row' or 'tensor'"),
    ('fp8_grad', lambda x: x in ('e4m3', 'e5m2'), "be 'e4m3' or 'e5m2'"),
    ('init_from', lambda x: x in ('scratch', 'resume') or os.path.isdir(x),
     "be 'scratch', 'resume' or a folder that exists: another run's out_dir, or a checkpoint of the DeepSeek "
     "family (GPT-2's weights do not fit this architecture)"),
    ('out_dir', lambda x: 0 < len(x) < 1000, 'name a folder'),
]


def need(ok, message):
    if not ok:
        raise Mistake(message)


# -----------------------------------------------------------------------------
# settings and ranks

def check_ranges(config, ranges=RANGES):
    for names, fits, words in ranges:
        for name in names.split():
            need(fits(config[name]), f'{name}={config[name]!r} must {words}')


def check_settings(config, device, world):
    check_ranges(config)
    c, ranks = config, 'RANK' in os.environ
    need(c['gradient_accumulation_steps'] % world == 0, 'gradient_accumulation_steps='
         f'{c["gradient_accumulation_steps"]} must be a multiple of the {world} ranks')
    need(not c['bf16_moments'] or (c['optimizer'] == 'adamw' and c['dtype'] != 'float16'),
         "bf16_moments=True needs optimizer='adamw' and a dtype other than 'float16'")
    need(c['dtype'] != 'float16' or device.startswith('cuda'),
         "dtype='float16' needs CUDA (its gradients are scaled there); use bfloat16 or float32")
    need(os.path.realpath(c['init_from']) != os.path.realpath(c['out_dir']),
         f'out_dir={c["out_dir"]!r} must not be the folder that the run begins with, init_from')
    if c['decay_lr'] and c['warmup_iters'] > c['lr_decay_iters'] and os.environ.get('RANK', '0') == '0':
        print(f'note: the learning rate rises until warmup_iters={c["warmup_iters"]}, then drops to min_lr, because '
              f'lr_decay_iters={c["lr_decay_iters"]} is smaller')
    if c['shard'] != 1 or c['expert_parallel'] > 1:
        from extras import parallel  # a slow import
        parallel.check(config, world if ranks else 0)
    local_world = int(os.environ.get('LOCAL_WORLD_SIZE', 1))
    need(not (ranks and device.startswith('cuda')) or torch.cuda.device_count() >= local_world,
         f'{local_world} ranks need as many GPUs; this machine has {torch.cuda.device_count()}')
    if check_device(device) == 'cpu' and c['init_from'] == 'scratch' and c['shard'] == c['expert_parallel'] == 1:
        integrity.check_memory(config, local_world)


def check_device(device):
    """device -> its type: 'cuda', 'cpu', ... Mistake if it cannot compute a number and give it back."""
    try:
        x = torch.zeros(1, device=device)
        x.item()  # fails on the meta device
        return x.device.type
    except Exception as e:  # torch raises RuntimeError, AssertionError, NotImplementedError and others
        raise Mistake(f'device={device!r} cannot be used here; cpu, cuda or mps may be: {first_line(e)[:99]}') from None


def check_ranks(store, device_type):
    """Call before the ranks connect. Mistake if gloo and nccl ranks would wait for each other, or if gloo listens on
    an address that other machines cannot reach: it takes the address of the machine's name, often 127.0.1.1."""
    world = int(os.environ['WORLD_SIZE'])
    store.add('gpus', int(device_type == 'cuda'))
    if store.add('ranks', 1) == world:
        store.set('counted', '')
    store.get('counted')  # waits until the last rank has set it
    need(store.add('gpus', 0) in (0, world), 'some ranks have a GPU and others have none: give all the same --device')
    machines = int(os.environ.get('GROUP_WORLD_SIZE', 1))
    if machines == 1 or 'GLOO_SOCKET_IFNAME' in os.environ:
        return
    if os.environ['LOCAL_RANK'] == '0':
        try:
            address = socket.gethostbyname(socket.gethostname())
        except OSError:
            address = '127.0.0.1'  # gloo's own fallback
        store.set('host' + os.environ['GROUP_RANK'], address)
    addresses = [store.get(f'host{machine}').decode() for machine in range(machines)]
    need(not any(address.startswith('127.') for address in addresses), 'the names of the machines have the addresses '
         f'{", ".join(addresses)}, and other machines cannot reach 127...; set GLOO_SOCKET_IFNAME to the network '
         'interface, such as eth0, on every machine')


# -----------------------------------------------------------------------------
# data and checkpoints

def check_files(data_dir, meta, block_size, resume=False):
    """Mistake if a data set's meta.pkl, tokens or masks are missing, damaged or too few for block_size."""
    path = os.path.join(data_dir, 'meta.pkl')
    need(os.path.isfile(path) or not os.path.lexists(path), f'{path} cannot be used: it is no regular file')
    kinds = dict(vocab_size=int, stoi=dict, itos=dict, dtype=str, row_length=int, tokenizer=str, crc32=dict,
                 bytes_per_token=float)
    for name, kind in kinds.items():
        positive = name in ('row_length', 'bytes_per_token')
        need(type(meta.get(name, kind())) is kind and (not positive or 0 < meta.get(name, 1) < 2**31),
             f'{data_dir}/meta.pkl cannot be used: its {name} must be {kind.__name__}' + ' > 0' * positive
             + ': run prepare.py again')
    check_data(data_dir, meta)
    size_of = np.dtype(meta.get('dtype', 'uint16')).itemsize
    for split in ('train', 'val'):
        path, mask = (os.path.join(data_dir, f'{split}{end}.bin') for end in ('', '_mask'))
        if not os.path.isfile(path):
            raise Mistake(missing_data(path, resume))
        size = os.path.getsize(path)
        need(size % size_of == 0 and as_prepared(path, meta) and as_prepared(mask, meta),
             f'{path} (or its mask) is cut short, changed, or of another data set than meta.pkl: run prepare.py again')
        need(size > block_size * size_of,
             f'{path} holds {size // size_of} tokens, too few: block_size={block_size} needs {block_size + 1}')
        need(not os.path.exists(mask) or os.path.getsize(mask) == size // size_of,
             f'{mask} must hold a byte for each token of {split}.bin: run prepare.py again')


def largest_token(tokens):
    """Of this rank's share of a memory-mapped file. Each piece is mapped for a moment: else the whole file would count
    as this process's resident memory.
    """
    rank, world = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
    size, top = 2**24, 0
    for start in range(rank * size, len(tokens), world * size):
        piece = np.memmap(tokens.filename, tokens.dtype, mode='r', offset=start * tokens.itemsize,
                          shape=min(size, len(tokens) - start))
        top = max(top, piece.max())
    return top


def check_tokens(data, model_config, config, meta, max_over_ranks):
    """Mistake if a token is outside the vocabulary: later the error would be obscure. Ranks share the work."""
    for split, tokens in data.items():
        top = max_over_ranks(largest_token(tokens))
        path = tokens.filename
        need(top < model_config.vocab_size,
             f'{path} holds the token {top}, beyond vocab_size={model_config.vocab_size}')
        known = meta or config['vocab_size'] or config['init_from'] != 'scratch'
        need(split != 'train' or top >= 256 or known, f'{os.path.dirname(path)}/meta.pkl is missing, and {split}.bin '
             f'holds only tokens below {top + 1}: run prepare.py again, or set --vocab_size={top + 1}')


def check_fit(init_from, path, model, found, config, overrides, meta, max_over_ranks):
    """Mistake if the checkpoint `found` at `path`, or the folder init_from, does not fit the settings or the data."""
    check_context(config['out_dir'], model.config)
    architecture.check_effect(model.config, config)
    if init_from == 'scratch':
        return
    if found:
        check_checkpoint(path, model, found, max_over_ranks)
        check_run(init_from, path, found, config, max_over_ranks)
        trained_on = found.get('meta') or {}
        need(not found.get('optimizer') or all(trained_on.get(k) == meta.get(k) for k in ('stoi', 'tokenizer')),
             f'dataset={config["dataset"]} has another vocabulary than {path} was trained on: use the same dataset, or '
             'prepare it again from the same text and, for a BPE, with the same --vocab')
    else:
        check_finite(init_from, model.state_dict(), max_over_ranks)
    if not found.get('optimizer'):  # from Hugging Face, perhaps by convert.py
        from extras.hf import check_vocabulary
        check_vocabulary(os.path.dirname(path), meta, config['dataset'])
    flags = {arg.partition('=')[0] for arg in sys.argv[1:]}
    fields = type(model.config).__dataclass_fields__
    ignored = [name for name, value in vars(model.config).items()
               if name not in overrides and config.get(name, -1) not in (-1, value)
               and (f'--{name}' in flags or name not in ('vocab_size', 'architecture') and
                    config[name] != fields[name].default)]
    architecture.check_ignored(ignored, config)
    original, factor = model.config.rope_original_max_position_embeddings, model.config.rope_factor
    need(config['block_size'] <= factor * original, f'block_size={config["block_size"]} is longer than the '
         f'{int(factor * original)} of the checkpoint: resume with the config file and the flags of its run, or extend '
         f'it with --rope_factor={math.ceil(config["block_size"] / original)}')


# -----------------------------------------------------------------------------
# just before the loop

def try_micro_batch(model, opt, batch, ctx, config, max_over_ranks):
    """Try forward, backward, an evaluation and a step that changes nothing, before a folder is renamed. If compiling
    fails, go on without it. Each rank prints its fault; all act on the worst: 0 none, 1 compiler, 2 memory (Mistake).
    """
    sharded = config['shard'] != 1 or config['expert_parallel'] > 1
    for compiled in ([True, False] if config['compile'] else [False]):
        fault = 0
        if compiled and os.environ.get('RANK', '0') == '0':
            print('compiling the model: this may take some minutes')
        try:
            for _ in range(2 if batch[0].is_cuda else 1):  # the second pass includes the optimizer's state
                with ctx:
                    _, loss = model.train()(*batch)
                loss.backward()
                with ctx, torch.no_grad():
                    model.eval()(*batch, return_logits=False)
                if opt.defaults['fused']:
                    opt.found_inf = torch.ones((), device=batch[0].device)
                    opt.step()
        except Exception as e:
            fault = 2 if is_out_of_memory(e) else 1
            if fault == 1 and not compiled:
                raise
            # sharded: the other ranks wait for this one inside the micro-batch, so it cannot go on alone
            need(not sharded, f'{first_line(e)}: try ' + ('--compile=False' if fault == 1 else 'a smaller batch_size'))
            if fault == 1:
                rank = f'rank {os.environ["RANK"]}: ' if 'RANK' in os.environ else ''
                print(f'{rank}going on without torch.compile: {type(e).__name__}: {first_line(e)}')
        opt.zero_grad(set_to_none=True)
        fault = max_over_ranks(fault)
        half, steps = config['batch_size'] // 2, 2 * config['gradient_accumulation_steps']
        advice = f'--batch_size={half} --gradient_accumulation_steps={steps}' if half else 'a smaller model (n_embd)'
        need(fault < 2, f'out of memory: try {advice}')
        if fault == 0:
            return
        torch.compiler.set_stance('force_eager')
