"""
R1 in small (arXiv 2501.12948): reinforcement learning with GRPO on rewards that a rule can verify.

    python data/arithmetic/prepare.py
    python train.py config/sft_arithmetic.py                  # the cold start
    python grpo.py config/grpo_arithmetic.py                  # or torchrun --standalone --nproc_per_node=2 grpo.py ...
    python grpo.py config/grpo_arithmetic.py --init_from=out-grpo-arithmetic --eval_only=True --eval_split=test
    python grpo.py config/grpo_arithmetic.py --init_from=out-grpo-arithmetic --traces=accepted.txt

An iteration samples group_size responses to each of prompts_per_iter prompts, scores them, and takes mu steps on them.
GRPO is R1's equation 1 (first in 2402.03300); the options come from Dr. GRPO (2503.20783), DAPO (2503.14476) and
V3.2 (2512.02556, section 3.1). With a teacher the loss is on-policy distillation, as in V4.
All randomness of an iteration follows from (seed, iteration, rank), so a resumed run equals an uninterrupted one.

Letters in the shape comments: P prompts, G responses to each, B rows (a prompt and a response), T their tokens less 1.
"""

import contextlib
import json
import math
import os
import time

import configurator

# isort: split
if __name__ == '__main__':
    configurator.answer_help(__file__)

import numpy as np
import torch
import torch.distributed as dist

from extras import folder, guard, rl, scripts
from extras.decode import Decoder
from extras.scripts import all_reduce, autocast
from model import Mistake, MoE, balance_and_load, save_checkpoint

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
dataset = 'arithmetic/add3'  # a folder in data/ with {train,val,test}_prompts.txt, or several: 'a,b'
reward_file = 'data/arithmetic/reward.py'  # defines reward(prompt, response, answer) -> accuracy, format; or 'a,b'
format_weight = 0.1  # reward = accuracy + format_weight * format
# rollouts
prompts_per_iter = 16  # over all ranks together
group_size = 16
max_new_tokens = 40
temperature = 1.0
top_k = 0  # sample from the top_k likeliest tokens; 0: from all
top_p = 1.0  # ... and from the likeliest ones whose probabilities sum to top_p
truncated = 'keep'  # responses that max_new_tokens cut off; 'mask': they count in their group's mean, not in the loss
# objective
mu = 1  # optimizer steps on each batch of rollouts; with 1 the ratio is 1 and the clip idle
clip_low = 0.2  # the ratio is clipped to 1 - clip_low .. 1 + clip_high; DAPO: clip_high=0.28
clip_high = 0.2
old_logp = 'training'  # the old policy's log-probabilities: the first forward's, or 'rollout': the sampler's
replay_routing = False  # train with the experts that the rollout chose (V3.2)
keep_sampling_mask = False  # train with the softmax over the tokens that top_k and top_p left (V3.2)
mask_drift = 0.0  # leave out bad responses whose mean log(pi_rollout / pi) is above this bound (V3.2); 0.0: off
kl_coef = 0.0  # weight of the KL divergence from the reference
unbiased_kl = False  # weigh the KL by the ratio, so that its gradient is unbiased too (V3.2)
reference = ''  # out_dir of the frozen reference; '': the model that the run began with
normalise_std = True  # False: advantages are not divided by the group's deviation (Dr. GRPO)
length_norm = 'response'  # or 'token' (DAPO) or 'constant' (Dr. GRPO): see token_weights()
drop_zero_advantage = False  # leave groups of equal rewards out of the batch (DAPO)
teacher = ''  # out_dir of a teacher: minimise KL(model || teacher) on the model's own responses, instead of all above
train_mtp = False  # train the MTP modules on the responses, so that their drafts stay good
# optimizer
batch_size = 256  # rows in a forward and backward; for less memory lower it, group_size or prompts_per_iter
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
device = scripts.default_device()
dtype = 'float32'  # or 'bfloat16'
compile = False  # torch.compile the step of the rollouts: for runs that are much longer than a minute
# -----------------------------------------------------------------------------
config_keys = [k for k, v in globals().items() if not k.startswith('_') and isinstance(v, (int, float, bool, str))]
if __name__ == '__main__':
    exec(open(os.path.join(os.path.dirname(__file__), 'configurator.py')).read())  # from the command line, config files
here = os.path.dirname(os.path.abspath(__file__))

RANGES = [  # in the format of guard.RANGES
    ('max_new_tokens mu batch_size eval_interval eval_prompts trace_prompts max_iters', lambda x: 1 <= x < 2**31,
     'lie in 1..2**31 - 1'),
    ('warmup_iters', lambda x: 0 <= x < 2**31, 'lie in 0..2**31 - 1'),
    ('prompts_per_iter', lambda x: 1 <= x < 2**20, 'lie in 1..2**20 - 1'),
    ('prompts_per_iter', lambda x: x % world == 0, 'be a multiple of the number of ranks'),
    ('group_size', lambda x: 2 <= x < 2**20, 'lie in 2..2**20 - 1: an advantage compares the responses of a group'),
    ('temperature', lambda x: 0.001 <= x < math.inf, 'be finite and at least 0.001'),
    ('top_k', lambda x: 0 <= x < 2**31, 'lie in 0..2**31 - 1'),
    ('top_p', lambda x: 0 < x <= 1, 'lie in (0, 1]'),
    ('learning_rate weight_decay grad_clip clip_low clip_high kl_coef format_weight mask_drift',
     lambda x: 0 <= x < math.inf, 'be finite and not negative'),
    ('kl_coef', lambda x: x == 0 or not teacher, 'be 0 with a teacher: the loss is the KL divergence from it alone'),
    ('beta1 beta2', lambda x: 0 <= x < 1, 'lie in [0, 1)'),
    ('seed', lambda x: 0 <= x < 2**32, 'lie in 0..2**32 - 1'),
    ('length_norm', lambda x: x in ('response', 'token', 'constant'), "be 'response', 'token' or 'constant'"),
    ('old_logp', lambda x: x in ('training', 'rollout'), "be 'training' or 'rollout'"),
    ('old_logp', lambda x: x == 'training' or same_support(), "be 'training' with top_k or top_p: the rollout's "
     'log-probabilities are over fewer tokens, unless keep_sampling_mask=True'),
    ('mask_drift', lambda x: x == 0 or same_support(), "be 0 with top_k or top_p: the rollout's log-probabilities are "
     'over fewer tokens, unless keep_sampling_mask=True'),
    ('truncated', lambda x: x in ('keep', 'mask'), "be 'keep' or 'mask'"),
    ('dtype', lambda x: x in ('float32', 'bfloat16'), "be 'float32' or 'bfloat16'"),
    ('eval_split', lambda x: x in ('val', 'test'), "be 'val' or 'test'"),
    ('traces', lambda x: not x or world == 1, 'be written by one process: run it without torchrun'),
    ('traces', lambda x: not os.path.lexists(x), 'name a new file: that one is there already'),
    ('traces', lambda x: os.access(os.path.dirname(x) or '.', os.W_OK) or not x, 'be in a folder you can write to'),
]


def same_support():
    """Whether rollout and training have their softmax over the same tokens"""
    return keep_sampling_mask or (top_k == 0 and top_p == 1)


def sample_responses(decoder, prompts, max_new_tokens, temperature, top_k=0, top_p=1.0):
    """A response to each prompt, both as token ids. It ends with the stop token, unless it was cut off. Afterwards
    decoder has the log-probabilities of its tokens, and what it was told to keep.
    """
    decoder.model.eval()
    rows, _ = decoder.generate(prompts, max_new_tokens, temperature, top_k or None, decoder.model.config.eos_token_id,
                               top_p=top_p)
    return [row[len(prompt):] for row, prompt in zip(rows, prompts)]


def pack(prompts, responses, stop_token, device, log_probs=None):
    """Rows (B, T + 1): prompt, response, stop tokens as filling. mask (B, T): True for a target in the response.
    sampled_logp (B, T): the log_probs of these targets, from the rollout (0 if None); 1 elsewhere.
    """
    T = max((len(p) + len(r) for p, r in zip(prompts, responses)), default=2) - 1
    rows = torch.full((len(prompts), T + 1), stop_token)
    sampled_logp = torch.ones(len(prompts), T)
    for i, (prompt, response) in enumerate(zip(prompts, responses)):
        rows[i, :len(prompt) + len(response)] = torch.tensor(prompt + response)
        targets = slice(len(prompt) - 1, len(prompt) + len(response) - 1)
        sampled_logp[i, targets] = torch.tensor(log_probs[i]).clamp(max=0) if log_probs else 0.0
    sampled_logp = sampled_logp.to(device)
    return rows.to(device), sampled_logp <= 0, sampled_logp


def log_probs(model, rows, temperature, support=None):
    """Rows (B, T + 1) -> log pi(token | tokens before it) (B, T), log pi of the whole vocabulary there (B, T, V), the
    main stack's states (B, T, C), and its routing. support (B, T, V): the tokens that could be sampled; None: all
    """
    h, routing = model.main_stack(rows[:, :-1])                                         # (B, T, C)
    logits = model.lm_head(h).float() / temperature                                     # (B, T, V)
    if support is not None:
        logits = logits.masked_fill(~support, -1e30)  # with infinity, 0 * log 0 would be nan
    logp = logits.log_softmax(dim=-1)
    return logp.gather(-1, rows[:, 1:].unsqueeze(-1)).squeeze(-1), logp, h, routing


def group_advantages(rewards, normalise_std=True):
    """(P, G) -> (P, G): (r - mean) / std over each group (R1 eq. 3); without the division in Dr. GRPO."""
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    equal = (rewards == rewards[:, :1]).all(dim=1, keepdim=True)
    centred = centred.masked_fill(equal, 0.0)  # exactly 0: rounding errors / 1e-6 would be large
    return centred / (rewards.std(dim=1, correction=0, keepdim=True) + 1e-6) if normalise_std else centred


def token_weights(mask, length_norm, max_new_tokens):
    """This rank's mask (B, T) -> the weights of its tokens in the loss (B, T), by length_norm:
    'response': the mean over each response, then the mean over the responses of all ranks (GRPO)
    'token': the mean over the tokens of all responses of all ranks (DAPO)
    'constant': the sum over each response / max_new_tokens, then the mean over the responses of all ranks (Dr. GRPO)
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
    """R1 eq. 1 without KL: logp, old_logp (B, T), advantages (B) -> gain (B, T), and where the clip acts (B, T)."""
    ratio = (logp - old_logp).exp()
    plain = ratio * advantages.unsqueeze(1)
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high) * advantages.unsqueeze(1)
    return torch.minimum(plain, clipped), clipped < plain


def update(model, optimizer, rows, mask, advantages, *, sampled_logp=None, experts=None, support=None, reference=None,
           teacher=None, mu=1, clip_low=0.2, clip_high=0.2, old_logp='training', replay_routing=False, mask_drift=0.0,
           kl_coef=0.0, unbiased_kl=False, length_norm='response', max_new_tokens=40, temperature=1.0, batch_size=256,
           grad_clip=1.0, train_mtp=False, context=None):
    """mu optimizer steps on this rank's rows (B, T + 1), mask (B, T), advantages (B); the ranks' gradients are summed.
    Of the rollout: sampled_logp (B, T), experts (B, T, L, K), support (B, T, V), the tokens to which the softmax is
    confined. With a teacher the loss is its reverse KL, and advantages do not matter.

    The MTP modules stay as they are, unless train_mtp: their loss trains them alone. A gradient that is not finite
    takes no step: it is a Mistake. Each forward enters the autocast `context` anew, because it keeps casts of the
    weights, which a step makes stale. Returns means over the tokens of all ranks and steps: 'clip' (share of tokens on
    which the clip acts), 'entropy', and if there is something to measure 'kl', 'teacher_kl', 'drifted' (share of tokens
    left out by mask_drift); of the first step 'mismatch' (mean difference of log-probabilities from the rollout's) and
    'routing_mismatch' (share of (token, MoE layer) with other experts); the last 'mtp_loss' and 'grad_norm'.
    """
    context = context or contextlib.nullcontext()
    model.train()
    main = [p for name, p in model.named_parameters() if p.requires_grad and not name.startswith('mtp.')]
    drafting = [*model.mtp.parameters()] if train_mtp else []
    moe_layers = len(model.moe_layers())
    weights = token_weights(mask, length_norm, max_new_tokens)
    parts = [slice(i, i + batch_size) for i in range(0, len(rows), batch_size)]
    old, ref_logp = {}, {}
    given = {'kl': reference, 'teacher_kl': teacher, 'drifted': mask_drift or None, 'mismatch': sampled_logp,
             'routing_mismatch': experts}
    names = ['clip', 'entropy'] + [name for name, x in given.items() if x is not None]
    sums = torch.zeros(1 + len(names), device=rows.device)  # tokens, and over them the sums of what is measured
    if train_mtp:
        labels = rl.mtp_labels(model, rows, mask)                                       # (D, B, T)
        label_counts = all_reduce((labels >= 0).sum(dim=(1, 2)))
    for step in range(mu):
        loads = torch.zeros(moe_layers, model.config.n_routed_experts, device=rows.device)
        mtp_sum = torch.zeros((), device=rows.device)
        for k, part in enumerate(parts):
            uncounted = ~mask[part]  # a weight of 0 would not undo an overflow in an exp
            allowed = None if support is None else support[part]
            with context, rl.replayed(model, experts[part] if replay_routing else None):
                logp, all_logp, h, routing = log_probs(model, rows[part], temperature, allowed)
            logp = logp.masked_fill(uncounted, 0.0)
            measured = dict.fromkeys(names, torch.zeros_like(logp))
            if step == 0:  # the weights are still those that sampled
                old[k] = logp.detach()
                if sampled_logp is not None:
                    sampled = sampled_logp[part].masked_fill(uncounted, 0.0)
                    measured['mismatch'] = (old[k] - sampled).abs()
                    old[k] = sampled if old_logp == 'rollout' else old[k]
                if experts is not None:
                    measured['routing_mismatch'] = rl.rerouted(experts[part], routing)
                if reference is not None:
                    with torch.no_grad(), context:
                        ref_logp[k] = log_probs(reference, rows[part], temperature, allowed)[0]
            gain, measured['clip'] = surrogate(logp, old[k], advantages[part], clip_low, clip_high)
            if mask_drift > 0:
                out = rl.drifted(logp.detach(), sampled_logp[part], mask[part], advantages[part], mask_drift)
                measured['drifted'] = out.unsqueeze(1).expand_as(logp)
                gain = gain.masked_fill(measured['drifted'], 0.0)
            if reference is not None:
                measured['kl'] = k3(logp, ref_logp[k].masked_fill(uncounted, 0.0))
                if unbiased_kl:
                    measured['kl'] = measured['kl'] * (logp - old[k]).exp()
                gain = gain - kl_coef * measured['kl']
            if teacher is not None:
                with torch.no_grad(), context:  # in each step anew: kept, (B, T, V) of all rows fills the memory
                    teacher_logp = log_probs(teacher, rows[part], temperature, allowed)[1]
                measured['teacher_kl'] = rl.reverse_kl(all_logp, teacher_logp)
                gain = -measured['teacher_kl']
            (-(weights[part] * gain).sum()).backward()
            measured['entropy'] = -(all_logp.detach().exp() * all_logp.detach()).sum(dim=-1)
            counted = torch.stack([torch.ones_like(logp), *(measured[name].detach() for name in names)])  # (.., B, T)
            sums += (counted * mask[part]).sum(dim=(1, 2))
            load = [balance_and_load(routing, mask[part])[1]] if routing else []  # what fills a row moves no bias
            if train_mtp:
                with context:
                    loss, more = rl.mtp_loss(model, h, rows[part], labels[:, part], label_counts)
                loss.backward(inputs=drafting)
                mtp_sum += loss.detach()
                load += [more] if more is not None else []
            if load:  # the main stack's layers, then the MTP modules': without train_mtp they have no load
                loads[:sum(map(len, load))] += torch.cat(load)
        for p in main + drafting:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad  # a rank may have no rows
            all_reduce(p.grad)
        norm, *others = [torch.nn.utils.clip_grad_norm_(params, grad_clip if grad_clip > 0 else math.inf)
                         for params in (main, drafting) if params]
        for x in (norm, *others):
            if not x.isfinite():
                raise Mistake(f'the gradient is {x.item()}: try a smaller learning_rate; the last checkpoint is whole')
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if moe_layers:
            model.update_balance(all_reduce(loads))
    tokens, *sums = all_reduce(sums).tolist()
    numbers = {name: x / max(tokens, 1) for name, x in zip(names, sums)} | {'grad_norm': norm.item()}
    numbers |= {name: mu * numbers[name] for name in ('mismatch', 'routing_mismatch') if name in numbers}
    return numbers | ({'mtp_loss': all_reduce(mtp_sum).item()} if train_mtp else {})


def load_model(source, device):
    """The model of a folder's checkpoint, without dropout; the checkpoint; its tokenizer."""
    model, checkpoint, tokenizer = scripts.load_checkpoint(source, device, dropout=0.0)
    if model.config.eos_token_id < 0:  # a response ends with the tokenizer's end of text instead
        guard.need(tokenizer.end is not None, f'the model in {source} has no eos_token_id, with which a response ends: '
                   'train it with one, as config/sft_arithmetic.py')
        model.config.eos_token_id = tokenizer.end
    scripts.use_kernels(model)
    return model, checkpoint, tokenizer


def write_traces(questions, answer, end):
    """Rejection sampling (R1 section 2.3.3): to each prompt its first response that is right, well-formed and ended."""
    torch.manual_seed(seed)
    accepted = {}  # prompt -> response
    for i in range(0, len(questions), prompts_per_iter):
        part = [question for question in questions[i:i + prompts_per_iter] for _ in range(group_size)]
        _, responses, texts, scores = answer(part, temperature, top_k, top_p)
        for (prompt, *_), response, text, score in zip(part, responses, texts, scores):
            if score.min() >= 1 and response[-1] == end:
                accepted.setdefault(prompt, text.removesuffix('\n') + '\n')
    guard.need(accepted, f'{traces} is not written: none of {len(questions)} prompts has an accepted response')
    scripts.write_whole('traces', traces, [prompt + text for prompt, text in accepted.items()])
    print(f'{len(accepted)} of {len(questions)} prompts have an accepted response of {group_size}: {traces}')


if __name__ == '__main__':
    # settings, ranks and device
    config = {k: globals()[k] for k in config_keys}
    ddp = 'RANK' in os.environ  # torchrun started this process
    rank, world = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
    master = rank == 0
    guard.check_ranges(config, RANGES)
    for start in {init_from, reference, teacher} - {'', 'resume'}:
        inside = os.path.join(os.path.realpath(start), '').startswith(os.path.join(os.path.realpath(out_dir), ''))
        guard.need(traces or eval_only or not inside, f'{start} must not be in {out_dir}, which a new run renames')
    if ddp and device.startswith('cuda'):
        device = f'cuda:{os.environ["LOCAL_RANK"]}'
    device_type = guard.check_device(device)
    if device.startswith('cuda:'):
        torch.cuda.set_device(device)
    if ddp:
        store = scripts.connect(backend, device_type)
    ctx = autocast(device_type, dtype)

    # the model, its optimizer, and the frozen models
    path, best_path = (os.path.join(out_dir, name) for name in ('ckpt.pt', 'ckpt_best.pt'))
    found = folder.last_checkpoint(out_dir, ['ckpt'])
    resume = init_from == 'resume'
    if ddp and not eval_only and store.check(['begun']):  # torchrun lost a rank and started all again
        there = torch.tensor(int(os.path.exists(found)), device=device)
        resume = resume or all_reduce(there, dist.ReduceOp.MIN).item() == 1  # all ranks or none
    source = out_dir if resume else init_from
    model, checkpoint, tokenizer = load_model(source, device)
    optimizer = model.configure_optimizers(weight_decay, learning_rate, (beta1, beta2), device_type)
    guard.need(not getattr(model.config, 'index_warmup', False), f"the model in {source} is in its indexer's warm-up: "
               'train it with train.py --architecture=model_v4 first')
    model.mtp.requires_grad_(train_mtp)  # if not trained, the optimizer counts them all the same
    for name, p in model.named_parameters():
        if '.indexer.' in name:  # of model_v4.py: it keeps choosing as it has learned to
            p.requires_grad_(False)
    guard.need(not train_mtp or model.mtp, f'train_mtp=True: the model in {source} has no MTP modules')
    guard.need(not replay_routing or any(isinstance(block.mlp, MoE) for block in model.transformer.h),
               f'replay_routing=True: the model in {source} has no routed experts')
    iter_num, seconds, best_accuracy = 0, 0.0, -math.inf
    config['reference'] = reference or init_from
    if resume:
        iter_num, seconds = checkpoint.get('iter_num'), checkpoint.get('seconds')
        best_accuracy = checkpoint.get('best_accuracy', -math.inf)
        config['reference'] = reference or (checkpoint.get('config') or {}).get('reference')
        kinds = [type(x) for x in (iter_num, seconds, best_accuracy, config['reference'])]
        guard.need(kinds == [int, float, float, str] and iter_num >= 0,
                   f'{found} was not written by grpo.py: begin with --init_from={out_dir} and another out_dir')
        guard.load_optimizer(optimizer, checkpoint.get('optimizer'), found)
    ends = all_reduce(torch.tensor([iter_num, -iter_num], device=device), dist.ReduceOp.MAX)
    guard.need(ends.sum() == 0, f'the ranks hold different checkpoints: {out_dir} must be one folder for all')
    meta, frozen = checkpoint.get('meta') or {}, {}
    wanted = {'reference': config['reference'] if kl_coef > 0 or reference else '', 'teacher': teacher}
    for name, start in wanted.items():  # with a reference and kl_coef=0 the KL is logged alone
        if start:
            frozen[name], other, its = load_model(start, device)
            frozen[name].requires_grad_(False)
            guard.need((other.get('meta') or {}).get('stoi') == meta.get('stoi') and its.sha256 == tokenizer.sha256
                       and frozen[name].config.vocab_size == model.config.vocab_size,
                       f'{name}={start!r} has other tokens than the model, so there is no KL')
            guard.need(frozen[name].config.block_size >= model.config.block_size,
                       f'{name}={start!r} has block_size={frozen[name].config.block_size}, and the model '
                       f'{model.config.block_size}: it must be at least as long')
    model_args, end = checkpoint['model_args'], model.config.eos_token_id
    checkpoint = other = None  # free the memory
    keep_support = keep_sampling_mask and (top_k > 0 or top_p < 1)
    decoder = Decoder(model, compile, keep_experts=True, keep_support=keep_support)

    # the tasks: a question is a prompt, its answer and their reward()
    tasks = scripts.load_tasks(here, dataset, reward_file, ('train', eval_split), tokenizer, max_new_tokens,
                               model.config.block_size)
    training = [question for task in tasks['train'] for question in task]

    def answer(questions, temperature, *sampling):
        """A response to each question: prompts, responses as token ids, texts, and scores (B, 2)."""
        prompts = [tokenizer.begin + tokenizer.encode(prompt) for prompt, *_ in questions]
        with ctx:
            responses = sample_responses(decoder, prompts, max_new_tokens, temperature, *sampling)
        texts = [tokenizer.words(response) for response in responses]
        scores = [reward(prompt, text, right, ended=response[-1] == end)
                  for (prompt, right, reward), text, response in zip(questions, texts, responses)]
        return prompts, responses, texts, torch.tensor(scores)

    if traces:
        write_traces(training[:trace_prompts], answer, end)
        scripts.leave()
        raise SystemExit

    def evaluate():
        """Greedy answers to eval_prompts held-out prompts of each data set, shared out over the ranks -> the mean
        accuracy, and a record to log.
        """
        means = []
        for questions in (task[:eval_prompts] for task in tasks[eval_split]):
            mine = questions[rank::world]
            sums = torch.zeros(3, device=device)
            for i in range(0, len(mine), 1024):
                _, responses, _, scores = answer(mine[i:i + 1024], 0.0)
                sums += torch.tensor([*scores.sum(dim=0), sum(map(len, responses))], device=device)
            means.append(all_reduce(sums) / len(questions))                             # (3,)
        accuracy, form, length = torch.stack(means).mean(dim=0).tolist()
        each = {f'{eval_split}_accuracy {name}': x[0].item() for name, x in zip(dataset.split(','), means)}
        each = each if len(each) > 1 else {}
        if master:
            print(f'step {iter_num}: {eval_split} accuracy {accuracy:.1%}, format {form:.1%}, '
                  f'length {length:.1f}, after {seconds:.0f} s' + ''.join(f', {k} {x:.1%}' for k, x in each.items()))
        return accuracy, {'step': iter_num, 'seconds': seconds, f'{eval_split}_accuracy': accuracy,
                          f'{eval_split}_format': form, f'{eval_split}_length': length, **each}

    def log(record):
        try:
            log_file.write(json.dumps(record).encode() + b'\n')
        except OSError as e:
            raise Mistake(f'{log_file.name} could not be written: {e.strerror}; the last checkpoint is whole') from None
        if wandb_log:
            wandb.log(record, step=record['step'])

    def save(best):
        """Write the last checkpoint, in train.py's format. It is also the best one if `best`, or if there is none."""
        if master:
            save_checkpoint({'model': model.state_dict(), 'optimizer': optimizer.state_dict(), 'scaler': {},
                             'model_args': model_args, 'iter_num': iter_num, 'best_val_loss': math.inf,
                             'config': config, 'meta': meta, 'seconds': seconds, 'best_accuracy': best_accuracy},
                            path, best_path if best or best_accuracy == -math.inf else None)

    # whatever can fail comes before an earlier run's folder is renamed: an evaluation, wandb
    accuracy, record = evaluate()
    if master:
        if wandb_log:
            import wandb
            scripts.start_wandb(project=wandb_project, name=wandb_run_name, config=config)
        if not eval_only:
            folder.take(out_dir, None if resume else source)
        log_path = os.path.join(out_dir, 'eval.jsonl' if eval_only else 'log.jsonl')
        log_file = scripts.open_log(log_path, scripts.header(model, config))
        log(record)
        if resume:
            print(f'going on from {found}, iteration {iter_num} of {max_iters}'
                  + '; to train on, raise max_iters' * (iter_num >= max_iters and not eval_only))
    if ddp:
        dist.barrier()  # all ranks are ready
        store.set('begun', '')  # a restart resumes from here on
    if resume and not eval_only and accuracy > best_accuracy:  # a signal had come before this evaluation
        best_accuracy = accuracy
        save(best=True)
    signals = scripts.catch_signals()

    # the loop
    options = {k: config[k] for k in ('mu', 'clip_low', 'clip_high', 'old_logp', 'replay_routing', 'mask_drift',
                                      'kl_coef', 'unbiased_kl', 'length_norm', 'max_new_tokens', 'temperature',
                                      'batch_size', 'grad_clip', 'train_mtp')}
    began, earned = iter_num, False  # whether a reward since then was not 0
    while iter_num < max_iters and not eval_only:
        # whatever is random in this iteration
        torch.manual_seed(np.random.default_rng((seed, iter_num, 1, rank)).integers(2**63))
        t0 = time.time()
        lr = learning_rate * min((iter_num + 1) / (warmup_iters + 1), 1 - iter_num / max_iters if decay_lr else 1)
        for group in optimizer.param_groups:
            group['lr'] = lr * group.get('lr_scale', 1)

        # rollouts: every rank draws the same prompts, and answers its share
        drawn = np.random.default_rng((seed, iter_num)).integers(len(training), size=prompts_per_iter)
        questions = [training[i] for i in drawn[rank::world] for _ in range(group_size)]
        prompts, responses, texts, scores = answer(questions, temperature, top_k, top_p)
        rewards = scores[:, 0] + format_weight * scores[:, 1]                           # (B,)
        advantages = group_advantages(rewards.view(-1, group_size), normalise_std)      # (P, G)
        idle = (advantages == 0).all(dim=1)                                             # (P,): equal rewards
        t1 = time.time()

        # update
        rows, mask, sampled_logp = pack(prompts, responses, end, device, decoder.log_probs)
        batch = {'rows': rows, 'mask': mask, 'sampled_logp': sampled_logp, 'advantages': advantages.flatten()}
        if decoder.layers:
            batch['experts'] = rl.pack_experts(decoder.experts, mask.size(1))           # (B, T, L, K)
        if keep_support:
            batch['support'] = rl.pack_support(decoder.support, prompts, mask.size(1))  # (B, T, V)
        ended = torch.tensor([response[-1] == end for response in responses])
        kept = ended | (truncated == 'keep')                                            # (B,)
        if drop_zero_advantage and not teacher:
            kept &= ~idle.repeat_interleave(group_size)
        batch = {name: x.to(device) for name, x in batch.items()}
        if not kept.all():  # the host knows how many: a mask on the device would have to tell it
            places = kept.nonzero().squeeze(1).to(device)
            batch = {name: x[places] for name, x in batch.items()}
        numbers = {'clip': 0.0, 'entropy': None, 'grad_norm': 0.0, 'mismatch': None}  # if no rank has rows
        if all_reduce(kept.sum().to(device)) > 0:
            numbers = update(model, optimizer, **batch, **frozen, context=ctx, **options)

        # log
        sums = torch.tensor([rewards.sum(), *scores.sum(dim=0), sum(map(len, responses)), (~ended).sum(),
                             idle.sum() * group_size, len(signals)])
        sums = all_reduce(sums.to(device)) / (prompts_per_iter * group_size)
        reward_mean, accuracy, form, length, cut, zero_advantage, signalled = sums.tolist()
        dt = time.time() - t0
        seconds += dt
        if master:
            record = {'step': iter_num, 'seconds': seconds, 'reward': reward_mean, 'accuracy': accuracy,
                      'format': form, 'length': length, 'cut': cut, 'zero_advantage': zero_advantage, **numbers,
                      'lr': lr, 'tokens_per_s': length * prompts_per_iter * group_size / dt,
                      'rollout_share': (t1 - t0) / dt}
            kl = f'kl {record["kl"]:.4f}, ' if 'kl' in record else ''
            print(f'iter {iter_num}: reward {reward_mean:.3f}, accuracy {accuracy:.1%}, format {form:.1%}, '
                  f'length {length:.1f}, cut {cut:.0%}, zero-advantage {zero_advantage:.0%}, '
                  f'{kl}clip {record["clip"]:.1%}, time {dt * 1000:.0f}ms, {record["tokens_per_s"]:,.0f} tok/s')
            log(record)
            earned = earned or reward_mean != 0
            if not earned and iter_num == began + 2:
                (prompt, right, _), text = questions[0], texts[0][:80]
                print(f'note: all rewards of 3 iterations are 0, so nothing is learned. Does {reward_file} fit '
                      f'{dataset}? The response {text!r} to {prompt!r}, answer {right!r}, gets 0')
        iter_num += 1

        # evaluate and save; after a signal to any rank, all ranks leave after the same iteration
        due = iter_num % eval_interval == 0 or iter_num == max_iters
        signalled = signalled if ddp else signals  # alone it needs no answer of the device
        if due or signalled:
            scripts.check_weights(model, path)
        if signalled:
            save(best=False)
            if master:
                print(f'stopped by a signal before iteration {iter_num}; add --init_from=resume to go on from {path}')
            break
        if due:
            accuracy, record = evaluate()
            if master:
                log(record)
            improved, best_accuracy = accuracy > best_accuracy, max(best_accuracy, accuracy)
            save(best=improved)

    if wandb_log and master:
        wandb.finish()
    scripts.leave()
