"""GRPO: the equations against scalar evaluations of them, the sampler against the trainer, and whole runs."""

import contextlib
import json
import math
import os
import pickle
import re
import resource
import shlex
import signal
import subprocess
import sys
import time

import forks
import pytest
import torch
from conftest import ROOT, copy_project, run, run_inside, tiny_model

import grpo
import model as model_module
from extras import guard, scripts, tokenizer
from extras.decode import Decoder

STOP = 0


def policy(**overrides):
    settings = dict(block_size=24, vocab_size=11, num_nextn_predict_layers=0, eos_token_id=STOP, bias_update_speed=0.0)
    return tiny_model(**{**settings, **overrides})


def rollouts(model, prompts=((3, 4, 5), (6, 7, 8)), group_size=4, max_new_tokens=8):
    prompts = [list(prompt) for prompt in prompts for _ in range(group_size)]
    return prompts, grpo.sample_responses(Decoder(model), prompts, max_new_tokens, 1.0)


def test_advantages_of_a_group():
    """R1 eq. 3, by hand; a group of equal rewards teaches nothing; Dr. GRPO leaves the division out."""
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.1], [0.5, 0.5, 0.5, 0.5]])
    mean = (1.0 + 1.1) / 4
    std = math.sqrt(sum((r - mean) ** 2 for r in (1.0, 0.0, 0.0, 1.1)) / 4)
    expected = torch.tensor([[(r - mean) / std for r in (1.0, 0.0, 0.0, 1.1)], [0.0] * 4])
    torch.testing.assert_close(grpo.group_advantages(rewards), expected, atol=1e-5, rtol=1e-5)
    plain = grpo.group_advantages(rewards, normalise_std=False)
    torch.testing.assert_close(plain, torch.tensor([[1.0 - mean, -mean, -mean, 1.1 - mean], [0.0] * 4]))
    for reward, size in ((1.1, 12), (0.1, 16)):  # the mean of equal numbers may differ from them by rounding
        assert (grpo.group_advantages(torch.full((1, size), reward)) == 0).all()


def test_k3_is_unbiased_and_never_negative():
    logp, ref = torch.randn(5).log_softmax(0), torch.randn(5).log_softmax(0)
    for a, b, value in zip(logp.tolist(), ref.tolist(), grpo.k3(logp, ref).tolist()):
        assert value == pytest.approx(math.exp(b - a) - (b - a) - 1, rel=1e-5, abs=1e-6)
    assert (grpo.k3(logp, ref) >= 0).all()
    expectation = (logp.exp() * grpo.k3(logp, ref)).sum()  # over tokens drawn from pi
    torch.testing.assert_close(expectation, (logp.exp() * (logp - ref)).sum())


@pytest.mark.parametrize('length_norm', ['response', 'token', 'constant'])
def test_update_minimises_the_papers_objective(length_norm):
    """Two steps of mu against a loop over samples and tokens, with clip and KL, all of it at the run's temperature."""
    model, reference = policy(), policy(std=0.25).requires_grad_(False).eval()
    prompts, responses = rollouts(model)
    rows, mask, _ = grpo.pack(prompts, responses, STOP, 'cpu')
    advantages = torch.randn(len(rows))
    twin = policy()
    twin.load_state_dict(model.state_dict())
    options = dict(clip_low=0.05, clip_high=0.1, kl_coef=0.3)
    temperature = 0.7

    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    numbers = grpo.update(model, optimizer, rows, mask, advantages, reference=reference, mu=2, length_norm=length_norm,
                          max_new_tokens=8, temperature=temperature, batch_size=3, grad_clip=0.0, **options)

    def one_log_prob(m, prompt, response, t):
        idx = torch.tensor([prompt + response[:t]])
        return (m.lm_head(m.main_stack(idx)[0])[0, -1] / temperature).log_softmax(0)[response[t]]

    twin.train()
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.5)
    old, clipped, kls = {}, 0, 0.0
    total = sum(map(len, responses))
    for _ in range(2):
        objective = 0.0
        for i, (prompt, response) in enumerate(zip(prompts, responses)):
            A = advantages[i].item()
            for t in range(len(response)):
                logp = one_log_prob(twin, prompt, response, t)
                ref = one_log_prob(reference, prompt, response, t)
                ratio = (logp - old.setdefault((i, t), logp.item())).exp()
                low, high = 1 - options['clip_low'], 1 + options['clip_high']
                clipped += (A > 0 and ratio.item() > high) or (A < 0 and ratio.item() < low)
                gain = min(ratio * A, ratio.clamp(low, high) * A)
                kl = (ref - logp).exp() - (ref - logp) - 1
                kls += kl.item()
                norm = {'response': len(responses) * len(response), 'token': total, 'constant': len(responses) * 8}
                objective = objective + (gain - options['kl_coef'] * kl) / norm[length_norm]
        optimizer.zero_grad()
        (-objective).backward()
        optimizer.step()
    for (name, p), q in zip(model.named_parameters(), twin.parameters()):
        torch.testing.assert_close(p, q, atol=2e-5, rtol=1e-4, msg=name)
    assert numbers['clip'] == pytest.approx(clipped / (2 * total)) and clipped > 0
    assert numbers['kl'] == pytest.approx(kls / (2 * total), rel=1e-3)


def test_the_first_step_is_reinforce_with_a_baseline(monkeypatch):
    """The ratio is exactly 1, nothing is clipped, and the gradient is that of sum A log pi, whatever the clip."""
    model = policy()
    prompts, responses = rollouts(model)
    rows, mask, _ = grpo.pack(prompts, responses, STOP, 'cpu')
    advantages = torch.randn(len(rows))
    gradients, ratios = [], []
    surrogate = grpo.surrogate

    def spy(logp, old_logp, *args):
        ratios.append((logp - old_logp).exp())
        return surrogate(logp, old_logp, *args)

    class Keep(torch.optim.SGD):
        def step(self):
            gradients.extend(p.grad.clone() for p in model.parameters())

    monkeypatch.setattr(grpo, 'surrogate', spy)
    numbers = grpo.update(model, Keep(model.parameters(), lr=0.1), rows, mask, advantages, clip_low=1e-6,
                          clip_high=1e-6, grad_clip=0.0)
    assert all((ratio == 1).all() for ratio in ratios) and numbers['clip'] == 0
    logp, *_ = grpo.log_probs(model, rows, 1.0)
    means = (logp * mask).sum(dim=1) / mask.sum(dim=1)
    (-(advantages * means).mean()).backward()
    for p, grad in zip(model.parameters(), gradients):
        torch.testing.assert_close(p.grad, grad, atol=1e-6, rtol=1e-5)


def test_the_second_step_in_bf16_sees_the_first(monkeypatch):
    """Autocast keeps bf16 copies of the weights until it is left: a step within would go unseen by the next forward."""
    model = policy()
    prompts, responses = rollouts(model)
    rows, mask, _ = grpo.pack(prompts, responses, STOP, 'cpu')
    advantages = torch.randn(len(rows))
    twin = policy()
    twin.load_state_dict(model.state_dict())
    autocast, seen, surrogate = torch.autocast('cpu', torch.bfloat16), [], grpo.surrogate
    monkeypatch.setattr(grpo, 'surrogate', lambda logp, *args: seen.append(logp) or surrogate(logp, *args))
    grpo.update(model, torch.optim.SGD(model.parameters(), lr=0.5), rows, mask, advantages, mu=2, context=autocast)
    grpo.update(twin, torch.optim.SGD(twin.parameters(), lr=0.5), rows, mask, advantages, mu=1, context=autocast)
    with autocast:
        after, *_ = grpo.log_probs(twin, rows, 1.0)
    before, second, _ = seen
    assert torch.equal(second[mask], after[mask])
    assert (second - before)[mask].abs().max() > 0.1


@pytest.mark.parametrize('temperature, dtype, near', [(1.0, 'float32', 1e-5), (0.7, 'float32', 1e-5),
                                                      (0.7, 'bfloat16', 0.1)])
def test_the_trainer_knows_the_samplers_probabilities(monkeypatch, temperature, dtype, near):
    """The cached, absorbed decode and the training forward give each sampled token one log-probability."""
    model = policy()
    seen, probabilities = [], model_module.probabilities
    monkeypatch.setattr('extras.decode.probabilities', lambda *args: seen.append(probabilities(*args)) or seen[-1])
    prompts = [prompt for prompt in ([3, 4, 5], [6, 7, 8], [1, 2, 3]) for _ in range(4)]
    context, decoder = grpo.autocast('cpu', dtype), Decoder(model)
    decoder.compile = True                                                            # no row leaves the state
    with context:
        responses = grpo.sample_responses(decoder, prompts, 16, temperature)
    steps = torch.cat(seen, dim=1)                                                    # (B, tokens, V)
    rows, mask, _ = grpo.pack(prompts, responses, STOP, 'cpu')
    with context:
        logp, *_ = grpo.log_probs(model.train(), rows, temperature)
    assert len({len(response) for response in responses}) > 1
    drawn = torch.cat([steps[i, torch.arange(len(response)), torch.tensor(response)].log()
                       for i, response in enumerate(responses)])
    close = torch.isclose(logp[mask], drawn, atol=near, rtol=near).float().mean()
    assert close == 1 if dtype == 'float32' else close > 0.9  # in bf16 a rounding may choose other experts


def test_nothing_after_the_stop_token_counts():
    """Neither in the gradient nor in the load that moves the balance bias."""
    model = policy(bias_update_speed=0.001)
    prompts, responses = [[3, 4, 5]] * 2 + [[6, 7]], [[1, 2, STOP], [5, 6, 7, 8, 9], [4, STOP]]
    rows, mask, _ = grpo.pack(prompts, responses, STOP, 'cpu')
    assert rows.tolist() == [[3, 4, 5, 1, 2, 0, 0, 0], [3, 4, 5, 5, 6, 7, 8, 9], [6, 7, 4, 0, 0, 0, 0, 0]]
    assert mask.int().tolist() == [[0, 0, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1, 1], [0, 1, 1, 0, 0, 0, 0]]
    results = []
    for filler in (STOP, 9):
        m = policy(bias_update_speed=0.001)
        m.load_state_dict(model.state_dict())
        filled = rows.clone()
        filled[0, 6:], filled[2, 4:] = filler, filler
        grpo.update(m, torch.optim.SGD(m.parameters(), lr=0.1), filled, mask, torch.tensor([1.0, -1.0, 0.5]))
        results.append(m.state_dict())
    for name, a in results[0].items():
        torch.testing.assert_close(a, results[1][name], atol=1e-6, rtol=1e-5)
        assert not name.endswith('bias') or (a != model.state_dict()[name]).any()


def test_responses_come_in_the_order_of_prompts_of_any_length():
    """Greedy responses to prompts of two lengths in one call are those of each prompt alone."""
    model = policy()
    prompts = [[3, 4, 5], [6, 7], [8, 9, 1], [2, 2]]
    together = grpo.sample_responses(Decoder(model), prompts, 6, 0.0)
    assert together == [grpo.sample_responses(Decoder(model), [prompt], 6, 0.0)[0] for prompt in prompts]
    assert all(STOP not in response[:-1] for response in together)


def test_balance_and_mtp_modules():
    """Each step moves the main stack's balance bias; the MTP modules stay as they are."""
    model = policy(num_nextn_predict_layers=1, bias_update_speed=0.001)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    prompts, responses = rollouts(model)
    rows, mask, _ = grpo.pack(prompts, responses, STOP, 'cpu')
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), 'cpu')
    grpo.update(model, optimizer, rows, mask, torch.randn(len(rows)))
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert {f'transformer.h.{i}.mlp.e_score_correction_bias' for i in range(2)} <= changed
    assert not any(k.startswith('mtp.') for k in changed)


def test_a_gradient_that_is_not_finite_takes_no_step():
    model = policy()
    prompts, responses = rollouts(model)
    rows, mask, _ = grpo.pack(prompts, responses, STOP, 'cpu')
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(model_module.Mistake, match='the gradient is nan'):
        grpo.update(model, torch.optim.SGD(model.parameters(), lr=0.1), rows, mask, torch.full((len(rows),), math.nan))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before))


def test_a_policy_that_computes_nan():
    """It answers nothing, and is no policy to learn from."""
    model = policy()
    with torch.no_grad():
        model.transformer.ln_f.weight.fill_(math.nan)
    for temperature in (0.0, 1.0):
        with pytest.raises(model_module.Mistake, match='the model computes nan or infinity'):
            grpo.sample_responses(Decoder(model), [[3, 4, 5], [6]], 4, temperature)


TWO_RANKS = '''
import copy
import sys
import torch
import torch.distributed as dist
import grpo
from extras import rl, scripts
from model import GPT, GPTConfig

model = GPT(GPTConfig(**torch.load('start.pt')['args']))
model.load_state_dict(torch.load('start.pt')['model'])
frozen = copy.deepcopy(model)
prompts, responses, advantages, log_probs, experts, support = torch.load('rollouts.pt')
world, rank = 1, 0
if len(sys.argv) > 2:
    dist.init_process_group('gloo')
    world, rank = dist.get_world_size(), dist.get_rank()
# ranks with different numbers of rows, of different lengths: the shortest are rank 0's
share = [i for i in range(len(prompts)) if world == 1 or (i < 3) == (rank == 0)]
prompts, responses, log_probs, experts, support = ([x[i] for i in share] for x in (prompts, responses, log_probs,
                                                                                   experts, support))
rows, mask, logp = grpo.pack(prompts, responses, 0, 'cpu', log_probs)
T = mask.size(1)
more = {'sampled_logp': logp, 'experts': rl.pack_experts(experts, T), 'support': rl.pack_support(support, prompts, T)}
optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), 'cpu')
for length_norm in ('response', 'token', 'constant'):
    grpo.update(model, optimizer, rows, mask, advantages[share], mu=2, length_norm=length_norm)
numbers = [grpo.update(model, optimizer, rows, mask, advantages[share], **more, **options, mu=2, train_mtp=True)
           for options in (dict(reference=frozen, kl_coef=0.1, unbiased_kl=True, old_logp='rollout', mask_drift=0.01,
                                replay_routing=True), dict(teacher=frozen))]
torch.save(numbers, f'numbers-{sys.argv[1]}{rank}.pt')
torch.save(model.state_dict(), f'{sys.argv[1]}{rank}.pt')
scripts.leave()
'''


def test_two_ranks_take_the_step_of_one(tmp_path):
    """By plain GRPO, and by all that V3.2 and V4 add."""
    model = policy(bias_update_speed=0.001, num_nextn_predict_layers=1)
    decoder = Decoder(model, keep_experts=True, keep_support=True)
    prompts = [list(prompt) for prompt in ((3, 4, 5), (6, 7, 8)) for _ in range(4)]
    responses = grpo.sample_responses(decoder, prompts, 16, 1.0, 8)
    by_length = sorted(range(len(responses)), key=lambda i: len(responses[i]))
    assert len(responses[by_length[0]]) < len(responses[by_length[-1]])
    sampled = ([x[i] for i in by_length] for x in (prompts, responses, torch.randn(len(prompts)), decoder.log_probs,
                                                   decoder.experts, decoder.support))
    prompts, responses, advantages, *kept = sampled
    torch.save({'args': {**vars(model.config)}, 'model': model.state_dict()}, tmp_path / 'start.pt')
    torch.save((prompts, responses, torch.stack(advantages), *kept), tmp_path / 'rollouts.pt')
    (tmp_path / 'step.py').write_text(TWO_RANKS)
    run('step.py', 'one', cwd=tmp_path, PYTHONPATH=ROOT)
    torchrun('step.py', 'two', 'ddp', cwd=tmp_path, PYTHONPATH=ROOT)
    one, two, other, start = (torch.load(tmp_path / f'{name}.pt') for name in ('one0', 'two0', 'two1', 'start'))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, atol=1e-5, rtol=1e-4, msg=name)
        assert torch.equal(two[name], other[name]), name
    bias = 'transformer.h.0.mlp.e_score_correction_bias'
    assert torch.equal(two[bias], one[bias]) and one[bias].any()
    for both, alone in zip(torch.load(tmp_path / 'numbers-two0.pt'), torch.load(tmp_path / 'numbers-one0.pt')):
        assert both == pytest.approx(alone, abs=1e-5, rel=1e-4)
    assert not torch.equal(one['lm_head.weight'], start['model']['lm_head.weight'])


# whole runs

SFT = ['config/sft_arithmetic.py', '--n_layer=1', '--n_embd=32', '--n_head=2', '--max_iters=4', '--lr_decay_iters=4',
       '--eval_iters=1', '--batch_size=8']
GRPO = ['config/grpo_arithmetic.py', '--init_from=out-sft', '--out_dir=out-rl', '--max_iters=4', '--eval_interval=2',
        '--eval_prompts=8', '--prompts_per_iter=4', '--group_size=4', '--warmup_iters=0']


def torchrun(*args, cwd, ok=True, **env):
    env = os.environ | {'OMP_NUM_THREADS': '1'} | {k: str(v) for k, v in env.items()}
    code, printed = forks.torchrun(args, cwd, env, 2)
    assert (code == 0) == ok, printed
    return printed


@contextlib.contextmanager
def file_limit(size):
    """A disk that is full, for this process: no file can grow beyond so many bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def inside(*args, cwd, ok=True):
    code, out, said = run_inside(*args, cwd=cwd)
    assert (code == 0) == ok, said
    return out + said


@pytest.fixture(scope='module')
def workshop(tmp_path_factory):
    """A clone with the data of 2-digit addition and a cold start of a few steps."""
    folder = copy_project(tmp_path_factory.mktemp('grpo') / 'clone')
    inside('data/arithmetic/prepare.py', '--task=add2', '--name=add3', '--examples=200', cwd=folder)
    inside('train.py', *SFT, '--out_dir=out-sft', cwd=folder)
    # a rule that an untrained model meets every other time
    (folder / 'odd.py').write_text('def reward(prompt, response, answer): return sum(map(ord, response)) % 2, 1')
    return folder


def records(folder, out_dir='out-rl'):
    with open(folder / out_dir / 'log.jsonl') as f:
        lines = [json.loads(line) for line in f if line.strip()]
    timing = ('seconds', 'tokens_per_s', 'rollout_share')
    return [{k: v for k, v in line.items() if k not in timing} for line in lines if 'command' not in line]


def training_text(folder):
    """What train.bin of a data set spells, and the length of its rows."""
    with open(folder / 'meta.pkl', 'rb') as f:
        meta = pickle.load(f)
    ids = torch.frombuffer(bytearray((folder / 'train.bin').read_bytes()), dtype=torch.uint16).tolist()
    return ''.join(meta['itos'][t] for t in ids), meta['row_length']


def test_data_sets_are_disjoint_and_right(workshop):
    folder = workshop / 'data' / 'arithmetic' / 'add3'
    operands = {}
    for split in ('train', 'val', 'test'):
        pairs = [line.split('\t') for line in (folder / f'{split}_prompts.txt').read_text().splitlines()]
        for prompt, answer in pairs:
            a, b = map(int, re.fullmatch(r'(\d+)\+(\d+)=', prompt).groups())
            assert a + b == int(answer)
        operands[split] = {frozenset(map(int, prompt[:-1].split('+'))) for prompt, _ in pairs}
    assert not operands['train'] & operands['val'] and not operands['train'] & operands['test']
    assert not operands['val'] & operands['test']
    # no digit decides the split: held-out sums end in every digit, and begin with many
    assert len({sum(pair) % 10 for pair in operands['test'] if len(pair) == 2}) == 10
    assert len({min(pair) // 10 for pair in operands['test']}) > 5


@pytest.mark.parametrize('task', ['add4', 'sub3', 'sort6'])
def test_the_rules_accept_every_trace(clone, task):
    """What prepare.py writes as work and answer is well-formed and right by reward.py; a changed answer is not."""
    inside('data/arithmetic/prepare.py', f'--task={task}', '--examples=300', cwd=clone)
    folder = clone / 'data' / 'arithmetic' / task
    answers = dict(line.split('\t') for line in (folder / 'train_prompts.txt').read_text().splitlines())
    reward = {}
    exec((ROOT / 'data/arithmetic/reward.py').read_text(), reward)
    text, length = training_text(folder)
    targets = (folder / 'train_mask.bin').read_bytes()
    terse = 0
    for i in range(0, 300 * length, length):
        line = text[i:text.index('\n', i) + 1]
        prompt, response = line[:line.index('=') + 1], line[line.index('=') + 1:]
        assert reward['reward'](prompt, response, answers[prompt]) == (1.0, 1.0)
        wrong = str(int(answers[prompt]) + 1)
        assert reward['reward'](prompt, response, wrong) == (0.0, 1.0)
        assert reward['reward'](prompt, response[:-1], answers[prompt]) == (0.0, 0.0)
        terse += response.startswith('<>')
        # the targets are the response and its newline, and no more
        assert targets[i:i + length] == bytes([0] * len(prompt) + [1] * len(response) + [0] * (length - len(line)))
    assert 150 < terse < 210  # six lines in ten
    if task == 'sort6':
        assert '\nsort ' in '\n' + ''.join(answers)


def test_all_lines_or_none_can_be_terse(clone):
    for terse in (0, 1):
        inside('data/arithmetic/prepare.py', '--task=add2', '--examples=50', f'--terse={terse}', cwd=clone)
        text, _ = training_text(clone / 'data' / 'arithmetic' / 'add2')
        lines = [line for line in text.split('\n') if line]
        assert len(lines) == 50 and all(('<>' in line) == terse for line in lines)


@pytest.mark.parametrize('flag, words', [('--task=mul3', 'family'), ('--task=add9', 'digits'), ('--terse=1.5', '0..1'),
                                         ('--terse=nan', '0..1'), ('--examples=0', '--examples'),
                                         ('--examples=99999999', '--examples'), ('--name=../up', 'letters'),
                                         ('--name=', 'letters'), ('--length=-3', '--length=-3 must lie in'),
                                         ('--length=8', '--length=8 must lie in'), ('--traces=', '--traces=')])
def test_mistakes_in_making_data(clone, flag, words):
    code, _, said = run_inside('data/arithmetic/prepare.py', flag, cwd=clone)
    assert code == 2 and words in said and len(said.strip().splitlines()) == 1
    assert not list(clone.rglob('train_prompts.txt'))


def test_a_seeded_run_reproduces_and_resumes(workshop):
    flags = [*GRPO, '--reward_file=odd.py', '--mu=2', '--kl_coef=0.1']
    inside('grpo.py', *flags, cwd=workshop)
    first = records(workshop)
    assert [r['step'] for r in first if 'val_accuracy' in r] == [0, 2, 4]
    assert {'reward', 'accuracy', 'format', 'length', 'zero_advantage', 'kl', 'clip', 'entropy'} <= set(first[1])
    assert all(r['grad_norm'] > 0 and r['kl'] > 0 for r in first if 'reward' in r)
    inside('grpo.py', *flags, '--max_iters=4', '--out_dir=out-again', cwd=workshop)
    assert records(workshop, 'out-again') == first
    # evaluating more often changes nothing
    inside('grpo.py', *flags, '--eval_interval=1', '--out_dir=out-often', cwd=workshop)
    assert [r for r in records(workshop, 'out-often') if 'reward' in r] == [r for r in first if 'reward' in r]
    # stopped after two iterations (the rate would decay to another end), gone on with
    flags.append('--decay_lr=False')
    inside('grpo.py', *flags, '--out_dir=out-whole', cwd=workshop)
    inside('grpo.py', *flags, '--out_dir=out-half', '--max_iters=2', cwd=workshop)
    inside('grpo.py', *flags, '--out_dir=out-half', '--init_from=resume', cwd=workshop)
    assert records(workshop, 'out-half')[-3:] == records(workshop, 'out-whole')[-3:]
    whole, half, start = (torch.load(workshop / out / 'ckpt.pt') for out in ('out-whole', 'out-half', 'out-sft'))
    assert all(torch.equal(whole['model'][k], half['model'][k]) for k in whole['model'])
    assert not torch.equal(whole['model']['lm_head.weight'], start['model']['lm_head.weight'])
    # what is only evaluated has a log of its own
    log = (workshop / 'out-whole' / 'log.jsonl').read_bytes()
    inside('grpo.py', *flags, '--init_from=out-whole', '--out_dir=out-whole', '--eval_only=True', '--eval_split=test',
           cwd=workshop)
    assert (workshop / 'out-whole' / 'log.jsonl').read_bytes() == log
    assert 'test_accuracy' in (workshop / 'out-whole' / 'eval.jsonl').read_text()


@pytest.mark.parametrize('options', [
    '--kl_coef=0.1 --unbiased_kl=True --old_logp=rollout --mask_drift=0.01 --drop_zero_advantage=False',
    pytest.param('--teacher=out-sft', marks=pytest.mark.slow)])
def test_a_run_with_what_v32_and_v4_add_resumes(workshop, options):
    """Bit for bit, with two data sets at once, each with its own reward."""
    inside('data/arithmetic/prepare.py', '--task=add2', '--name=more', '--examples=200', cwd=workshop)
    inside('train.py', *SFT, '--num_nextn_predict_layers=1', '--out_dir=out-drafts', cwd=workshop)
    flags = [*GRPO, '--dataset=arithmetic/add3,arithmetic/more', '--reward_file=odd.py,data/arithmetic/reward.py',
             '--init_from=out-drafts', '--decay_lr=False', '--dtype=bfloat16', '--top_k=20', '--top_p=0.95', '--mu=2',
             '--keep_sampling_mask=True', '--replay_routing=True', '--train_mtp=True', '--truncated=mask',
             *options.split()]
    inside('grpo.py', *flags, '--out_dir=out-whole', cwd=workshop)
    inside('grpo.py', *flags, '--out_dir=out-half', '--max_iters=2', cwd=workshop)
    inside('grpo.py', *flags, '--out_dir=out-half', '--init_from=resume', cwd=workshop)
    found = records(workshop, 'out-whole')
    assert records(workshop, 'out-half')[-3:] == found[-3:]
    whole, half, start = (torch.load(workshop / out / 'ckpt.pt')['model'] for out in ('out-whole', 'out-half',
                                                                                      'out-drafts'))
    assert all(torch.equal(whole[k], half[k]) for k in whole)
    assert not torch.equal(whole['mtp.0.eh_proj.weight'], start['mtp.0.eh_proj.weight'])
    steps = [r for r in found if r.get('entropy') is not None]  # else all responses were cut off
    assert steps and all(r['routing_mismatch'] == 0 and r['mtp_loss'] > 0 for r in steps)
    assert all(('kl' in r) == ('drifted' in r) == ('teacher_kl' not in r) == ('unbiased_kl' in options) for r in steps)
    for r in (r for r in found if 'val_accuracy' in r):
        each = [r[f'val_accuracy {task}'] for task in ('arithmetic/add3', 'arithmetic/more')]
        assert r['val_accuracy'] == pytest.approx(sum(each) / 2)


def test_every_option_at_once_under_torchrun_and_the_way_on(workshop):
    """DAPO's and Dr. GRPO's options, KL and mu on two ranks; plot.py draws it, sample.py stops at the end of a line."""
    said = torchrun('grpo.py', *GRPO, '--out_dir=out-two', '--mu=2', '--kl_coef=0.1', '--clip_high=0.28',
                    '--normalise_std=False', '--length_norm=token', '--drop_zero_advantage=True',
                    '--reward_file=odd.py', '--max_new_tokens=12', '--wandb_log=True', cwd=workshop,
                    WANDB_MODE='offline', WANDB_SILENT='true')
    assert re.search(r'^iter .*, kl \d', said, re.M)
    assert len(list((workshop / 'wandb').glob('offline-run-*/*.wandb'))) == 1  # rank 0's
    assert any((r.get('kl') or 0) > 0 for r in records(workshop, 'out-two'))
    inside('plot.py', 'out-two/log.jsonl', cwd=workshop)
    assert (workshop / 'out-two' / 'log.png').stat().st_size > 10_000
    said = inside('sample.py', '--out_dir=out-two', '--start=12+34=', '--num_samples=2', '--max_new_tokens=20',
                  cwd=workshop)
    assert len(re.findall(r'^12\+34=[^\n]*\n-{15}$', said, re.M)) == 2

    inside('grpo.py', *GRPO, '--reward_file=odd.py', '--traces=accepted.txt', '--trace_prompts=8',
           '--max_new_tokens=12', cwd=workshop)
    lines = (workshop / 'accepted.txt').read_text().splitlines(keepends=True)
    # a response that was cut off is no trace, whatever the rule says
    assert 0 < len(lines) <= 8 and all(re.fullmatch(r'\d\d\+\d\d=[^\n]*\n', line) for line in lines)


@pytest.mark.slow
def test_a_mistake_that_one_rank_meets_alone(workshop):
    """A reward that raises on rank 1: its line, without a traceback, and both ranks end."""
    (workshop / 'rank1.py').write_text('import os\ndef reward(p, r, a):\n    assert os.environ["RANK"] == "0", "no"\n'
                                       '    return 1, 1\n')
    said = torchrun('grpo.py', *GRPO, '--reward_file=rank1.py', '--out_dir=out-stopped', cwd=workshop, ok=False)
    assert len(re.findall(r'^\S*rank1.py: reward\(.*AssertionError: no$', said, re.M)) == 1
    assert 'Traceback' not in said.partition('ChildFailedError')[0].partition('torch/distributed/elastic')[0]
    assert not (workshop / 'out-stopped').exists()


def test_a_run_keeps_the_earlier_one(workshop):
    """Its whole folder, under another name. Nothing is renamed before all that can fail has been tried."""
    out = workshop / 'out-again-and-again'
    flags = [*GRPO, '--reward_file=odd.py', f'--out_dir={out.name}', '--max_iters=1', '--eval_interval=1']
    inside('grpo.py', *flags, cwd=workshop)
    first = {path.name: path.read_bytes() for path in out.iterdir()}
    assert {'ckpt.pt', 'log.jsonl'} <= set(first)

    with file_limit(50_000):
        code, _, said = run_inside('grpo.py', *flags, cwd=workshop)
    assert code == 2 and said == f"out_dir='{out.name}' cannot be written: File too large\n"
    done = subprocess.run([sys.executable, 'grpo.py', *flags, '--wandb_log=True'], cwd=workshop, text=True, env={
        **{k: v for k, v in os.environ.items() if not k.startswith('WANDB')}, 'HOME': str(workshop),
        'OMP_NUM_THREADS': '1', 'WANDB_SILENT': 'true', 'WANDB_CONFIG_DIR': str(workshop)}, capture_output=True)
    assert done.returncode == 2 and 'wandb login' in done.stderr.splitlines()[-1], done.stderr
    assert 'Traceback' not in done.stderr
    assert {path.name: path.read_bytes() for path in out.iterdir()} == first

    for old in ('.old1', '.old2'):
        said = inside('grpo.py', *flags, cwd=workshop)
        assert f'the earlier run in {out.name} is now in {out.name}{old}' in said
        assert {path.name for path in out.iterdir()} == set(first)
    kept = workshop / f'{out.name}.old1'
    assert {path.name: path.read_bytes() for path in kept.iterdir()} == first


@pytest.mark.slow
def test_a_restart_goes_on_from_its_own_run_alone(workshop):
    """Over a finished run's folder the first attempt dies at once, the second in iteration 3, the third ends."""
    out = workshop / 'out-restarted'
    flags = [*GRPO, f'--out_dir={out.name}']
    inside('grpo.py', *flags, '--reward_file=odd.py', '--max_iters=2', '--seed=5', cwd=workshop)
    earlier = (out / 'ckpt.pt').read_bytes()
    (workshop / 'dies.py').write_text('''
import os
calls = 0
def reward(prompt, response, answer):
    global calls
    calls += 1
    # an evaluation has 8 calls, an iteration 16
    if calls > {'0': 0, '1': 72, '2': 1000}[os.environ['TORCHELASTIC_RESTART_COUNT']]:
        os._exit(9)
    return sum(map(ord, response)) % 2, 1
''')
    code, said = forks.torchrun_anew(['grpo.py', *flags, '--reward_file=dies.py'], workshop, dict(os.environ), 1,
                                     ['--standalone', '--max-restarts=2'])
    assert code == 0, said
    assert said.count('the earlier run in') == 1 and (workshop / f'{out.name}.old1/ckpt.pt').read_bytes() == earlier
    assert said.count('going on from') == 1 and f'going on from {out.name}/ckpt.pt, iteration 2' in said
    again = records(workshop, out.name)
    assert [r['step'] for r in again] == [0, 0, 1, 2, 2, 2, 2, 3, 4]
    assert again[3:5] == again[5:7]  # the evaluation and the iteration that both attempts made
    inside('grpo.py', *GRPO, '--reward_file=odd.py', '--out_dir=out-unbroken', cwd=workshop)
    broken, unbroken = (torch.load(workshop / name / 'ckpt.pt') for name in (out.name, 'out-unbroken'))
    assert all(torch.equal(value, broken['model'][key]) for key, value in unbroken['model'].items())


def test_ranks_with_different_checkpoints(workshop):
    """Each rank has a folder of its own, as on two machines, and their checkpoints are of different iterations."""
    inside('grpo.py', *GRPO, '--reward_file=odd.py', '--out_dir=out-rank0', '--max_iters=1', cwd=workshop)
    checkpoint = torch.load(workshop / 'out-rank0/ckpt.pt')
    (workshop / 'out-rank1').mkdir()
    torch.save({**checkpoint, 'iter_num': 2}, workshop / 'out-rank1/ckpt.pt')
    (workshop / 'apart.py').write_text("import os\nout_dir = 'out-rank' + os.environ['RANK']\n")
    said = torchrun('grpo.py', *GRPO, 'apart.py', '--init_from=resume', cwd=workshop, ok=False)
    assert 'the ranks hold different checkpoints: out-rank0 must be one folder for all\n' in said


def test_two_seeds_share_no_iteration(workshop, monkeypatch):
    """Once, iteration 1 of a seed was iteration 0 of the next one."""
    manual_seed, begun = torch.manual_seed, []
    monkeypatch.setattr(torch, 'manual_seed', lambda n: begun.append(int(n)) or manual_seed(n))
    for seed in (1, 2):
        flags = [*GRPO, '--reward_file=odd.py', '--out_dir=out-seeds', '--max_iters=3', f'--seed={seed}']
        inside('grpo.py', *flags, cwd=workshop)
    assert len(begun) == len(set(begun)) == 2 * 3


def test_checkpoints_that_no_run_of_grpo_wrote(workshop):
    """Each is one line. A fused step would read past the end of an optimizer's state that is too small."""
    flags = [*GRPO, '--reward_file=odd.py', '--out_dir=out-resumed', '--max_iters=2']
    inside('grpo.py', *flags, cwd=workshop)
    path = workshop / 'out-resumed/ckpt.pt'
    whole = torch.load(path)
    small = torch.load(path)['optimizer']
    small['state'][0]['exp_avg'] = small['state'][0]['exp_avg'][:1].clone()
    for change, words in (({'seconds': None}, 'was not written by grpo.py'), ({'iter_num': -1}, 'was not written'),
                          ({'config': {}}, 'was not written'), ({'optimizer': None}, 'does not fit'),
                          ({'optimizer': small}, 'does not fit')):
        torch.save({**whole, **change}, path)
        code, _, said = run_inside('grpo.py', *flags, '--init_from=resume', cwd=workshop)
        assert code == 2 and words in said and len(said.splitlines()) == 1, said


def test_train_py_does_not_go_on_from_grpo(workshop):
    """Once, it did: with the data set's loss, over the only checkpoint of the reinforcement learning."""
    inside('grpo.py', *GRPO, '--reward_file=odd.py', '--out_dir=out-mixed', '--max_iters=1', cwd=workshop)
    path = workshop / 'out-mixed/ckpt.pt'
    before = path.read_bytes()
    code, _, said = run_inside('train.py', *SFT, '--out_dir=out-mixed', '--init_from=resume', cwd=workshop)
    assert code == 2 and path.read_bytes() == before
    assert said == ('out-mixed/ckpt.pt was written by grpo.py: begin with --init_from=out-mixed and another out_dir\n')
    assert 'beginning with the weights of out-mixed/ckpt.pt, iteration 1\n' in inside(
        'train.py', *SFT, '--out_dir=out-tuned', '--init_from=out-mixed', '--max_iters=1', cwd=workshop)


def test_a_kl_is_shown_where_one_is_computed(workshop):
    """With kl_coef, or with a reference alone; otherwise neither the line nor the log has it."""
    flags = [*GRPO, '--reward_file=odd.py', '--out_dir=out-kl', '--max_iters=2']
    for extra, shown in (('--kl_coef=0.0', False), ('--reference=out-sft', True), ('--kl_coef=0.1', True)):
        said = inside('grpo.py', *flags, extra, cwd=workshop)
        lines = [line for line in said.splitlines() if line.startswith('iter ')]
        assert len(lines) == 2 and all((', kl ' in line) == shown for line in lines)
        assert all(('kl' in r) == shown for r in records(workshop, 'out-kl') if 'reward' in r)


def test_a_task_of_ones_own(clone):
    """The files and commands of docs/grpo.md, at a tiny size."""
    text = (clone / 'docs/grpo.md').read_text().split('\n## A task of your own\n')[1]
    files = re.findall(r'`(data/\S+\.py)`:\n\n```python\n(.*?)```', text, re.S)
    assert [name for name, _ in files] == ['data/letters/prepare.py', 'data/letters/reward.py']
    for name, source in files:
        (clone / name).parent.mkdir(exist_ok=True)
        (clone / name).write_text(source)
    prepare, sft, rl = [shlex.split(line)[1:] for line in re.search(r'```sh\n(.*?)```', text, re.S)[1].splitlines()]
    inside(*prepare, cwd=clone)
    line, length = training_text(clone / 'data/letters')
    assert length == 16 and re.fullmatch(r'[a-h]{6}=[a-h]{6}\n{3}', line[:16])
    assert list((clone / 'data/letters/train_mask.bin').read_bytes()[:16]) == [0] * 7 + [1] * 7 + [0] * 2
    inside(*sft, '--n_layer=1', '--n_embd=32', '--n_head=2', '--max_iters=4', '--eval_iters=1', cwd=clone)
    said = inside(*rl, '--max_iters=2', '--eval_prompts=8', '--prompts_per_iter=2', '--group_size=2', cwd=clone)
    assert 'step 2: val accuracy' in said and (clone / 'out-grpo-letters/ckpt.pt').exists()


def test_prompts_end_at_newlines_alone(tmp_path):
    """A line separator, a form feed or U+0085 is a character of a prompt or an answer."""
    said = 'a\u2028b\fc\x85d'
    (tmp_path / 'train_prompts.txt').write_text(f'{said}\tx\u2029y\nb\t\n', encoding='utf-8')
    letters = tokenizer.characters({ch: i for i, ch in enumerate(said)}, dict(enumerate(said)))
    assert scripts.load_prompts(tmp_path, 'train', letters, 40, 100) == [(said, 'x\u2029y'), ('b', '')]
    (tmp_path / 'train_prompts.txt').unlink()
    with pytest.raises(model_module.Mistake, match='run the prepare.py'):
        scripts.load_prompts(tmp_path, 'train', letters, 40, 100)
    (tmp_path / 'train.bin').touch()                                        # its prepare.py was run, and makes none
    with pytest.raises(model_module.Mistake, match='has no prompts; choose one with prompts'):
        scripts.load_prompts(tmp_path, 'train', letters, 40, 100)
    (tmp_path / 'train_prompts.txt').write_text('')
    with pytest.raises(model_module.Mistake, match='is empty'):
        scripts.load_prompts(tmp_path, 'train', letters, 40, 100)


def test_rejected_traces_are_refused(workshop):
    prompts = (workshop / 'data/arithmetic/add3/train_prompts.txt').read_text().splitlines()
    prompt, answer = prompts[0].split('\t')
    (workshop / 'good.txt').write_text(f'{prompt}<>{answer}\n')
    inside('data/arithmetic/prepare.py', '--task=add2', '--traces=good.txt', '--name=good', cwd=workshop)
    inside('train.py', *SFT, '--dataset=arithmetic/good', '--out_dir=out-student', '--block_size=8', cwd=workshop)
    for bad in ('1+1=<>2\n', f'{prompt}<>{answer}', '', f'{prompt}<>é\n'):
        (workshop / 'bad.txt').write_text(bad)
        said = inside('data/arithmetic/prepare.py', '--task=add2', '--traces=bad.txt', '--name=bad', cwd=workshop,
                      ok=False)
        assert 'Traceback' not in said and said.startswith('--traces=bad.txt')
    assert not (workshop / 'data/arithmetic/bad').exists()


def test_traces_are_not_written_over(workshop):
    """It is said before any sampling."""
    (workshop / 'mine.txt').write_text('months of work\n')
    code, out, said = run_inside('grpo.py', *GRPO, '--reward_file=raises-at-once.py', '--traces=mine.txt', cwd=workshop)
    assert code == 2 and said == "traces='mine.txt' must name a new file: that one is there already\n"
    assert (workshop / 'mine.txt').read_text() == 'months of work\n'


@contextlib.contextmanager
def running(folder, *flags, until):
    """grpo.py, from the moment when it has printed `until`; and the path of what it prints."""
    path = folder / 'printed'
    with open(path, 'wb') as out:
        process = forks.Process(['grpo.py', *GRPO, *flags], folder, {**os.environ, 'OMP_NUM_THREADS': '1'}, out, out)
    try:
        end = time.monotonic() + 60
        while until not in path.read_text():
            assert time.monotonic() < end, path.read_text()
            time.sleep(0.02)
        yield process, path
    finally:
        process.kill()


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_with_a_checkpoint(workshop, number):
    """After the iteration, and the run goes on as an uninterrupted one. Once, what followed an evaluation was lost."""
    out = f'out-signal{number}'
    flags = ['--reward_file=odd.py', '--eval_interval=1000', '--decay_lr=False']
    with running(workshop, *flags, f'--out_dir={out}', '--max_iters=10000', until='iter 1:') as (process, path):
        process.kill(number)
        assert process.wait(60) == 0
        said = path.read_text().splitlines()[-1]
    stopped = int(re.fullmatch(r'stopped by a signal before iteration (\d+); add --init_from=resume to go on from '
                               f'{out}/ckpt.pt', said)[1])
    assert torch.load(workshop / out / 'ckpt.pt')['iter_num'] == stopped >= 2
    assert os.path.samefile(workshop / out / 'ckpt.pt', workshop / out / 'ckpt_best.pt')  # there is no other
    flags.append(f'--max_iters={stopped + 1}')
    inside('grpo.py', *GRPO, *flags, f'--out_dir={out}', '--init_from=resume', cwd=workshop)
    inside('grpo.py', *GRPO, *flags, '--out_dir=out-no-signal', cwd=workshop)
    ended, whole = (torch.load(workshop / name / 'ckpt.pt')['model'] for name in (out, 'out-no-signal'))
    assert all(torch.equal(ended[name], whole[name]) for name in whole)


def test_a_second_ctrl_c_ends_at_once(workshop):
    """The first one waits for the iteration, which here takes a minute."""
    (workshop / 'slow.py').write_text("""
import time
calls = 0
def reward(prompt, response, answer):
    global calls
    calls += 1
    if calls == 10:  # an evaluation has 8 calls
        print('slow', flush=True)
        end = time.time() + 60
        while time.time() < end:
            time.sleep(0.01)
    return 0, 0
""")
    with running(workshop, '--reward_file=slow.py', '--out_dir=out-slow', until='\nslow\n') as (process, _):
        process.kill(signal.SIGINT)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.3)
        process.kill(signal.SIGINT)
        assert process.wait(5) == 130


def test_a_signal_to_one_rank_ends_both_after_the_same_iteration(workshop):
    """Rank 1 gets it in its rollout of iteration 1: 4 calls of an evaluation, 8 of an iteration."""
    (workshop / 'signals.py').write_text("""
import os, signal
calls = 0
def reward(prompt, response, answer):
    global calls
    calls += 1
    if os.environ['RANK'] == '1' and calls == 13:
        os.kill(os.getpid(), signal.SIGTERM)
    return sum(map(ord, response)) % 2, 1
""")
    said = torchrun('grpo.py', *GRPO, '--reward_file=signals.py', '--out_dir=out-two-signals', cwd=workshop)
    assert said.count('stopped by a signal before iteration 2; ') == 1
    assert torch.load(workshop / 'out-two-signals/ckpt.pt')['iter_num'] == 2


def test_the_best_checkpoint_stays_beside_the_last(workshop):
    """Its evaluation's accuracy is the highest, and of equal ones the first; a resume remembers it, and an evaluation
    at its start counts.
    """
    (workshop / 'scores.py').write_text("""
import os
calls, scores = 0, list(map(float, os.environ['SCORES'].split()))
def reward(prompt, response, answer):
    global calls
    calls += 1
    return scores[(calls - 1) // 24], sum(map(ord, response)) % 2  # 8 calls of an evaluation, 16 of an iteration
""")
    flags = ['--reward_file=scores.py', '--out_dir=out-best', '--eval_interval=1']

    def best_and_last(scores, *more):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv('SCORES', scores)
            inside('grpo.py', *GRPO, *flags, *more, cwd=workshop)
        saved = [torch.load(workshop / 'out-best' / name) for name in ('ckpt_best.pt', 'ckpt.pt')]
        return *(checkpoint['iter_num'] for checkpoint in saved), saved[1]['best_accuracy']

    assert best_and_last('1 .25 .5 .5 .125', '--max_iters=4') == (2, 4, 0.5)  # the start is not saved: it is not best
    assert best_and_last('.125 .5 .25', '--max_iters=6', '--init_from=resume') == (2, 6, 0.5)
    assert best_and_last('.75 .5', '--max_iters=7', '--init_from=resume') == (6, 7, 0.75)
    assert best_and_last('1', '--init_from=resume', '--eval_only=True') == (6, 7, 0.75)


def test_ranges(monkeypatch):
    """The last value that is allowed, and the first that is not, at each end; none is nan."""
    monkeypatch.setattr(grpo, 'world', 2, raising=False)
    settings = {key: getattr(grpo, key) for key in grpo.config_keys}
    tiny, most, nan = 1e-9, 2**31 - 1, math.nan
    counts = dict.fromkeys('max_new_tokens mu batch_size eval_interval eval_prompts trace_prompts max_iters'.split(),
                           ((1, most), (0, most + 1)))
    weights = dict.fromkeys('learning_rate weight_decay grad_clip clip_low clip_high kl_coef format_weight '
                            'mask_drift'.split(), ((0.0, 1e300), (-tiny, math.inf, nan)))
    ends = {**counts, **weights, 'warmup_iters': ((0, most), (-1, most + 1)),
            'prompts_per_iter': ((2, 2**20 - 2), (0, 3, 2**20)), 'group_size': ((2, 2**20 - 1), (1, 2**20)),
            'temperature': ((0.001, 1e300), (0.001 - tiny, math.inf, nan)), 'seed': ((0, 2**32 - 1), (-1, 2**32)),
            'beta1': ((0.0, 1 - tiny), (-tiny, 1.0, nan)), 'beta2': ((0.0, 1 - tiny), (-tiny, 1.0, nan)),
            'top_k': ((0, most), (-1, most + 1)), 'top_p': ((tiny, 1.0), (0.0, 1 + tiny, nan)),
            'old_logp': (('training', 'rollout'), ('', 'sampler')), 'truncated': (('keep', 'mask'), ('', 'drop')),
            'length_norm': (('response', 'token', 'constant'), ('', 'group')), 'traces': (('',), ('accepted.txt',)),
            'eval_split': (('val', 'test'), ('train',)), 'dtype': (('float32', 'bfloat16'), ('', 'float16'))}
    for key, (good, bad) in ends.items():
        for value in good:
            guard.check_ranges({**settings, key: value}, grpo.RANGES)
        for value in bad:
            with pytest.raises(model_module.Mistake, match=f'^{key}='):
                guard.check_ranges({**settings, key: value}, grpo.RANGES)


BAD_REWARDS = {
    'raises.py': ('def reward(p, r, a):\n    raise KeyError("oh")\n', "raises.py: reward('"),
    'line.py': ('def reward(p, r, a):\n    raise KeyError("oh")\n', ', line 2: KeyError'),
    'nan.py': ('def reward(p, r, a):\n    return float("nan"), 1\n', 'not finite'),
    'shape.py': ('def reward(p, r, a):\n    return 1\n', 'TypeError'),
    'none.py': ('x = 1\n', 'must define reward'),
    'exits.py': ('import sys\ndef reward(p, r, a):\n    sys.exit(0)\n', 'SystemExit: 0'),
    'interrupts.py': ('def reward(p, r, a):\n    raise KeyboardInterrupt\n', 'KeyboardInterrupt'),
    'ends.py': ('raise KeyboardInterrupt\n', 'KeyboardInterrupt'),
    'leaves.py': ('import sys\nsys.exit(0)\n', 'leaves.py, line 2 must define reward'),
    'imports.py': ('import nothing_of_this_name\n', 'ModuleNotFoundError'),
}
BAD_FLAGS = {
    '--group_size=1': 'group_size=1 must lie in 2..',
    '--prompts_per_iter=0': 'prompts_per_iter=0 must lie in 1..',
    '--length_norm=words': 'length_norm',
    '--kl_coef=-1.0': 'kl_coef=-1.0 must be finite and not negative',
    '--max_new_tokens=1000': 'do not fit',
    '--dataset=arithmetic/nowhere': 'prepare.py',
    '--init_from=out-nowhere': 'is missing',
    '--init_from=out-other': 'does not know the characters',
    '--init_from=out-words': 'has no tokenizer.json',
    '--init_from=out-odd': 'its characters are no tables',
    '--device=tpu': 'device',
    '--device=meta': 'device',
    '--seed=12345678901234567890123': 'seed=',
    '--beta1=1.5': 'beta1=1.5 must lie in [0, 1)',
    '--max_iters=-5': 'max_iters=-5 must lie in 1..',
    '--learning_rate=1e999': 'finite',
    '--reference=out-nowhere': 'is missing',
    '--reference=out-other': 'has other tokens',
    '--dtype=float16': 'dtype',
    '--traces=odd.py': 'is there already',
    '--eval_split=train': 'eval_split',
    '--temperature=0.0': 'temperature=0.0 must be finite and at least',
    '--init_from=out-kept': 'out-kept must not be in out-kept',
    '--init_from=out-kept/part': 'must not be in',
    '--reference=out-kept': 'must not be in',
    '--teacher=out-nowhere': 'is missing',
    '--teacher=out-other': "teacher='out-other' has other tokens",
    '--teacher=out-sft --kl_coef=0.1': 'kl_coef=0.1 must be 0 with a teacher',
    '--train_mtp=True': 'the model in out-sft has no MTP modules',
    '--init_from=out-dense --replay_routing=True': 'the model in out-dense has no routed experts',
    '--top_p=0.0': 'top_p=0.0 must lie in (0, 1]',
    '--top_k=-1': 'top_k=-1 must lie in 0..',
    '--old_logp=new': "old_logp='new' must be 'training' or 'rollout'",
    '--old_logp=rollout --top_k=3': "old_logp='rollout' must be 'training' with top_k or top_p",
    '--mask_drift=0.1 --top_p=0.9': 'mask_drift=0.1 must be 0 with top_k or top_p',
    '--teacher=out-short': "teacher='out-short' has block_size=",
    '--kl_coef=0.1 --reference=out-short': "reference='out-short' has block_size=",
    '--truncated=drop': "truncated='drop' must be 'keep' or 'mask'",
    '--mask_drift=-1.0': 'mask_drift=-1.0 must be finite and not negative',
    '--reward_file=odd.py,odd.py': 'must be one file, or one for each data set',
    '--dataset=arithmetic/add3,arithmetic/nowhere': 'prepare.py',
    '--traces=nowhere/accepted.txt': 'be in a folder you can write to',
    '--traces=accepted-none.txt': 'none of',
}


def test_bad_input_gets_one_line_and_leaves_the_checkpoint(workshop):
    inside('grpo.py', *GRPO, '--out_dir=out-kept', '--max_iters=2', cwd=workshop)
    kept = {path.name: path.read_bytes() for path in (workshop / 'out-kept').iterdir()}
    checkpoint = torch.load(workshop / 'out-sft' / 'ckpt.pt')
    for name, meta in (('out-other', {'stoi': {'x': 0}, 'itos': {0: 'x'}}), ('out-words', {}),
                       ('out-odd', {'stoi': 3, 'itos': 4})):
        (workshop / name).mkdir()
        torch.save({**checkpoint, 'meta': meta}, workshop / name / 'ckpt.pt')
    (workshop / 'out-short').mkdir()
    torch.save({**checkpoint, 'model_args': {**checkpoint['model_args'], 'block_size': 36}},
               workshop / 'out-short' / 'ckpt.pt')
    inside('train.py', *SFT, '--n_routed_experts=0', '--out_dir=out-dense', cwd=workshop)
    for name, (source, _) in BAD_REWARDS.items():
        (workshop / name).write_text(source)
    cases = {f'--reward_file={name}': words for name, (_, words) in BAD_REWARDS.items()} | BAD_FLAGS
    for flag, words in cases.items():
        code, _, said = run_inside('grpo.py', *GRPO, '--out_dir=out-kept', '--max_iters=3', '--eval_interval=1',
                                   '--trace_prompts=4', *flag.split(), cwd=workshop)
        assert code == 2 and words in said and len(said.strip().splitlines()) == 1, (flag, code, said)
    assert {path.name: path.read_bytes() for path in (workshop / 'out-kept').iterdir()} == kept
    assert not list(workshop.glob('accepted-none*'))


def test_masks_that_do_not_fit_the_data(workshop):
    mask = workshop / 'data/arithmetic/add3/train_mask.bin'
    whole = mask.read_bytes()
    for data in (b'', whole[:-1]):
        mask.write_bytes(data)
        code, _, said = run_inside('train.py', *SFT, '--out_dir=out-masked', cwd=workshop)
        assert code == 2 and 'train.bin (or its mask) is cut short' in said and len(said.strip().splitlines()) == 1
    mask.write_bytes(whole)
    assert not (workshop / 'out-masked').exists()


# what a run does from iteration to iteration

def test_responses_end_with_their_stop_token():
    """Those that were not cut off: it is what ends a row in the loss, too."""
    responses = grpo.sample_responses(Decoder(policy()), [[3, 4, 5]] * 16 + [[6, 7]] * 16, 12, 1.0)
    ended = [response for response in responses if response[-1] == STOP]
    assert all(len(response) == 12 for response in responses if response[-1] != STOP)
    assert 0 < len(ended) and min(map(len, ended)) < 12 and not any(STOP in response[:-1] for response in responses)


def test_the_rate_the_reward_and_the_randomness_of_each_iteration(workshop, monkeypatch):
    """The rate warms up, then falls linearly to zero at max_iters; each iteration draws anew."""
    generate, drawn = Decoder.generate, []

    def spy(self, prompts, max_new_tokens, temperature, *args, **kwargs):
        if temperature > 0:
            drawn.append(torch.rand(()).item())
        return generate(self, prompts, max_new_tokens, temperature, *args, **kwargs)

    monkeypatch.setattr(Decoder, 'generate', spy)
    flags = ['--reward_file=odd.py', '--out_dir=out-rate', '--max_iters=6', '--warmup_iters=1', '--format_weight=0.25',
             '--learning_rate=1e-3', '--max_new_tokens=12']
    for decay in (True, False):
        inside('grpo.py', *GRPO, *flags, f'--decay_lr={decay}', cwd=workshop)
        steps = [r for r in records(workshop, 'out-rate') if 'reward' in r]
        rates = [min((i + 1) / 2, 1 - i / 6 if decay else 1) * 1e-3 for i in range(6)]
        assert [r['lr'] for r in steps] == pytest.approx(rates)
        assert [r['reward'] for r in steps] == pytest.approx([r['accuracy'] + 0.25 * r['format'] for r in steps])
        assert {r['format'] for r in steps} == {1.0} and 0 < min(r['accuracy'] for r in steps) < 1
    assert len(drawn) == 12 and len(set(drawn)) == 6 and drawn[:6] == drawn[6:]


def test_the_entropy_is_that_of_the_policy_at_the_counted_tokens():
    gpt = policy()
    prompts, responses = rollouts(gpt)
    rows, mask, _ = grpo.pack(prompts, responses, STOP, 'cpu')
    with torch.no_grad():
        logp = gpt.lm_head(gpt.main_stack(rows[:, :-1])[0]).log_softmax(dim=-1)
    want = (torch.distributions.Categorical(logits=logp).entropy() * mask).sum() / mask.sum()
    numbers = grpo.update(gpt, torch.optim.SGD(gpt.parameters(), lr=0.0), rows, mask, torch.randn(len(rows)))
    assert numbers['entropy'] == pytest.approx(want.item(), rel=1e-4) and want > 0.1


def test_a_run_in_bfloat16(workshop):
    inside('grpo.py', *GRPO, '--reward_file=odd.py', '--out_dir=out-bf16', '--max_iters=2', '--dtype=bfloat16',
           '--max_new_tokens=12', cwd=workshop)
    assert [r['step'] for r in records(workshop, 'out-bf16') if 'reward' in r] == [0, 1]


@pytest.mark.parametrize('dtype, least, most', [('float32', 0, 1e-4), ('bfloat16', 1e-4, 0.1)])
def test_how_far_the_trainer_is_from_the_rollout(workshop, dtype, least, most):
    """`mismatch` is rounding; and `cut` is the share of responses without an end, of mu=2 as of mu=1."""
    (workshop / 'ended.py').write_text('def reward(p, r, a, ended=None):\n    return sum(map(ord, r)) % 2, ended')
    for mu in (1, 2):
        inside('grpo.py', *GRPO, '--reward_file=ended.py', '--out_dir=out-far', '--max_iters=2', f'--dtype={dtype}',
               '--max_new_tokens=5', f'--mu={mu}', cwd=workshop)
        steps = [r for r in records(workshop, 'out-far') if 'reward' in r]
        assert all(least < r['mismatch'] < most for r in steps)
        assert all(r['cut'] == pytest.approx(1 - r['format']) for r in steps) and 0 < steps[0]['cut'] < 1


@pytest.mark.parametrize('mu', [1, 2])
def test_the_mismatch_is_the_mean_difference(mu):
    model = policy()
    decoder, prompts = Decoder(model), [[3, 4, 5], [3, 4, 5], [6]]
    responses = grpo.sample_responses(decoder, prompts, 8, 0.7)
    assert [len(logp) for logp in decoder.log_probs] == [len(response) for response in responses]
    shifted = [[x - 0.25 for x in logp] for logp in decoder.log_probs]
    for log_probs, want in ((decoder.log_probs, 0.0), (shifted, 0.25)):
        rows, mask, logp = grpo.pack(prompts, responses, STOP, 'cpu', log_probs)
        numbers = grpo.update(model, torch.optim.SGD(model.parameters(), lr=0.0), rows, mask, torch.randn(3), mu=mu,
                              sampled_logp=logp, temperature=0.7, batch_size=2)
        assert numbers['mismatch'] == pytest.approx(want, abs=1e-5)
    # whatever the temperature: the decoder drops finished rows, and drafts are kept or not
    drafting = policy(num_nextn_predict_layers=2)
    decoder = Decoder(drafting)
    responses, _ = decoder.generate(prompts, 12, 2.0, None, STOP, speculative=True)
    for row, prompt, logp in zip(responses, prompts, decoder.log_probs):
        rows = torch.tensor([row])
        with torch.no_grad():
            want, *_ = grpo.log_probs(drafting.eval(), rows, 2.0)
        torch.testing.assert_close(torch.tensor(logp), want[0, len(prompt) - 1:], atol=1e-4, rtol=1e-4)


def test_a_reward_may_ask_whether_the_response_ended(workshop):
    """By an argument named `ended`; a mistake's line shows it. The words are the same as without it."""
    (workshop / 'asks.py').write_text(
        "def reward(prompt, response, answer, *, ended):\n"
        "    assert ended == response.endswith('\\n') and type(ended) is bool\n"
        "    return ended, 1\n")
    inside('grpo.py', *GRPO, '--reward_file=asks.py', '--out_dir=out-asks', '--max_iters=1', '--max_new_tokens=5',
           cwd=workshop)
    first = next(r for r in records(workshop, 'out-asks') if 'reward' in r)
    assert 0 < first['accuracy'] < 1
    (workshop / 'asks.py').write_text('def reward(prompt, response, answer, ended):\n    return 1 / 0\n')
    code, _, said = run_inside('grpo.py', *GRPO, '--reward_file=asks.py', '--out_dir=out-asks', cwd=workshop)
    assert code == 2 and re.search(r"asks.py: reward\('.*', ended=(True|False)\).*: ZeroDivisionError", said)


def test_responses_that_are_cut_off_may_leave_the_loss(workshop):
    """One likely token is no whole response. All are cut, and by truncated='mask' none is left to learn from."""
    for rule, learns in (('keep', True), ('mask', False)):
        inside('grpo.py', *GRPO, '--reward_file=odd.py', '--out_dir=out-cut', '--max_iters=1', '--max_new_tokens=1',
               '--temperature=1e-3', '--drop_zero_advantage=False', f'--truncated={rule}', cwd=workshop)
        step, = (r for r in records(workshop, 'out-cut') if 'reward' in r)
        assert step['cut'] == 1 and (step['entropy'] is not None) == learns
    # of some, the rest alone is in the batch; their rewards count in their groups all the same
    (workshop / 'ended.py').write_text('def reward(p, r, a, ended=None):\n    return not ended, ended')
    inside('grpo.py', *GRPO, '--reward_file=ended.py', '--out_dir=out-cut', '--max_iters=1', '--max_new_tokens=12',
           '--group_size=16', '--format_weight=0.0', '--truncated=mask', '--learning_rate=0.0', cwd=workshop)
    step, = (r for r in records(workshop, 'out-cut') if 'reward' in r)
    assert 0 < step['cut'] < 1 and step['cut'] == pytest.approx(step['reward']) and step['grad_norm'] > 0


def test_weights_that_are_not_finite_are_not_saved(workshop):
    """A rate of 1e300 is infinite in float32. The checkpoint and the log stay as they were before the step."""
    flags = [*GRPO, '--reward_file=odd.py', '--out_dir=out-broken', '--eval_interval=1', '--decay_lr=False']
    inside('grpo.py', *flags, '--max_iters=1', cwd=workshop)
    path = workshop / 'out-broken/ckpt.pt'
    whole = path.read_bytes()
    code, _, said = run_inside('grpo.py', *flags, '--init_from=resume', '--max_iters=2', '--learning_rate=1e300',
                               cwd=workshop)
    assert code == 2 and path.read_bytes() == whole
    assert said == ('the weights are not finite any more: out-broken/ckpt.pt is not written, and what was saved '
                    'before stays; try a smaller learning_rate\n')
    assert not [r for r in records(workshop, 'out-broken') if r['step'] == 2]


def test_the_flags_decide_the_optimizers_settings_of_a_resume(workshop):
    """Its moments go on; betas and decay are the flags', whatever the checkpoint says. MTP modules have no moments."""
    inside('train.py', *SFT, '--num_nextn_predict_layers=1', '--out_dir=out-mtp', cwd=workshop)
    flags = [*GRPO, '--reward_file=odd.py', '--out_dir=out-flags', '--eval_interval=1']
    inside('grpo.py', *flags, '--max_iters=1', '--init_from=out-mtp', cwd=workshop)
    again = '--max_iters=2', '--init_from=resume', '--beta2=0.7', '--weight_decay=0.25'
    assert 'begin anew' not in inside('grpo.py', *flags, *again, cwd=workshop)
    saved = torch.load(workshop / 'out-flags/ckpt.pt')['optimizer']
    assert [(g['betas'], g['weight_decay']) for g in saved['param_groups']] == [((0.9, 0.7), 0.25), ((0.9, 0.7), 0.0)]
    assert {state['step'].item() for state in saved['state'].values()} == {2}


def test_rewards_that_are_all_zero_are_pointed_out_once(workshop):
    """After three iterations, with the rule's file, a response and its answer. One reward is enough for silence."""
    said = inside('grpo.py', *GRPO, '--out_dir=out-zero', '--max_iters=8', '--max_new_tokens=3', cwd=workshop)
    note, = re.findall(r'^note: .*', said, re.M)
    assert re.fullmatch(r'note: all rewards of 3 iterations are 0, so nothing is learned. Does data/arithmetic/reward'
                        r".py fit arithmetic/add3\? The response '.*' to '\d+\+\d+=', answer '\d+', gets 0", note)
    assert said.index('iter 2:') < said.index(note) < said.index('iter 3:')
    (workshop / 'late.py').write_text('calls = []\ndef reward(prompt, response, answer):\n    calls.append(0)\n'
                                      '    return float(len(calls) == 16 * 3), 0\n')
    said = inside('grpo.py', *GRPO, '--reward_file=late.py', '--out_dir=out-zero', '--max_iters=5',
                  '--max_new_tokens=3', '--eval_interval=9', cwd=workshop)
    assert 'note:' not in said


@pytest.mark.parametrize('drop', [True, False])
def test_groups_of_equal_rewards_are_idle_whatever_the_reward(workshop, drop):
    """All right, and so nothing to prefer: they are counted as idle, and dropped they make no step."""
    (workshop / 'right.py').write_text('def reward(prompt, response, answer): return 1, 1')
    inside('grpo.py', *GRPO, '--reward_file=right.py', '--out_dir=out-idle', '--max_iters=2', '--max_new_tokens=12',
           f'--drop_zero_advantage={drop}', cwd=workshop)
    steps = [r for r in records(workshop, 'out-idle') if 'reward' in r]
    assert [r['zero_advantage'] for r in steps] == [1.0, 1.0] and all(r['grad_norm'] == 0 for r in steps)
    assert all((r['entropy'] is None) == drop for r in steps)


@pytest.mark.parametrize('rule, accepted', [
    ('sum(map(ord, response)) % 2, 1', lambda line: sum(map(ord, line[line.index('=') + 1:])) % 2 == 1),
    ('1, sum(map(ord, response)) % 2', lambda line: sum(map(ord, line[line.index('=') + 1:])) % 2 == 1),
    ('1, 1', lambda line: True)])
def test_a_trace_is_right_well_formed_and_ended(workshop, rule, accepted):
    """Of 4 responses to a prompt by a start that has learned little, some are not. No other file is touched."""
    (workshop / 'some.txt').unlink(missing_ok=True)
    (workshop / 'some.txt.tmp').write_text('months of work\n')
    (workshop / 'rule.py').write_text(f'def reward(prompt, response, answer): return {rule}')
    before = {path.name for path in workshop.iterdir()}
    inside('grpo.py', *GRPO, '--reward_file=rule.py', '--traces=some.txt', '--trace_prompts=30', '--max_new_tokens=12',
           cwd=workshop)
    assert (workshop / 'some.txt.tmp').read_text() == 'months of work\n'
    assert {path.name for path in workshop.iterdir()} - before == {'some.txt'}
    assert (workshop / 'some.txt').stat().st_mode == (workshop / 'odd.py').stat().st_mode  # others may read it
    lines = (workshop / 'some.txt').read_text().splitlines(keepends=True)
    assert 3 < len(lines) <= 30 and all(line.endswith('\n') and accepted(line) for line in lines)


def test_traces_are_sampled_as_rollouts_are(monkeypatch, tmp_path):
    seen = []

    def answer(questions, *sampling):
        seen.append(sampling)
        return [[3]] * len(questions), [[4, STOP]] * len(questions), ['x'] * len(questions), torch.ones(
            len(questions), 2)

    for key, value in dict(top_k=3, top_p=0.5, temperature=0.7, traces=str(tmp_path / 'some.txt')).items():
        monkeypatch.setattr(grpo, key, value)
    grpo.write_traces([('1+1=', '2', None)], answer, STOP)
    assert seen == [(0.7, 3, 0.5)] and (tmp_path / 'some.txt').read_text() == '1+1=x\n'


def test_no_trace_is_accepted_that_is_cut_off(workshop):
    """Three tokens are too few for any response to end: the rule likes all of them, and none is written."""
    (workshop / 'all.py').write_text('def reward(prompt, response, answer): return 1, 1')
    code, _, said = run_inside('grpo.py', *GRPO, '--reward_file=all.py', '--traces=none.txt', '--trace_prompts=8',
                               '--group_size=2', '--max_new_tokens=1', '--temperature=1e-3', cwd=workshop)
    assert code == 2 and 'none of 8 prompts' in said and not (workshop / 'none.txt').exists()


def test_traces_on_a_full_disk(workshop):
    """One line, and nothing is left behind."""
    before = {path.name for path in workshop.iterdir()}
    with file_limit(20):
        code, _, said = run_inside('grpo.py', *GRPO, '--reward_file=odd.py', '--traces=full.txt', '--trace_prompts=8',
                                   '--max_new_tokens=12', cwd=workshop)
    assert code == 2 and said == "traces='full.txt' cannot be written: File too large\n"
    assert {path.name for path in workshop.iterdir()} == before
