"""
Times this model beside its peers, in one run and on one machine: training steps, decoding, and the loss alone.

    python bench.py train                                   # every peer, at the sizes of config/train_deepseek.py
    python bench.py train --peer=ours,gpt2 --n_layer=12 --num_nextn_predict_layers=0
    python bench.py decode --peer=ours,transformers --dtype=float32 --batch_size=1
    python bench.py loss --json
    python bench.py size config/train_v4.py --batch_size=4  # nothing is run: parameters, FLOPs, cache, memory

`size` takes train.py's config files and flags. The other commands run each row in a process of its own, so that its
peak memory is its own too. Every row measures a dense GEMM in its dtype (decoding: a matrix-vector product) before and
after its own work: on a machine whose speed drifts, compare the ratios. Any field of GPTConfig may be given as
--key=value.
"""

import contextlib
import dataclasses
import json
import os
import resource
import runpy
import statistics
import subprocess
import sys
import time

import configurator  # noqa: F401 (Ctrl-C during the slow imports is one line)

# isort: split
if sys.argv[1:2] in (['-h'], ['--help']):
    print(__doc__.strip())
    raise SystemExit

import torch
from torch.nn import functional as F

from extras import guard, scripts
from extras.decode import Decoder, for_decoding
from model import GPT, GPTConfig, LinearCrossEntropy, cross_entropy_rows, first_line

_here = os.path.dirname(os.path.abspath(__file__))
PEERS = {'train': ['ours', 'dense', 'transformers', 'gpt2'],
         'decode': ['ours', 'dense', 'transformers', 'gpt2', 'nanogpt'],
         'loss': ['ours', 'plain', 'torch']}
_as_json = '--json' in sys.argv
sys.argv = [arg for arg in sys.argv if arg != '--json']
_what = sys.argv.pop(1) if len(sys.argv) > 1 else ''
guard.need(_what in PEERS or _what == 'size', f'usage: python bench.py {"|".join(PEERS)} [--peer=NAME,...] [--json] '
           '[--key=value ...], or python bench.py size [CONFIG] [--json] [--key=value ...]')
if _what == 'size':
    from extras import sizes
    with contextlib.redirect_stdout(sys.stderr):
        _found = sizes.measure(sizes.read_settings(_here), _here)
    print(json.dumps(_found) if _as_json else sizes.table(_found))
    raise SystemExit

# -----------------------------------------------------------------------------
# the model: GPTConfig's defaults, and over them the main run's sizes
settings = {field.name: field.default for field in dataclasses.fields(GPTConfig)}
main_run = runpy.run_path(os.path.join(_here, 'config', 'train_deepseek.py'))
settings |= {k: main_run[k] for k in settings if k in main_run} | {'eos_token_id': -1}
globals().update(settings)
peer = ','.join(PEERS[_what])  # those to run, with commas between
batch_size = 2 if _what == 'train' else 1
steps = 5  # timed ones, after two more
prompt_tokens = 960  # decode: tokens in the context before the first that is timed
new_tokens = 60  # decode: tokens that are timed
rows = 6144  # loss: tokens
gemm_size = 0  # side of the reference product's matrices; 0: 8192 on a GPU, 2048 elsewhere
device = scripts.default_device()
dtype = 'bfloat16'  # or 'float32', which a CPU without native bf16 needs
compile = _what == 'train'  # torch.compile: here blocks and loss, or the decoding step; training peers whole
activation_memory = 1.0  # train: as in train.py, for this model and its dense twin
with contextlib.redirect_stdout(sys.stderr):  # the table, or the JSON, has standard output to itself
    exec(open(os.path.join(_here, 'configurator.py')).read())
# -----------------------------------------------------------------------------
guard.check_ranges(globals(), [
    ('peer', lambda x: set(x.split(',')) <= set(PEERS[_what]), f'name some of {",".join(PEERS[_what])}'),
    ('batch_size prompt_tokens', lambda x: 1 <= x <= 2**20, 'lie in 1..2**20'),
    ('new_tokens', lambda x: 2 <= x <= 2**20, 'lie in 2..2**20: a time is that between two tokens'),
    ('steps', lambda x: 1 <= x <= 10**6, 'lie in 1..10**6'),
    ('rows', lambda x: 1 <= x <= 2**31, 'lie in 1..2**31'),
    ('gemm_size', lambda x: 0 <= x <= 2**16, 'lie in 0..2**16'),
    ('activation_memory', lambda x: 0 <= x <= 1, 'lie in 0..1'),
    ('dtype', lambda x: x in guard.DTYPES, "be 'float32', 'bfloat16' or 'float16'"),
])
device_type = guard.check_device(device)
context = scripts.autocast(device_type, dtype)
config = GPTConfig(**{name: globals()[name] for name in settings})
guard.need(_what != 'decode' or prompt_tokens + new_tokens <= config.block_size,
           f'prompt_tokens={prompt_tokens} and new_tokens={new_tokens} do not fit in block_size={config.block_size}')


def clock():
    if device_type != 'cpu':
        torch.accelerator.synchronize()
    return time.perf_counter()


def median_time(f, n=steps, warm=2):
    """Median seconds of f() over n calls, and the seconds that its first call took."""
    times = []
    for _ in range(warm + n):
        t = clock()
        f()
        times.append(clock() - t)
    return statistics.median(times[warm:]), times[0]


def gemm_flops():
    """FLOP/s of a dense matrix product in the dtype of the run."""
    n = gemm_size or (8192 if device_type == 'cuda' else 2048)
    a, b = (torch.randn(n, n, device=device, dtype=getattr(torch, dtype)) for _ in range(2))
    return 2 * n ** 3 / median_time(lambda: a @ b, n=7)[0]


def weight_bandwidth():
    """Bytes/s at which matrix-vector products read weights that no cache holds."""
    n = gemm_size or 2048
    weights = torch.randn(64, n, n, device=device).to(getattr(torch, dtype))
    x = torch.randn(1, n, device=device).to(weights.dtype)

    def read():
        for w in weights:
            F.linear(x, w)
    return weights.nbytes / median_time(read, n=7)[0]


def peak_memory():
    """GiB: allocated on a GPU; resident, with python and torch themselves, on a CPU."""
    if device_type == 'cuda':
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024) / 2**30


def build(name):
    """A peer with random weights: the model, FLOPs per training token."""
    if name in ('ours', 'dense'):
        # dense: one FFN as wide as the experts that a token meets
        model = GPT(dataclasses.replace(config, n_routed_experts=0) if name == 'dense' else config)
        scripts.use_kernels(model.to(device))
        return model, model.flops_per_token()
    import transformers
    transformers.logging.set_verbosity_error()
    if name == 'transformers':
        if config.num_nextn_predict_layers > 0 and _what == 'train':
            print('transformers does not train MTP modules: its row is the main stack alone', file=sys.stderr)
        main = dataclasses.replace(config, num_nextn_predict_layers=0)
        hf = transformers.DeepseekV3Config(
            vocab_size=main.vocab_size, hidden_size=main.n_embd, intermediate_size=main.intermediate_size,
            moe_intermediate_size=main.moe_intermediate_size, num_hidden_layers=main.n_layer,
            num_attention_heads=main.n_head, num_key_value_heads=main.n_head, n_shared_experts=main.n_shared_experts,
            n_routed_experts=main.n_routed_experts, num_experts_per_tok=main.num_experts_per_tok,
            q_lora_rank=main.q_lora_rank or None, kv_lora_rank=main.kv_lora_rank, v_head_dim=main.v_head_dim,
            qk_nope_head_dim=main.qk_nope_head_dim, qk_rope_head_dim=main.qk_rope_head_dim, n_group=main.n_group,
            topk_group=main.topk_group, first_k_dense_replace=main.first_k_dense_replace,
            routed_scaling_factor=main.routed_scaling_factor, max_position_embeddings=main.block_size,
            tie_word_embeddings=main.tie_word_embeddings, eos_token_id=None, bos_token_id=None, pad_token_id=None)
        with torch.device('meta'):
            flops = GPT(main).flops_per_token()
        return transformers.DeepseekV3ForCausalLM(hf).to(device), flops
    # GPT-2 124M. For decoding, `nanogpt` is the same without a cache, which is what nanoGPT's generate does.
    hf = transformers.GPT2Config(n_positions=config.block_size, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
                                 eos_token_id=None, bos_token_id=None)
    model = transformers.GPT2LMHeadModel(hf)
    weights = sum(p.numel() for p in model.parameters()) - model.transformer.wpe.weight.numel()
    return model.to(device), 6 * weights + 12 * hf.n_layer * hf.n_embd * config.block_size


def train(name):
    torch.manual_seed(0)
    model, flops = build(name)
    model.train()
    if isinstance(model, GPT):
        optimizer = model.configure_optimizers(0.1, 1e-4, (0.9, 0.95), device_type)
        if compile:
            scripts.keep_activations(activation_memory)
            model.compile()

        def loss_of(x, y):
            return model(x, y)[1]
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

        def loss_of(x, y):
            logits = model(input_ids=x, use_cache=False).logits             # (B, T, V)
            return F.cross_entropy(logits.float().flatten(0, 1), y.flatten())
        if compile:
            loss_of = torch.compile(loss_of)
    length = config.block_size
    data = torch.randint(min(config.vocab_size, 50257), (batch_size, length + 1), device=device)
    x, y = data[:, :-1].contiguous(), data[:, 1:].contiguous()

    def step():
        with context:
            loss = loss_of(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if isinstance(model, GPT) and 'load' in model.stats:
            model.update_balance(model.stats['load'])

    gemm = gemm_flops()
    dt, first = median_time(step)
    gemm = (gemm + gemm_flops()) / 2
    tokens = batch_size * length / dt
    return {'tokens/s': tokens, 'first step s': first, 'peak GiB': peak_memory(),
            'GFLOP/s': tokens * flops / 1e9, 'of a GEMM': tokens * flops / gemm}


def bytes_read(config, batch):
    """Bytes of weights that one decoded position per row needs at least: each active weight once."""
    with torch.device('meta'):
        model = GPT(dataclasses.replace(config, num_nextn_predict_layers=0))
    E, K = config.n_routed_experts, config.num_experts_per_tok
    met = E * (1 - (1 - K / E) ** batch) if E else 0                        # experts that a batch meets, on average
    expert = 3 * config.n_embd * config.moe_intermediate_size
    active = model.get_num_active_params() + model.lm_head.weight.numel()
    weights = active + len(model.moe_layers()) * expert * (met - K)
    return weights * (4 if dtype == 'float32' else 2)


def decode(name):
    torch.manual_seed(0)
    model, _ = build(name)
    idx = torch.randint(model.config.vocab_size, (batch_size, prompt_tokens), device=device)
    ours = isinstance(model, GPT)
    model = for_decoding(model, getattr(torch, dtype)) if ours else model.eval().to(getattr(torch, dtype))
    starts = []
    if ours:
        decoder = Decoder(model, compile)
        take_step = decoder.take_step
        decoder.take_step = lambda *args: (starts.append(clock()), take_step(*args))
    else:
        model.register_forward_pre_hook(lambda *_: starts.append(clock()))

    def run():
        starts.clear()
        with torch.no_grad():
            if ours:
                decoder.generate(idx.tolist(), new_tokens + 1, temperature=0)
            else:
                model.generate(idx, max_new_tokens=new_tokens + 1, do_sample=False, use_cache=name != 'nanogpt')

    bandwidth = weight_bandwidth()
    t = clock()
    run()
    first = clock() - t
    run()
    # generate as a user calls it: the time between one step and the next
    if not ours:  # its first pass is over the prompt, which here is no step
        del starts[0]
    dt = statistics.median(b - a for a, b in zip(starts, starts[1:]))
    bandwidth = (bandwidth + weight_bandwidth()) / 2
    row = {'tokens/s': batch_size / dt, 'first run s': first, 'peak GiB': peak_memory()}
    if ours:
        limit = batch_size * bandwidth / bytes_read(model.config, batch_size)
        row |= {'limit': limit, 'of it': row['tokens/s'] / limit}
    return row


def loss(name):
    torch.manual_seed(0)
    n_embd, vocab_size = config.n_embd, config.vocab_size
    h = torch.randn(rows, n_embd, device=device, requires_grad=True)
    w = (torch.randn(vocab_size, n_embd, device=device) * 0.05).requires_grad_()
    target = torch.randint(vocab_size, (rows,), device=device)
    weight = torch.full((rows,), 1 / rows, device=device)
    rows_fn = torch.compile(cross_entropy_rows) if compile else cross_entropy_rows

    def value():
        if name == 'ours':
            return LinearCrossEntropy.apply(h, w, target, weight, rows_fn, True)[0]
        if name == 'plain':
            return F.cross_entropy((h @ w.t()).float(), target)
        return F.linear_cross_entropy(h, w, target, options=torch.nn.LinearCrossEntropyOptions())

    def step():
        nonlocal h, w
        with context:
            result = value()
        result.backward()
        h.grad = w.grad = None
        return result.detach().float().item()

    gemm = gemm_flops()
    dt, first = median_time(step)
    gemm = (gemm + gemm_flops()) / 2
    return {'rows/s': rows / dt, 'first step s': first, 'peak GiB': peak_memory(), 'loss': step(),
            'of a GEMM': rows / dt * 6 * w.numel() / gemm}


def table(lines):
    columns = list(dict.fromkeys(key for line in lines for key in line))
    cells = [columns] + [[f'{v:.4g}' if isinstance(v, float) else str(v) for v in (line.get(c, '') for c in columns)]
                         for line in lines]
    widths = [max(map(len, column)) for column in zip(*cells)]
    return '\n'.join('  '.join(f'{cell:>{w}}' for cell, w in zip(row, widths)) for row in cells)


if 'BENCH_CHILD' in os.environ:
    print(json.dumps({'peer': peer} | {'train': train, 'decode': decode, 'loss': loss}[_what](peer)))
    raise SystemExit
results = []
for name in peer.split(','):
    child = subprocess.run([sys.executable, __file__, _what, *sys.argv[1:], f'--peer={name}'], capture_output=True,
                           text=True, env=os.environ | {'BENCH_CHILD': '1'})
    lines = child.stdout.splitlines()
    if child.returncode == 0 and lines:
        results.append(json.loads(lines[-1]))
    else:
        said = child.stderr.strip().splitlines() or [f'exit code {child.returncode}']  # killed for its memory
        results.append({'peer': name, 'missing': first_line(said[-1])})
    if not _as_json:
        print(f'{name}: {results[-1]}', file=sys.stderr)
print(json.dumps(results) if _as_json else table(results))
