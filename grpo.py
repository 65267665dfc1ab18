"""
R1 in small (arXiv 2501.12948): reinforcement learning with GRPO on rewards that a rule can verify.

    python data/arithmetic/prepare.py
    python train.py config/sft_arithmetic.py                  # the cold start
    python grpo.py config/grpo_arithmetic.py                  # or torchrun --standalone --nproc_per_node=2 grpo.py ...
    python grpo.py config/grpo_arithmetic.py --init_from=out-grpo-arithmetic --eval_only=True --eval_split=test
    python grpo.py config/grpo_arithmetic.py --init_from=out-grpo-arithmetic --traces=accepted.txt

An iteration samples group_size responses to each of prompts_per_iter prompts, scores them, and takes mu steps on them.
GRPO is R1's equation 1 (2402.03300 has it first); the options are Dr. GRPO's (2503.20783) and DAPO's (2503.14476).
All randomness of an iteration follows from (seed, iteration, rank), so a resumed run goes on as it would have.

Letters in the shape comments: P prompts, G responses to each, B rows (a prompt and a response), T their tokens less 1.
"""

import signal

if __name__ == '__main__':
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the run without a traceback

import contextlib
import json
import math
import os
import runpy
import shlex
import sys
import time

import numpy as np
import torch
import torch.distributed as dist

from common import (
    all_reduce,
    autocast,
    connect,
    default_device,
    device_type_of,
    disconnect,
    load_checkpoint,
    start_wandb,
    stop,
    use_kernels,
)
from extras.decode import Decoder
from extras.folder import take
from extras.scripts import is_of_run, open_log
from model import MoE, first_line, is_out_of_memory, save_checkpoint

# -----------------------------------------------------------------------------
# I/O
init_from = 'out-sft-arithmetic'  # the out_dir of the model to begin with, or 'resume': the checkpoint in out_dir
out_dir = 'out-grpo'
eval_interval = 10
eval_prompts = 500  # held-out prompts, answered greedily
eval_split = 'val'  # or 'test'
eval_only = False  # evaluate once and stop
traces = ''  # rejection sampling: write accepted responses to this file and stop
trace_prompts = 2000  # ... to so many training prompts, one response each
wandb_log = False
wandb_project = 'grpo'
wandb_run_name = 'grpo'
# the task
dataset = 'arithmetic/add3'  # a folder in data/ with {train,val,test}_prompts.txt
reward_file = 'data/arithmetic/reward.py'  # defines reward(prompt, response, answer) -> accuracy, format
format_weight = 0.1  # reward = accuracy + format_weight * format
# rollouts
prompts_per_iter = 16  # over all ranks together
group_size = 16
max_new_tokens = 40
temperature = 1.0
# objective
mu = 1  # optimizer steps on each batch of rollouts; with 1 the ratio is 1 and the clip idle
clip_low = 0.2  # the ratio is clipped to 1 - clip_low .. 1 + clip_high; DAPO: clip_high=0.28
clip_high = 0.2
kl_coef = 0.0  # weight of the KL divergence from the reference
reference = ''  # out_dir of the frozen reference; '': the model that the run began with
normalise_std = True  # False: advantages are not divided by the group's deviation (Dr. GRPO)
length_norm = 'response'  # or 'token' (DAPO) or 'constant' (Dr. GRPO): see token_weights()
drop_zero_advantage = False  # leave groups of equal rewards out of the batch (DAPO)
# optimizer
batch_size = 256  # rows in a forward and backward
max_iters = 200
learning_rate = 1e-3
warmup_iters = 5
decay_lr = True  # linearly, to zero at max_iters
weight_decay = 0.0
beta1 = 0.9
beta2 = 0.99
grad_clip = 1.0  # 0.0: no clipping
# system
seed = 1337
backend = 'nccl'  # between GPUs; CPUs use gloo
device = default_device()
dtype = 'float32'  # or 'bfloat16'
compile = False  # torch.compile the step of the rollouts: for runs that are much longer than a minute
# -----------------------------------------------------------------------------
here = os.path.dirname(os.path.abspath(__file__))
config_keys = [k for k, v in globals().items() if not k.startswith('_') and isinstance(v, (int, float, bool, str))]
config_keys.remove('here')
if __name__ == '__main__':
    exec(open(os.path.join(here, 'configurator.py')).read())  # from the command line, config files
# -----------------------------------------------------------------------------

# What a number may be: at least the first, and less than the second.
RANGES = {
    **dict.fromkeys(('max_new_tokens', 'mu', 'batch_size', 'eval_interval', 'eval_prompts', 'trace_prompts',
                     'max_iters'), (1, 2**31)),
    'warmup_iters': (0, 2**31),
    'prompts_per_iter': (1, 2**20),
    'group_size': (2, 2**20),  # an advantage compares the responses of a group
    'temperature': (0.001, math.inf),
    **dict.fromkeys(('learning_rate', 'weight_decay', 'grad_clip', 'clip_low', 'clip_high', 'kl_coef',
                     'format_weight'), (0, math.inf)),
    'beta1': (0, 1),
    'beta2': (0, 1),
    'seed': (0, 2**32),
}


def sample_responses(decoder, prompts, group_size, max_new_tokens, temperature):
    """group_size responses to each prompt (lists of token ids), in order; each ends with the stop token if it came."""
    decoder.model.eval()
    prompts = [prompt for prompt in prompts for _ in range(group_size)]
    rows, _ = decoder.generate(prompts, max_new_tokens, temperature, stop_token=decoder.model.config.eos_token_id)
    return [row[len(prompt):] for row, prompt in zip(rows, prompts)]


def pack(prompts, responses, stop_token, device):
    """Rows (B, T + 1) of a prompt and its response, filled up with the stop token, and which targets count: (B, T).

    Those of the response, its stop token included: neither the prompt nor what fills the row. All ranks' rows have one
    length, since the experts, and so the balance bias, see the filling too.
    """
    T = torch.tensor(max((len(p) + len(r) for p, r in zip(prompts, responses)), default=2) - 1, device=device)
    T = int(all_reduce(T, dist.ReduceOp.MAX))
    rows = torch.full((len(prompts), T + 1), stop_token)
    mask = torch.zeros(len(prompts), T, dtype=torch.bool)
    for i, (prompt, response) in enumerate(zip(prompts, responses)):
        rows[i, :len(prompt) + len(response)] = torch.tensor(prompt + response)
        mask[i, len(prompt) - 1:len(prompt) + len(response) - 1] = True
    return rows.to(device), mask.to(device)


def log_probs(model, rows, temperature):
    """Of rows (B, T + 1): log pi(token | those before it) (B, T), the entropy there (B, T), tokens per expert."""
    h, routing = model.main_stack(rows[:, :-1])                                         # (B, T, C)
    logp = (model.lm_head(h).float() / temperature).log_softmax(dim=-1)                 # (B, T, V)
    entropy = -(logp.detach().exp() * logp.detach()).sum(dim=-1)
    load = torch.stack([load for _, load in routing]) if routing else None              # (MoE layers, E)
    return logp.gather(-1, rows[:, 1:].unsqueeze(-1)).squeeze(-1), entropy, load


def group_advantages(rewards, normalise_std=True):
    """(P, G) -> (P, G): (r - mean) / std over each group (R1 eq. 3); without the division in Dr. GRPO."""
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    equal = (rewards == rewards[:, :1]).all(dim=1, keepdim=True)
    centred = centred.masked_fill(equal, 0.0)  # exactly 0: rounding errors / 1e-6 would be large
    if not normalise_std:
        return centred
    return centred / (rewards.std(dim=1, correction=0, keepdim=True) + 1e-6)


def token_weights(mask, length_norm, max_new_tokens):
    """Weights (B, T) of the tokens in the loss, given which of them count, (B, T), on this rank.

    'response': the mean over each response, and then over the responses of all ranks (GRPO); 'token': the mean over all
    their tokens (DAPO); 'constant': the sum over each response / max_new_tokens, and then as the first (Dr. GRPO).
    """
    mask = mask.float()
    rows = torch.tensor(float(len(mask)), device=mask.device)
    if length_norm == 'token':
        return mask / all_reduce(mask.sum()).clamp(min=1)
    lengths = mask.sum(dim=1, keepdim=True) if length_norm == 'response' else max_new_tokens
    return mask / lengths / all_reduce(rows).clamp(min=1)


def k3(logp, ref_logp):
    """KL(pi || ref), estimated at tokens drawn from pi: unbiased and never negative (R1 eq. 2). (B, T)"""
    delta = ref_logp - logp
    return delta.exp() - delta - 1


def surrogate(logp, old_logp, advantages, clip_low, clip_high):
    """What R1 eq. 1 maximises of each token, less the KL: logp, old_logp (B, T), advantages (B) -> (B, T)."""
    ratio = (logp - old_logp).exp()
    advantages = advantages.unsqueeze(1)
    return torch.minimum(ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)


def update(model, optimizer, rows, mask, advantages, *, reference=None, mu=1, clip_low=0.2, clip_high=0.2, kl_coef=0.0,
           length_norm='response', max_new_tokens=40, temperature=1.0, batch_size=256, grad_clip=1.0, context=None):
    """mu optimizer steps on this rank's rows (B, T + 1), mask (B, T), advantages (B); the ranks' gradients are summed.

    context, an autocast, is entered for each forward alone: it holds casts of the weights, which a step makes stale.
    The MTP modules stay as they are. Returns, over the tokens of all ranks and all steps, the means of 'kl' (if there
    is a reference), 'clip' (the share of tokens whose gradient the clip took) and 'entropy', and the last 'grad_norm'.
    Raises a FloatingPointError instead of taking a step with a gradient that is not finite.
    """
    context = context or contextlib.nullcontext()
    model.train()
    trained = [p for name, p in model.named_parameters() if not name.startswith('mtp.')]
    moe_layers = sum(isinstance(block.mlp, MoE) for block in model.transformer.h)
    weights = token_weights(mask, length_norm, max_new_tokens)
    parts = [slice(i, i + batch_size) for i in range(0, len(rows), batch_size)]
    old_logp, ref_logp = {}, {}
    sums = torch.zeros(4, device=rows.device)  # tokens, and the sums of KL, clipped and entropy over them
    for step in range(mu):
        loads = torch.zeros(moe_layers, model.config.n_routed_experts, device=rows.device)
        for k, part in enumerate(parts):
            uncounted = ~mask[part]  # a weight of 0 would not undo an overflow in an exp
            with context:
                logp, entropy, load = log_probs(model, rows[part], temperature)
            logp = logp.masked_fill(uncounted, 0.0)
            if step == 0:
                # the first forward of step 0 gives the sampling policy's log-probabilities
                old_logp[k] = logp.detach()
                if reference is not None:
                    with torch.no_grad(), context:
                        ref_logp[k] = log_probs(reference, rows[part], temperature)[0].masked_fill(uncounted, 0.0)
            kl = k3(logp, ref_logp[k]) if reference is not None else torch.zeros_like(logp)
            gain = surrogate(logp, old_logp[k], advantages[part], clip_low, clip_high) - kl_coef * kl
            loss = -(weights[part] * gain).sum()
            loss.backward()
            with torch.no_grad():
                ratio, A = (logp - old_logp[k]).exp(), advantages[part].unsqueeze(1)
                clipped = (A > 0) & (ratio > 1 + clip_high) | (A < 0) & (ratio < 1 - clip_low)
                counted = torch.stack([torch.ones_like(kl), kl, clipped, entropy])       # (4, B, T)
                sums += (counted * mask[part]).sum(dim=(1, 2))
            if load is not None:
                loads += load
        for p in trained:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad  # a rank may have no rows
            all_reduce(p.grad)
        norm = torch.nn.utils.clip_grad_norm_(trained, grad_clip if grad_clip > 0 else math.inf)
        if not norm.isfinite():
            raise FloatingPointError(f'the gradient is {norm.item()}')
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if moe_layers:
            model.update_balance(all_reduce(loads))
    tokens, kl, clip, entropy = all_reduce(sums).tolist()
    tokens = max(tokens, 1)
    numbers = {'kl': kl / tokens} if reference is not None else {}
    return numbers | {'clip': clip / tokens, 'entropy': entropy / tokens, 'grad_norm': norm.item()}


def load_model(folder, device):
    """The model of a folder's ckpt.pt, without dropout, the checkpoint, and its tokenizer. A response ends with the
    checkpoint's eos_token_id, or else with the tokenizer's end of text.
    """
    model, checkpoint, tokenizer = load_checkpoint(folder, device, dropout=0.0)
    if model.config.eos_token_id < 0 and tokenizer.end is None:
        stop(f'{folder}/ckpt.pt has no eos_token_id, with which a response ends: train it with one, as '
             'config/sft_arithmetic.py')
    if model.config.eos_token_id < 0:
        model.config.eos_token_id = tokenizer.end
    return use_kernels(model), checkpoint, tokenizer


def load_prompts(path, tokenizer, max_prompt):
    """[(prompt, answer)] of a file with a prompt, a tab and its answer on each line."""
    try:
        with open(path, encoding='utf-8') as f:
            pairs = [tuple(line.split('\t')) for line in f.read().splitlines()]
    except (OSError, UnicodeDecodeError) as e:
        stop(f'{path} cannot be read ({first_line(e)}): run the prepare.py of {dataset} first')
    for pair in pairs:
        if len(pair) != 2 or not pair[0]:
            stop(f'{path}: a line is a prompt, a tab and its answer, not {pair!r}')
        try:
            length = len(tokenizer.begin) + len(tokenizer.encode(pair[0]))
        except ValueError as e:
            stop(f'{path}: {pair[0]!r}: {e}')
        if length > max_prompt:
            stop(f'{path}: {pair[0]!r} and max_new_tokens={max_new_tokens} do not fit in the checkpoint\'s block_size')
    if not pairs:
        stop(f'{path} is empty')
    return pairs


def load_reward(path):
    try:
        reward = runpy.run_path(path)['reward']
    except (Exception, SystemExit) as e:  # it is any Python
        stop(f'reward_file={path} must define reward(prompt, response, answer): {type(e).__name__}: {first_line(e)}')

    def checked(prompt, response, answer):
        try:
            accuracy, form = map(float, reward(prompt, response, answer))
        except (Exception, SystemExit) as e:
            stop(f'{path}: reward({prompt!r}, {response!r}, {answer!r}): {type(e).__name__}: {first_line(e)}', True)
        if not math.isfinite(accuracy + form):
            stop(f'{path}: reward({prompt!r}, {response!r}, {answer!r}) is {accuracy}, {form}: not finite', True)
        return accuracy, form

    return checked


def main():
    # one process, or one of several under torchrun
    ddp = 'RANK' in os.environ
    rank, world = (int(os.environ['RANK']), int(os.environ['WORLD_SIZE'])) if ddp else (0, 1)
    master = rank == 0
    place = f'cuda:{os.environ["LOCAL_RANK"]}' if ddp and device.startswith('cuda') else device
    device_type = device_type_of(place)
    if device_type == 'cuda' and torch.device(place).index is not None:
        torch.cuda.set_device(place)

    for key, (low, high) in RANGES.items():
        if not low <= globals()[key] < high:
            stop(f'{key}={globals()[key]} must be at least {low}' + (f' and less than {high}' if high < math.inf else
                                                                     ' and finite'))
    if prompts_per_iter % world:
        stop(f'prompts_per_iter={prompts_per_iter} must be a multiple of the {world} ranks')
    if length_norm not in ('response', 'token', 'constant'):
        stop(f"length_norm={length_norm!r} must be 'response', 'token' or 'constant'")
    if dtype not in ('float32', 'bfloat16'):
        stop(f"dtype={dtype!r} must be 'float32' or 'bfloat16'")
    if eval_split not in ('val', 'test'):
        stop(f"eval_split={eval_split!r} must be 'val' or 'test'")
    if traces and world > 1:
        stop('traces are written by one process: run it without torchrun')
    if traces and os.path.lexists(traces):
        stop(f'traces={traces!r} is there already, and is not written over: name another file')
    if traces and not os.access(os.path.dirname(traces) or '.', os.W_OK):
        stop(f'traces={traces!r} cannot be written: no such folder, or not yours')
    run = connect(backend if device_type == 'cuda' else 'gloo') if ddp else ''

    # the model, its optimizer, and the frozen reference
    sources = [os.path.realpath(folder) for folder in (init_from, reference) if folder]
    if os.path.realpath(out_dir) in sources and not eval_only and not traces:
        stop(f'out_dir={out_dir!r} must differ from init_from and reference, which a new run would rename')
    resume = init_from == 'resume'
    if ddp and int(os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)) > 0 and not eval_only:
        own = torch.tensor(float(is_of_run(os.path.join(out_dir, 'ckpt.pt'), run)), device=place)
        resume = resume or all_reduce(own, dist.ReduceOp.MIN).item() == 1  # all ranks or none
    source = out_dir if resume else init_from
    model, checkpoint, tokenizer = load_model(source, place)
    settings = {k: globals()[k] for k in config_keys}
    settings['reference'] = reference or init_from
    optimizer = model.configure_optimizers(weight_decay, learning_rate, (beta1, beta2), device_type)
    iter_num, seconds = 0, 0.0
    if resume:
        try:
            settings['reference'] = reference or checkpoint['config']['reference']
            optimizer.load_state_dict(checkpoint['optimizer'])
            iter_num, seconds = int(checkpoint['iter_num']), float(checkpoint['seconds'])
        except (KeyError, TypeError, ValueError) as e:
            stop(f'{out_dir}/ckpt.pt was not written by grpo.py ({type(e).__name__}: {first_line(e)}): begin with '
                 f'--init_from={out_dir} and another out_dir')
    meta = checkpoint.get('meta') or {}
    frozen = None
    if kl_coef > 0 or reference:  # with a reference and kl_coef=0 the KL is logged alone
        frozen, other, its = load_model(settings['reference'], place)
        frozen.requires_grad_(False)
        if (other.get('meta') or {}).get('stoi') != meta.get('stoi') or its.sha256 != tokenizer.sha256:
            stop(f'reference={settings["reference"]!r} has other tokens than the model, so there is no KL')
    model_args, end = checkpoint['model_args'], model.config.eos_token_id
    checkpoint = other = None  # free the memory
    ctx = autocast(device_type, dtype)
    decoder = Decoder(model, compile)

    # the task
    max_prompt = model.config.block_size - max_new_tokens
    folder = os.path.join(here, 'data', dataset)
    pairs = {split: load_prompts(os.path.join(folder, f'{split}_prompts.txt'), tokenizer, max_prompt)
             for split in ('train', eval_split)}
    reward = load_reward(os.path.join(here, reward_file))

    def answer(questions, group_size, temperature):
        """Responses to (prompt, answer) pairs: (prompts, responses) as token ids, texts, and scores (B, 2)."""
        prompts = [tokenizer.begin + tokenizer.encode(prompt) for prompt, _ in questions]
        with ctx:
            responses = sample_responses(decoder, prompts, group_size, max_new_tokens, temperature)
        texts = [tokenizer.decode(response) for response in responses]
        questions = [question for question in questions for _ in range(group_size)]
        scores = [reward(prompt, text, right) for (prompt, right), text in zip(questions, texts)]
        return [p for p in prompts for _ in range(group_size)], responses, texts, torch.tensor(scores)

    def evaluate():
        """Greedy answers to the first eval_prompts held-out prompts, shared out over the ranks."""
        questions = pairs[eval_split][:eval_prompts]
        mine = questions[rank::world]
        sums = torch.zeros(3, device=place)
        for i in range(0, len(mine), 1024):
            _, responses, _, scores = answer(mine[i:i + 1024], 1, 0.0)
            sums += torch.tensor([*scores.sum(dim=0), sum(map(len, responses))], device=place)
        accuracy, form, length = (all_reduce(sums) / len(questions)).tolist()
        return {f'{eval_split}_accuracy': accuracy, f'{eval_split}_format': form, f'{eval_split}_length': length}

    if traces:
        write_traces(pairs['train'][:trace_prompts], answer, end)
        return

    def log(record):
        try:
            log_file.write(json.dumps(record).encode() + b'\n')
        except OSError as e:
            stop(f'{log_path} cannot be written: {e.strerror}; the last checkpoint in {out_dir} is as it was')
        if wandb_log:
            wandb.log(record, step=record['step'])

    # whatever can fail comes before an earlier run's files are renamed: an evaluation, wandb, writing into out_dir
    result = evaluate()
    if master:
        if wandb_log:
            wandb = start_wandb(project=wandb_project, name=wandb_run_name, config=settings)
        log_path = os.path.join(out_dir, 'eval.jsonl' if eval_only else 'log.jsonl')
        header = {'command': shlex.join(sys.argv), 'config': settings, 'model_args': model_args, 'world_size': world}
        try:
            if not eval_only:
                take(out_dir, None if resume else source)
            log_file = open_log(log_path, header)
        except ValueError as e:
            stop(str(e))
        if resume:
            print(f'going on from {out_dir}/ckpt.pt, iteration {iter_num}')

    while True:
        if result is None and (iter_num % eval_interval == 0 or iter_num >= max_iters):
            result = evaluate()
        if result is not None and master:
            print(f'step {iter_num}: {eval_split} accuracy {result[f"{eval_split}_accuracy"]:.1%}, '
                  f'format {result[f"{eval_split}_format"]:.1%}, length {result[f"{eval_split}_length"]:.1f}, '
                  f'after {seconds:.0f} s')
            log({'step': iter_num, 'seconds': seconds, **result})
            if iter_num > 0 and not eval_only:
                try:  # train.py's format
                    save_checkpoint({'model': model.state_dict(), 'optimizer': optimizer.state_dict(), 'scaler': {},
                                     'model_args': model_args, 'iter_num': iter_num, 'best_val_loss': math.inf,
                                     'config': settings, 'meta': meta, 'seconds': seconds, 'run': run},
                                    os.path.join(out_dir, 'ckpt.pt'))
                except ValueError as e:  # a full disk
                    stop(str(e))
        result = None
        if iter_num >= max_iters or eval_only:
            break

        torch.manual_seed((seed + iter_num) * world + rank)  # whatever is random in this iteration
        t0 = time.time()
        lr = learning_rate * min((iter_num + 1) / (warmup_iters + 1), 1 - iter_num / max_iters if decay_lr else 1)
        for group in optimizer.param_groups:
            group['lr'] = lr

        # rollouts: prompts drawn alike on every rank, of which each answers its share
        drawn = np.random.default_rng((seed, iter_num)).integers(len(pairs['train']), size=prompts_per_iter)
        questions = [pairs['train'][i] for i in drawn[rank::world]]
        prompts, responses, _, scores = answer(questions, group_size, temperature)
        rewards = scores[:, 0] + format_weight * scores[:, 1]                           # (B,)
        groups = rewards.view(-1, group_size)                                           # (P, G)
        advantages = group_advantages(groups, normalise_std)                            # (P, G)
        idle = (advantages == 0).all(dim=1)                                             # (P,): groups of equal rewards
        t1 = time.time()

        # update
        rows, mask = pack(prompts, responses, end, place)
        advantages = advantages.flatten().to(place)                                     # (B,)
        if drop_zero_advantage:
            kept = ~idle.repeat_interleave(group_size).to(place)
            rows, mask, advantages = rows[kept], mask[kept], advantages[kept]
        numbers = {'clip': 0.0, 'entropy': None, 'grad_norm': 0.0}  # those of no rows
        if all_reduce(torch.tensor(len(rows), device=place)) > 0:
            try:
                numbers = update(model, optimizer, rows, mask, advantages, reference=frozen, mu=mu, clip_low=clip_low,
                                 clip_high=clip_high, kl_coef=kl_coef, length_norm=length_norm,
                                 max_new_tokens=max_new_tokens, temperature=temperature, batch_size=batch_size,
                                 grad_clip=grad_clip, context=ctx)
            except FloatingPointError as e:
                stop(f'iteration {iter_num}: {e}; the last checkpoint in {out_dir} is as it was')

        # log
        sums = torch.tensor([rewards.sum(), *scores.sum(dim=0), sum(map(len, responses)), idle.sum() * group_size])
        sums = all_reduce(sums.to(place)) / (prompts_per_iter * group_size)
        reward_mean, accuracy, form, length, zero_advantage = sums.tolist()
        dt = time.time() - t0
        seconds += dt
        record = {'step': iter_num, 'seconds': seconds, 'reward': reward_mean, 'accuracy': accuracy, 'format': form,
                  'length': length, 'zero_advantage': zero_advantage, **numbers, 'lr': lr,
                  'tokens_per_s': length * prompts_per_iter * group_size / dt, 'rollout_share': (t1 - t0) / dt}
        if master:
            print(f'iter {iter_num}: reward {reward_mean:.3f}, accuracy {accuracy:.1%}, format {form:.1%}, length '
                  f'{length:.1f}, zero-advantage {zero_advantage:.0%}, '
                  + (f'kl {record["kl"]:.4f}, ' if 'kl' in record else '') +
                  f'clip {record["clip"]:.1%}, time {dt * 1000:.0f}ms, {record["tokens_per_s"]:,.0f} tok/s')
            log(record)
        iter_num += 1
    disconnect()


def write_traces(questions, answer, end):
    """Rejection sampling (R1 section 2.3.3): to each prompt its first response that is right, well-formed and ended."""
    torch.manual_seed(seed)
    lines = []
    for i in range(0, len(questions), prompts_per_iter):
        part = questions[i:i + prompts_per_iter]
        _, responses, texts, scores = answer(part, group_size, temperature)
        for n, (prompt, _) in enumerate(part):
            group = range(n * group_size, (n + 1) * group_size)
            accepted = [texts[k] for k in group if scores[k].min() >= 1 and responses[k][-1] == end]
            lines += [prompt + accepted[0]] if accepted else []
    if not lines:
        stop(f'none of {len(questions)} prompts has an accepted response of {group_size}: {traces} is not written')
    try:
        with open(traces + '.tmp', 'w', encoding='utf-8') as f:
            f.writelines(lines)
        os.replace(traces + '.tmp', traces)
    except OSError as e:
        stop(f'traces={traces!r} cannot be written: {e.strerror}')
    print(f'{len(lines)} of {len(questions)} prompts have an accepted response of {group_size}: {traces}')


if __name__ == '__main__':
    try:
        main()
    except (MemoryError, RuntimeError) as e:
        if not is_out_of_memory(e):
            raise
        stop(f'out of memory: make prompts_per_iter, group_size or batch_size smaller ({first_line(e)})', True)
