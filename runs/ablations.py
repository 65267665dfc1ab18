"""
What each of DeepSeek's ideas buys, at two small sizes: trains the variants of docs/insight.md and compares them.

    python runs/ablations.py run [--only=attention] [--size=small]   # what the results lack; --workers=2
    python runs/ablations.py time                                    # milliseconds per iteration, the machine quiet
    python runs/ablations.py report                                  # the tables and figures of docs/insight.md

small: tiny Shakespeare in characters (data/shakespeare_char/prepare.py); large: Python's standard library in 2,048 BPE
tokens. Of the training split the last tenth is left out; it alone chooses each variant's learning rate. Each run is one
line of runs/ablations.jsonl, written when it ends, so that a killed command goes on where it was.
"""

import argparse
import collections
import glob
import json
import math
import multiprocessing
import os
import signal
import statistics
import sys
import sysconfig
import time
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import configurator  # noqa: F401 (a mistake is one line and exit code 2)

# isort: split
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from extras import architecture, fp8, optim
from extras.guard import need
from extras.scripts import autocast
from model import apply_rope

RESULTS = os.path.join(ROOT, 'runs', 'ablations.jsonl')

# ---------------------------------------------------------------------------------------------------------------------
# the variants

SIZES = {  # 1,024 tokens per iteration each
    'small': {'n_layer': 3, 'n_head': 4, 'n_embd': 96, 'block_size': 64, 'steps': 800},
    'large': {'n_layer': 5, 'n_head': 4, 'n_embd': 160, 'block_size': 128, 'steps': 500},
}
TOKENS = 1024


def variants(size):
    """{question: {name: settings}}. A setting is a field of GPTConfig, or one of build()'s own."""
    C, H = SIZES[size]['n_embd'], SIZES[size]['n_head']
    d, W = C // H, 2 * C  # a token's FFN is W wide in every row
    questions = {
        'attention': {
            'MHA': {'kv_heads': H}, 'GQA, 2 groups': {'kv_heads': 2}, 'MQA': {'kv_heads': 1},
            'MLA without RoPE': {'rope': False},
            'MLA without query compression': {'q_lora_rank': 0},
            'MLA, latent C/4': {'kv_lora_rank': C // 4}, 'MLA, latent C/2': {'kv_lora_rank': C // 2},
            'MLA, latent 3C/4': {'kv_lora_rank': 3 * C // 4},
            "MLA, V3's head sizes": {'qk_nope_head_dim': d},  # n = v = 2 r; the base has n + r = v and n = r
            'MLA, RoPE on twice as much': {'qk_rope_head_dim': d, 'qk_nope_head_dim': d // 2},
            "MLA, GQA's cache": {'kv_lora_rank': 4 * d - d // 2},
            "MLA, MHA's parameters": {'qk_nope_head_dim': d, 'q_lora_rank': 7 * C // 12, 'kv_lora_rank': 15 * C // 32},
        },
        'experts': {
            'dense': {'n_routed_experts': 0, 'intermediate_size': W},
            **{f'{E} experts, {E // 4} chosen, none shared': {
                'n_routed_experts': E, 'num_experts_per_tok': E // 4, 'n_shared_experts': 0,
                'moe_intermediate_size': 4 * W // E} for E in (4, 8, 16, 32)},
            **{f'{9 - shared} experts, {4 - shared} chosen, {words} shared': {
                'n_routed_experts': 9 - shared, 'num_experts_per_tok': 4 - shared, 'n_shared_experts': shared}
               for shared, words in ((0, 'none'), (2, '2'))},
        },
        'balance': {
            'none': {'bias_update_speed': 0.0, 'aux_loss_alpha': 0.0},
            **{f'auxiliary loss, {a}': {'bias_update_speed': 0.0, 'aux_loss_alpha': a} for a in (0.001, 0.01, 0.1)},
            'loss-free alone': {'aux_loss_alpha': 0.0},
        },
        'router': {
            'softmax': {'scoring_func': 'softmax'},
            'gates not normalised': {'norm_topk_prob': False},
            'scaling factor 1': {'routed_scaling_factor': 1.0},
            '2 of 4 groups': {'n_group': 4, 'topk_group': 2},
        },
        'MTP': {
            'one module': {'num_nextn_predict_layers': 1},
            'two modules': {'num_nextn_predict_layers': 2},
            'one module, lambda 0.1': {'num_nextn_predict_layers': 1, 'mtp_lambda': 0.1},
            'one module, lambda 1': {'num_nextn_predict_layers': 1, 'mtp_lambda': 1.0},
            'one module of two blocks': {'num_nextn_predict_layers': 1, 'mtp_n_layer': 2},
        },
        'optimizer': {
            'Muon': {'optimizer': 'muon'}, 'Muon, split': {'optimizer': 'muon_split'},
            'Muon, split, cautious decay': {'optimizer': 'muon_split', 'cautious': True},
        },
        'precision': {
            'bf16': {'precision': 'bf16'},
            'FP8, tiles': {'precision': 'tile'}, 'FP8, tensors': {'precision': 'tensor'},
        },
        'initialisation': {'0.02': {'initializer_range': 0.02}, '0.006': {'initializer_range': 0.006}},
    }
    # model_v4.py's ideas; the indexers learn from the first iteration on, without a dense warm-up
    T, n, memory = SIZES[size]['block_size'], SIZES[size]['n_layer'], {'engram_layers': '0'}
    windows = {'sliding_window': T // 4, 'compress_rate_hca': T // 4}
    added = 2 * 4096 * 16 + 2 * 32 * C  # by this memory: two tables and two projections
    narrow = 8 * round((W // 4 - added / (27 * n * C)) / 8)  # the experts' width that takes about as much away
    later = {
        'later attention': {
            'DSA, 1/4 of the positions': {'index_topk': T // 4}, 'DSA, 1/8 of the positions': {'index_topk': T // 8},
            'window of 1/4 alone': windows | {'layer_types': 's' * n},
            'window and CSA': windows | {'layer_types': 'c' * n},
            'window and CSA, 1/4 of its entries': windows | {'layer_types': 'c' * n, 'index_topk': T // 16},
            'window, CSA and HCA': windows | {'layer_types': ('ch' * n)[:n]},
        },
        'hyper-connections': {'mHC, 2 streams': {'hc_mult': 2}, 'mHC, 4 streams': {'hc_mult': 4}},
        'memory': {
            'Engram': memory, 'Engram, 512 rows': memory | {'engram_rows': 512},
            'Engram, 2 tokens': memory | {'engram_ngram': 2}, 'Engram, 4 tokens': memory | {'engram_ngram': 4},
            'Engram, gate 1/2': memory | {'gate': False}, 'Engram, no convolution': memory | {'engram_conv': False},
            'Engram in two blocks': {'engram_layers': '0,1'},
            "Engram, base's parameters": memory | {'moe_intermediate_size': narrow},
        },
        "V4's experts": {'one hash layer': {'num_hash_layers': 1}, 'sqrt-softplus': {'scoring_func': 'sqrtsoftplus'}},
    }
    questions |= {question: {name: {'architecture': 'model_v4'} | own for name, own in found.items()}
                  for question, found in later.items()}
    if size == 'large':  # fewer questions
        keep = {'attention': ('MHA', 'MQA', "MLA, V3's head sizes"),
                'experts': ('dense', '32 experts, 8 chosen, none shared'), 'balance': ('none', 'auxiliary loss, 0.01'),
                'MTP': ('one module', 'two modules'),
                'optimizer': ('Muon', 'Muon, split', 'Muon, split, cautious decay'),
                'later attention': ('DSA, 1/4 of the positions', 'window and CSA', 'window, CSA and HCA'),
                'hyper-connections': ('mHC, 4 streams',), 'memory': ('Engram', "Engram, base's parameters"),
                "V4's experts": ('one hash layer',)}
        questions = {q: {name: questions[q][name] for name in names} for q, names in keep.items()}
    return {'base': {'base': {}}} | questions


def settings_of(size, variant):
    return next(found[variant] for found in variants(size).values() if variant in found)


class GroupedQueryAttention(nn.Module):
    """kv_heads keys and values for n_head queries: MHA with n_head of them, MQA with one. RoPE on whole heads."""

    def __init__(self, config, kv_heads):
        super().__init__()
        self.d, self.repeats = config.v_head_dim, config.n_head // kv_heads
        self.q_proj = nn.Linear(config.n_embd, config.n_head * self.d, bias=False)
        self.k_proj = nn.Linear(config.n_embd, kv_heads * self.d, bias=False)
        self.v_proj = nn.Linear(config.n_embd, kv_heads * self.d, bias=False)
        self.o_proj = nn.Linear(config.n_head * self.d, config.n_embd, bias=False)

    def forward(self, x, cos, sin, cache=None, pos=0):
        q, k, v = (f(x).unflatten(-1, (-1, self.d)).transpose(1, 2) for f in (self.q_proj, self.k_proj, self.v_proj))
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)             # (B, H, T, d), (B, kv_heads, T, d)
        k, v = (t.repeat_interleave(self.repeats, dim=1) for t in (k, v))   # (B, H, T, d)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(y.transpose(1, 2).flatten(2))                    # (B, T, C)


def build(size, variant, vocab_size):
    """The model of a variant, and in bytes what it caches per token in bf16."""
    own = dict(settings_of(size, variant))
    kv_heads, rope, precision = own.pop('kv_heads', None), own.pop('rope', True), own.pop('precision', None)
    gate = own.pop('gate', True)
    own.pop('optimizer', None), own.pop('cautious', None)
    GPT, GPTConfig = architecture.of_args(own)
    sizes = {k: v for k, v in SIZES[size].items() if k != 'steps'}
    if kv_heads:
        own['qk_rope_head_dim'] = sizes['n_embd'] // sizes['n_head']
    config = GPTConfig(vocab_size=vocab_size, **{'num_nextn_predict_layers': 0} | sizes | own)
    model = GPT(config)
    cached = config.cache_width
    if kv_heads:
        cached = 2 * kv_heads * config.v_head_dim
        for block in model.blocks():
            block.attn = GroupedQueryAttention(config, kv_heads)
        for name, p in model.named_parameters():
            if '.attn.' in name:
                model.initialise(name, p)
    if not gate:  # of Engram: always 1/2
        for memory in model.memories():
            memory.k_norm.requires_grad_(False).zero_()
    if not rope:
        model.rope_cos.fill_(1), model.rope_sin.fill_(0)
    if precision in ('tile', 'tensor'):
        fp8.enable(model, fp8.Recipe(precision))
    if own.get('layer_types'):  # windows do not grow with the text: a token's share of the cache of a full context
        cached = sum(x.numel() for block in model.make_cache(1, config.block_size) for x in block)
        return model, round(2 * cached / config.block_size)
    return model, 2 * config.n_layer * cached


def context_of(size, variant):
    return autocast('cpu', 'bfloat16' if 'precision' in settings_of(size, variant) else 'float32')


# ---------------------------------------------------------------------------------------------------------------------
# one run

def load(size):
    """{'train', 'held', 'val'}: tokens; and the vocabulary's size."""
    if size == 'small':
        folder = os.path.join(ROOT, 'data', 'shakespeare_char')
        need(os.path.exists(os.path.join(folder, 'val.bin')), 'run data/shakespeare_char/prepare.py first')
        train, val = (np.fromfile(os.path.join(folder, f'{name}.bin'), dtype=np.uint16) for name in ('train', 'val'))
        vocab_size = 65
    else:
        path = os.path.join(ROOT, 'out-ablations', 'python.npy')
        if not os.path.exists(path):
            write_python(path)
        tokens, vocab_size = np.load(path), 2048
        train, val = np.split(tokens, [9 * len(tokens) // 10])
    train, held = np.split(train, [9 * len(train) // 10])
    return {name: torch.from_numpy(x.astype(np.int64)) for name, x in
            {'train': train, 'held': held[:100_000], 'val': val[:110_000]}.items()}, vocab_size


def write_python(path):
    """The standard library's top-level modules, in an order that spreads kinds over the splits, as BPE tokens."""
    import tokenizers
    files = sorted(glob.glob(os.path.join(sysconfig.get_paths()['stdlib'], '*.py')))
    files = [files[i] for i in np.random.default_rng(0).permutation(len(files))]
    texts = [open(file, encoding='utf-8', errors='replace').read() for file in files]
    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts[:8 * len(texts) // 10], vocab_size=2048, show_progress=False)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    np.save(path, np.concatenate([np.array(bpe.encode(text).ids, dtype=np.uint16) for text in texts]))


def rate(it, steps, lr):
    """train.py's schedule, with a twentieth of warm-up and down to a tenth."""
    warmup = steps // 20
    if it < warmup:
        return lr * (it + 1) / (warmup + 1)
    return lr * (0.1 + 0.45 * (1 + math.cos(math.pi * (it - warmup) / (steps - warmup))))


@torch.no_grad()
def loss_on(model, tokens):
    """The mean main loss over all of the tokens, in windows of block_size."""
    T = model.config.block_size
    rows = tokens[:(len(tokens) - 1) // T * T + 1]
    x, y = rows[:-1].view(-1, T), rows[1:].view(-1, T)
    model.eval()
    losses = [model(a, b, return_logits=False)[1].item() * len(a) for a, b in zip(x.split(64), y.split(64))]
    model.train()
    return sum(losses) / len(x)


@torch.no_grad()
def accepted_drafts(model, tokens):
    """For each MTP module, how often its likeliest token is the main model's at the draft's own position."""
    T = model.config.block_size
    idx = tokens[:64 * T].view(64, T)
    model.eval()
    h, _ = model.main_stack(idx)
    main, shares, token = model.lm_head(h).argmax(dim=-1), [], idx
    for k, module in enumerate(model.mtp, start=1):
        token = F.pad(token[:, 1:], (0, 1))                                 # t_{i+k}
        h, _ = model.mtp_module(module, token, h)
        draft = model.lm_head(h[:, :T - k]).argmax(dim=-1)                  # for position i+k+1, as main at i+k
        shares.append((draft == main[:, k:]).float().mean().item())
    model.train()
    return shares


def optimizer_of(size, variant, model, lr):
    own = settings_of(size, variant)
    if 'optimizer' in own:
        split = own['optimizer'] == 'muon_split'
        return optim.muon(model, 0.1, lr, (0.9, 0.95), 'cpu', split, own.get('cautious', False))
    return model.configure_optimizers(0.1, lr, (0.9, 0.95), 'cpu')


def iteration(model, optimizer, context, x, y, lr, mtp_lambda):
    """One optimizer step, as train.py's; returns the load (MoE layers, E), or None."""
    for group in optimizer.param_groups:
        group['lr'] = lr * group.get('lr_scale', 1)
    with context:
        loss = model(x, y, mtp_lambda=mtp_lambda)[1]
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    if 'load' in model.stats:
        model.update_balance(model.stats['load'])
    return model.stats.get('load')


def batches(tokens, block_size, seed):
    """An endless stream of (x, y), (B, T) each: the same for every variant of one seed."""
    rng = np.random.default_rng(seed)
    while True:
        starts = torch.from_numpy(rng.integers(0, len(tokens) - block_size - 1, TOKENS // block_size))
        rows = tokens[starts[:, None] + torch.arange(block_size + 1)]       # (B, T + 1)
        yield rows[:, :-1], rows[:, 1:]


def train(job):
    """Trains a variant; job: (size, variant, lr, seed, steps). -> its line of the results."""
    size, variant, lr, seed, steps = job
    torch.set_num_threads(1)
    data, vocab_size = load(size)
    torch.manual_seed(seed)
    model, _ = build(size, variant, vocab_size)
    optimizer, context = optimizer_of(size, variant, model, lr), context_of(size, variant)
    stream = batches(data['train'], model.config.block_size, seed)
    curve, loads = [], collections.deque(maxlen=100)  # the last iterations, for MaxVio and dead experts
    for it in range(steps):
        if it > 0 and it % (steps // 8) == 0:
            curve.append([it, round(loss_on(model, data['val'][:20_000]), 4)])
        late = it >= 0.67 * steps  # as train.py
        mtp_lambda = min(0.1, model.config.mtp_lambda) if late else model.config.mtp_lambda
        loads.append(iteration(model, optimizer, context, *next(stream), rate(it, steps, lr), mtp_lambda))
    record = {'size': size, 'variant': variant, 'lr': lr, 'seed': seed, 'steps': steps, 'curve': curve,
              'held': round(loss_on(model, data['held']), 4), 'val': round(loss_on(model, data['val']), 4)}
    if loads[-1] is not None:
        routed = torch.stack([*loads]).float()                              # (iterations, MoE layers, E)
        record['max_vio'] = round((routed.amax(-1) / routed.mean(-1) - 1).mean().item(), 3)
        record['dead'] = round((routed.mean(0) < 0.01 * routed.mean()).float().mean().item(), 4)
    if len(model.mtp):
        record['accepted'] = [round(share, 4) for share in accepted_drafts(model, data['val'])]
    return record


# ---------------------------------------------------------------------------------------------------------------------
# all runs

def read_results():
    if not os.path.exists(RESULTS):
        return [], []
    lines = [json.loads(line) for line in open(RESULTS)]
    return [r for r in lines if 'val' in r], [r for r in lines if 'ms' in r]


def append(record):
    with open(RESULTS, 'a') as f:
        f.write(json.dumps(record) + '\n')


def sweep(runs, size, variant):
    """{lr: loss on the left-out tenth} of the sweep's runs, at seed 0."""
    return {r['lr']: r['held'] for r in runs if (r['size'], r['variant'], r['seed'], r['steps']) ==
            (size, variant, 0, SIZES[size]['steps'])}


def best_rate(runs, size, variant):
    found = sweep(runs, size, variant)
    return min(found, key=lambda lr: found[lr] if math.isfinite(found[lr]) else math.inf)


def missing(runs, size, variant, seeds):
    """The next jobs of a variant: the sweep, then its next rate where the best is at its edge, then the other seeds."""
    steps, found = SIZES[size]['steps'], sweep(runs, size, variant)
    center = 0.01 if 'optimizer' in settings_of(size, variant) else 0.002
    jobs = [(size, variant, lr, 0, steps) for lr in (center / 2, center, 2 * center) if lr not in found]
    if jobs:
        return jobs
    best = best_rate(runs, size, variant)
    if best in (min(found), max(found)):
        return [(size, variant, best / 2 if best == min(found) else best * 2, 0, steps)]
    lengths = [steps // 2, 3 * steps // 4, steps, 3 * steps // 2, 2 * steps] if variant == 'base' else [steps]
    done = {(r['size'], r['variant'], r['lr'], r['seed'], r['steps']) for r in runs}
    return [job for n in lengths for seed in range(seeds) if (job := (size, variant, best, seed, n)) not in done]


def run_all(sizes, only, workers, seeds):
    todo = [(size, variant) for size in sizes for question, found in variants(size).items() for variant in found
            if only in (None, question, variant)]
    need(todo, f'--only={only} names no question and no variant')
    runs, under_way = read_results()[0], {}
    on_ctrl_c = signal.SIGINT, signal.SIG_DFL
    with ProcessPoolExecutor(workers, multiprocessing.get_context('spawn'), signal.signal, on_ctrl_c) as pool:
        while True:
            jobs = [job for size, variant in todo for job in missing(runs, size, variant, seeds)
                    if job not in under_way.values()]
            under_way |= {pool.submit(train, job): job for job in jobs[:workers - len(under_way)]}
            if not under_way:
                return
            for future in wait(under_way, return_when=FIRST_COMPLETED).done:
                del under_way[future]
                runs.append(future.result())
                append(runs[-1])
                print({k: v for k, v in runs[-1].items() if k != 'curve'}, flush=True)


def time_all(sizes, rounds=8, iterations=4):
    """Milliseconds per iteration of every variant: the least of rounds in which the variants take turns, because other
    work on the machine only adds.
    """
    for size in sizes:
        data, vocab_size = load(size)
        names = [variant for found in variants(size).values() for variant in found]
        models = {name: build(size, name, vocab_size) for name in names}
        steps, ms = {}, collections.defaultdict(list)
        for name, (model, _) in models.items():
            steps[name] = (model, optimizer_of(size, name, model, 1e-3), context_of(size, name),
                           *next(batches(data['train'], model.config.block_size, 0)), 1e-3, 0.3)
            iteration(*steps[name])
        for _ in range(rounds):
            for name in names:
                iteration(*steps[name])
                start = time.perf_counter()
                for _ in range(iterations):
                    iteration(*steps[name])
                ms[name].append((time.perf_counter() - start) / iterations * 1000)
        for name, (model, cached) in models.items():
            append({'size': size, 'variant': name, 'ms': round(min(ms[name]), 2), 'cache': cached,
                    'flops': model.flops_per_token(), 'parameters': model.get_num_params(),
                    'active': model.get_num_active_params()})


# ---------------------------------------------------------------------------------------------------------------------
# the report

def at_best_rate(runs, size, variant, steps=None):
    """The variant's runs at its best rate, one a seed, with so many iterations; else with the size's own."""
    wanted = (size, variant, best_rate(runs, size, variant), steps or SIZES[size]['steps'])
    return [r for r in runs if (r['size'], r['variant'], r['lr'], r['steps']) == wanted]


def mean_loss(runs):
    return statistics.mean(r['val'] for r in runs)


def against_base(runs, size, variant):
    """Loss minus the base's after equally many tokens, seed by seed."""
    base, own = ({r['seed']: r['val'] for r in at_best_rate(runs, size, name)} for name in ('base', variant))
    return [own[seed] - base[seed] for seed in sorted(own) if seed in base]


def base_after(runs, size, share, seeds):
    """What the base reaches at these seeds with `share` times the iterations, between the lengths that were run with
    all of them; None beyond.
    """
    steps = SIZES[size]['steps']
    lengths = {r['steps'] for r in runs if (r['size'], r['variant']) == (size, 'base')}
    own = {n: [r for r in at_best_rate(runs, size, 'base', n) if r['seed'] in seeds] for n in lengths}
    points = sorted((n / steps, mean_loss(found)) for n, found in own.items() if len(found) == len(seeds))
    if not points or not points[0][0] <= share <= points[-1][0]:
        return None
    shares, losses = zip(*points)
    return float(np.interp(math.log(share), [math.log(x) for x in shares], losses))


# Student's t: 95% of its values lie within plus and minus this number; by the number of seeds
T_95 = {3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}


def interval(differences):
    """The mean of a row's differences, seed by seed, and the half width of its own 95% interval."""
    n = len(differences)
    return statistics.mean(differences), T_95[n] * statistics.stdev(differences) / math.sqrt(n)


def finished(runs, size, names, seeds=3):
    return [n for n in names if sweep(runs, size, n) and len(at_best_rate(runs, size, n)) >= seeds]


def other_variants(runs, size):
    return finished(runs, size, [name for found in variants(size).values() for name in found if name != 'base'])


def differing(runs):
    """(size, number of rows, those whose interval does not contain 0)"""
    for size in SIZES:
        names = other_variants(runs, size)
        found = {name: interval(against_base(runs, size, name)) for name in names}
        yield size, len(names), [name for name in names if abs(found[name][0]) > found[name][1]]


def tables(runs, times):
    """(size, question, Markdown) of each question, with the variants that are finished."""
    for size in SIZES:
        names = other_variants(runs, size)
        for question, found in variants(size).items():
            own = [n for n in found if n in names]
            if own:
                yield size, question, table(runs, times, size, question, own)


def table(runs, times, size, question, names):
    """Differences are to the base: below 0 is better."""
    extra = {'attention': ['cache, bytes'], 'balance': ['MaxVio', 'dead'], 'MTP': ['accepted drafts'],
             'experts': ['MaxVio', 'parameters'], 'later attention': ['cache, bytes'], 'memory': ['parameters'],
             }.get(question, [])
    head = ['variant', 'val loss', 'same tokens', 'ahead', 'same FLOPs', 'same seconds', 'ms', 'rate', *extra]
    lines = [f'| {" | ".join(head)} |', '|' + '---|' * len(head)]
    time_of = {r['variant']: r for r in times if r['size'] == size}
    for name in ['base', *names]:
        own, t = at_best_rate(runs, size, name), time_of[name]
        mean = mean_loss(own)
        cells = [name, f'{mean:.4f}']
        if name == 'base':
            cells += ['0', '', '0', '0']
        else:
            differences = against_base(runs, size, name)
            mean_difference, half_width = interval(differences)
            cells += [f'{mean_difference:+.3f} ± {half_width:.3f}', f'{sum(x < 0 for x in differences)} of {len(own)}']
            for ratio in (t['flops'] / time_of['base']['flops'], t['ms'] / time_of['base']['ms']):
                reference = base_after(runs, size, ratio, {r['seed'] for r in own})
                cells.append('' if reference is None else f'{mean - reference:+.3f}')
        cells += [f'{t["ms"]:.0f}', f'{own[0]["lr"]:g}']
        mean_of = {key: statistics.mean(r[key] for r in own) if key in own[0] else None for key in ('max_vio', 'dead')}
        accepted = [statistics.mean(share) for share in zip(*(r.get('accepted', []) for r in own))]
        known = {'cache, bytes': f'{t["cache"]:,}', 'parameters': f'{t["parameters"] / 1e6:.2f}M',
                 'MaxVio': '' if mean_of['max_vio'] is None else f'{mean_of["max_vio"]:.2f}',
                 'dead': '' if mean_of['dead'] is None else f'{mean_of["dead"]:.0%}',
                 'accepted drafts': ', '.join(f'{share:.0%}' for share in accepted)}
        lines.append(f'| {" | ".join(cells + [known[name] for name in extra])} |')
    return '\n'.join(lines)


def draw(runs, times):
    """assets/insight_seconds.png: loss on 20,000 validation tokens; assets/insight_cache.png: the attentions."""
    import matplotlib.pyplot as plt
    shown = {'base': 'k-', 'MHA': 'C0--', 'dense': 'C1-', '32 experts, 8 chosen, none shared': 'C2-',
             'one module': 'C3-', 'Muon': 'C4-'}
    sizes = [size for size in SIZES if any(t['size'] == size for t in times)]
    fig, axes = plt.subplots(1, len(sizes), figsize=(5 * len(sizes), 4), layout='constrained', squeeze=False)
    for ax, size in zip(axes[0], sizes):
        ms = {r['variant']: r['ms'] for r in times if r['size'] == size}
        for name in finished(runs, size, shown):
            own = at_best_rate(runs, size, name)
            points = [(it * ms[name] / 1000, statistics.mean(r['curve'][i][1] for r in own))
                      for i, (it, _) in enumerate(own[0]['curve'])]
            ax.plot(*zip(*points), shown[name], label=name, marker='.')
        ax.set(xlabel='seconds of training, two cores', ylabel='validation loss', title=size)
        ax.grid(alpha=0.3)
    axes[0][0].legend(fontsize=8)
    fig.savefig(os.path.join(ROOT, 'assets', 'insight_seconds.png'), dpi=130)

    fig, axes = plt.subplots(1, len(sizes), figsize=(5 * len(sizes), 4), layout='constrained', squeeze=False)
    for ax, size in zip(axes[0], sizes):
        cache = {r['variant']: r['cache'] for r in times if r['size'] == size}
        names = finished(runs, size, ['base', *variants(size)['attention']])
        left_out = 'MLA without RoPE', 'MLA, RoPE on twice as much', "MLA, MHA's parameters"  # far above; beside others
        names = sorted((n for n in names if n not in left_out), key=cache.get)
        loss = {name: mean_loss(at_best_rate(runs, size, name)) for name in names}
        for name in names:
            highest = max(loss[n] for n in names if cache[n] == cache[name]) == loss[name]  # its words stand above
            ax.plot([cache[name]], [loss[name]], 'o' if name == 'base' or 'MLA' in name else 's')
            ax.annotate('MLA' if name == 'base' else name, (cache[name], loss[name]), fontsize=7,
                        xytext=(4, 4 if highest else -10), textcoords='offset points')
        ax.set(xscale='log', xlabel='cache, bytes per token (bf16)', ylabel='validation loss', title=size)
        ax.set_xticks([*map(cache.get, names)], [*map(cache.get, names)], minor=False, fontsize=7, rotation=60)
        ax.set_xticks([], minor=True)
        ax.margins(0.15)
        ax.grid(alpha=0.3)
    fig.savefig(os.path.join(ROOT, 'assets', 'insight_cache.png'), dpi=130)


def report():
    runs, times = read_results()
    for size, question, text in tables(runs, times):
        print(f'### {question}, {size}\n\n{text}\n')
    for size, rows, names in differing(runs):
        print(f'- {size}, {len(names)} of {rows} rows: {"; ".join(names)}')  # whose interval does not contain 0
    draw(runs, times)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS,  # the docstring has it
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('what', choices=('run', 'time', 'report'))
    parser.add_argument('--only', help='one question or one variant')
    parser.add_argument('--size', choices=tuple(SIZES))
    parser.add_argument('--workers', type=int, default=2)
    parser.add_argument('--seeds', type=int, default=3)
    args = parser.parse_args()
    chosen = [args.size] if args.size else list(SIZES)
    if args.what == 'run':
        run_all(chosen, args.only, args.workers, args.seeds)
    elif args.what == 'time':
        time_all(chosen)
    else:
        report()
