"""What V3.2 and V4 changed in reinforcement learning: routing replay, the sampling mask, distillation, MTP modules."""

import copy
import math

import pytest
import torch
from test_grpo import STOP, policy, rollouts
from torch.nn import functional as F

import grpo
import model_v4
from extras import rl
from extras.decode import Decoder, likeliest
from model import probabilities

PROMPTS = [list(prompt) for prompt in ((3, 4, 5), (6, 7), (3, 4, 5), (8,), (3, 4, 5), (6, 7))]


def batch_of(model, prompts=PROMPTS, max_new_tokens=12, temperature=1.0, context=None, **sampling):
    """A rollout, as update() gets it."""
    decoder = Decoder(model, keep_experts=True, keep_support=bool(sampling))
    with context or torch.no_grad():
        responses = grpo.sample_responses(decoder, prompts, max_new_tokens, temperature, **sampling)
    rows, mask, logp = grpo.pack(prompts, responses, STOP, 'cpu', decoder.log_probs)
    batch = {'rows': rows, 'mask': mask, 'sampled_logp': logp, 'advantages': torch.randn(len(rows)),
             'experts': rl.pack_experts(decoder.experts, mask.size(1))}
    if sampling:
        batch['support'] = rl.pack_support(decoder.support, prompts, mask.size(1))
    return batch


def known(batch):
    """Positions of tokens that are a prompt's or a response's, but the last: (B, T)"""
    mask = batch['mask']
    return mask.flip(-1).cumsum(dim=-1).flip(-1) > 0


def v4(**overrides):
    torch.manual_seed(0)
    config = dict(block_size=24, vocab_size=11, n_layer=3, n_head=2, n_embd=32, n_routed_experts=8,
                  num_experts_per_tok=3, num_nextn_predict_layers=0, eos_token_id=STOP, num_hash_layers=1,
                  initializer_range=0.2)
    return model_v4.GPT(model_v4.GPTConfig(**config | overrides))


# routing replay

@pytest.mark.parametrize('make', [policy, lambda: policy(first_k_dense_replace=1), v4,
                                  lambda: v4(layer_types='sch', sliding_window=8, compress_rate_hca=4, index_topk=4)])
def test_the_decoder_keeps_the_experts_that_it_used(make):
    """Of prompts and steps, though finished rows leave the batch: in fp32 those of a training forward."""
    model = make()
    batch = batch_of(model)
    assert len(set(batch['mask'].sum(dim=1).tolist())) > 2
    _, routing = model.train().main_stack(batch['rows'][:, :-1])
    own = torch.stack([experts for _, experts in routing], dim=2)
    assert own.shape == batch['experts'].shape
    same = (own.sort(dim=-1).values == batch['experts'].sort(dim=-1).values).all(dim=-1)
    assert same[known(batch)].all() and not same[~known(batch)].all()
    assert (rl.rerouted(batch['experts'], routing)[known(batch)] == 0).all()


def test_the_decoder_keeps_experts_and_support_with_drafts():
    """What a rejected draft had is overwritten."""
    model = policy(num_nextn_predict_layers=2)
    decoder = Decoder(model, keep_experts=True, keep_support=True)
    rows, _ = decoder.generate(PROMPTS, 12, 1.5, 4, STOP, speculative=True, top_p=0.9)
    model.train()
    for row, prompt, experts, support in zip(rows, PROMPTS, decoder.experts, decoder.support):
        with torch.no_grad():
            h, routing = model.main_stack(torch.tensor([row]))
        own = torch.cat([chosen for _, chosen in routing])[:, :-1].transpose(0, 1)             # (tokens - 1, L, K)
        assert torch.equal(own.sort(dim=-1).values, experts.long().sort(dim=-1).values)
        p = likeliest(probabilities(model.lm_head(h)[0], 1.5, 4), 0.9)
        assert torch.equal(p[len(prompt) - 1:-1] > 0, support)


@pytest.mark.slow
def test_a_compiled_step_keeps_them_too():
    model = policy()
    decoder = Decoder(model, compile=True, keep_experts=True, keep_support=True)
    responses = grpo.sample_responses(decoder, PROMPTS, 12, 1.0, 3)
    assert decoder.compile and decoder.compile_seconds > 0
    rows, mask, logp = grpo.pack(PROMPTS, responses, STOP, 'cpu', decoder.log_probs)
    T = mask.size(1)
    numbers = grpo.update(model, torch.optim.SGD(model.parameters(), lr=0.0), rows, mask, torch.randn(len(rows)),
                          sampled_logp=logp, experts=rl.pack_experts(decoder.experts, T),
                          support=rl.pack_support(decoder.support, PROMPTS, T))
    assert numbers['routing_mismatch'] == 0 and numbers['mismatch'] < 1e-5


def test_replay_uses_the_given_experts_with_gates_of_their_own_scores():
    """One MoE layer against a loop over tokens and their experts (V3 eq. 12 and 13)."""
    model = policy(n_layer=1)
    moe, seen = model.transformer.h[0].mlp, []
    moe.register_forward_hook(lambda moe, args, out: seen.append((args[0], *out)))
    idx = torch.randint(11, (2, 5))
    experts = torch.rand(2, 5, 1, 8).argsort(dim=-1)[..., :3].to(torch.int16)
    model.train()
    with rl.replayed(model, experts):
        model.main_stack(idx)
    model.main_stack(idx)
    (x, out, (scores, chosen)), (_, plain, _) = seen
    assert torch.equal(chosen, experts[:, :, 0].long()) and not torch.allclose(out, plain)
    for b in range(2):
        for t in range(5):
            token = x[b, t]
            want, s = moe.shared_experts(token), torch.sigmoid(moe.gate.weight @ token)
            total = sum(s[e] for e in experts[b, t, 0].tolist())
            for e in experts[b, t, 0].tolist():
                gate, up = (moe.experts_gate_up[e] @ token).chunk(2)
                want = want + s[e] / total * model.config.routed_scaling_factor * (moe.experts_down[e]
                                                                                   @ (F.silu(gate) * up))
            torch.testing.assert_close(out[b, t], want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize('make', [lambda: policy(n_layer=3), v4])
def test_replay_removes_the_routing_mismatch_of_bf16(make):
    """Rollout and training round differently, and so some tokens meet other experts: none does with replay."""
    numbers = {}
    for replay in (False, True):
        torch.manual_seed(0)
        model = make()
        autocast = torch.autocast('cpu', torch.bfloat16)
        batch = batch_of(model, PROMPTS * 16, 20, context=autocast)
        numbers[replay] = grpo.update(model, torch.optim.SGD(model.parameters(), lr=0.0), **batch, mu=2,
                                      replay_routing=replay, batch_size=50, context=autocast)
    assert numbers[False]['routing_mismatch'] > 1e-3 and numbers[True]['routing_mismatch'] == 0
    assert numbers[True]['mismatch'] < numbers[False]['mismatch'] < 0.2
    assert all(torch.isfinite(torch.tensor(x)) for x in numbers[True].values())


def test_the_routing_mismatch_is_a_share_of_tokens_and_layers():
    """Against a count in loops, after two experts of some rollouts were changed."""
    model = policy()
    batch = batch_of(model)
    _, routing = model.train().main_stack(batch['rows'][:, :-1])
    changed = torch.rand(batch['experts'].shape[:3]) < 0.3
    batch['experts'] = torch.where(changed.unsqueeze(-1), torch.tensor([0, 1, 2], dtype=torch.int16), batch['experts'])
    count = total = 0
    for b, t in batch['mask'].nonzero().tolist():
        for layer, (_, chosen) in enumerate(routing):
            total += 1
            count += set(chosen[b, t].tolist()) != set(batch['experts'][b, t, layer].tolist())
    numbers = grpo.update(model, torch.optim.SGD(model.parameters(), lr=0.0), **batch, mu=2, batch_size=4)
    assert numbers['routing_mismatch'] == pytest.approx(count / total) and 0 < count < total


# the sampling mask

def test_the_likeliest_tokens_against_a_loop():
    p = torch.randn(40, 9).softmax(dim=-1)
    for top_p in (0.05, 0.5, 0.9, 1.0):
        for row, kept in zip(p.tolist(), likeliest(p, top_p).tolist()):
            names, total = [], 0.0
            for i in sorted(range(9), key=lambda i: -row[i]):
                if total < top_p - 1e-7:
                    names.append(i)
                    total += row[i]
            want = [row[i] / total if i in names else 0.0 for i in range(9)]
            assert kept == pytest.approx(want, abs=1e-6)


@pytest.mark.parametrize('sampling', [{'top_k': 3}, {'top_p': 0.7}, {'top_k': 4, 'top_p': 0.8}])
def test_the_kept_mask_makes_trainer_and_sampler_agree(sampling):
    """With it they differ by rounding; without it the softmax of the training is over more tokens."""
    mismatch = {}
    for keep in (True, False):
        model = policy()
        torch.manual_seed(0)
        batch = batch_of(model, temperature=0.8, **sampling)
        sizes = batch['support'][batch['mask']].sum(dim=-1)
        assert sizes.max() <= sampling.get('top_k', 11) and batch['support'][~batch['mask']].all()
        if not keep:
            del batch['support']
        mismatch[keep] = grpo.update(model, torch.optim.SGD(model.parameters(), lr=0.0), **batch, temperature=0.8)
    assert mismatch[True]['mismatch'] < 1e-5 and mismatch[False]['mismatch'] > 1e-2
    assert mismatch[True]['entropy'] < mismatch[False]['entropy']


# one update against loops

def one_log_prob(model, row, t, temperature, support):
    """log pi of the whole vocabulary for target t of a row of token ids, -inf outside the support."""
    z = (model.lm_head(model.main_stack(row[None, :t + 1])[0])[0, -1] / temperature).tolist()
    scale = math.log(sum(math.exp(z[v]) for v in support))
    return [z[v] - scale if v in support else -math.inf for v in range(len(z))]


V32 = [dict(old_logp='rollout'), dict(kl_coef=0.3, unbiased_kl=True), dict(mask_drift=0.02),
       dict(old_logp='rollout', kl_coef=0.3, unbiased_kl=True, mask_drift=0.02, keep_sampling_mask=True)]


def off_policy(options, temperature):
    """-> a model, its reference, a rollout that differs from the model's, update()'s options, and whether it gets the
    sampling mask
    """
    options = dict(options)
    keep_mask = options.pop('keep_sampling_mask', False)
    model, reference = policy(), policy(std=0.25).requires_grad_(False).eval()
    batch = batch_of(model, temperature=temperature, **({'top_k': 4} if keep_mask else {}))
    batch['sampled_logp'] += 0.1 * torch.randn(batch['mask'].shape)
    batch['advantages'][:3] = -1.0
    return model, reference, batch, options, keep_mask


@pytest.mark.parametrize('options', V32, ids=lambda options: ' '.join(options))
def test_the_loss_of_an_update_against_loops(options, monkeypatch):
    """V3.2's equations, a number at a time: the gain that update() maximises is the sum over responses and tokens."""
    temperature = 0.7
    model, reference, batch, options, keep_mask = off_policy(options, temperature)
    losses, backward = [], torch.Tensor.backward
    monkeypatch.setattr(torch.Tensor, 'backward', lambda x, **more: losses.append(x.item()) or backward(x, **more))
    numbers = grpo.update(model, torch.optim.SGD(model.parameters(), lr=0.0), **batch, reference=reference,
                          clip_low=0.05, clip_high=0.08, temperature=temperature, batch_size=4, **options)

    gain, tokens, clipped, kls, left_out = 0.0, 0, 0, 0.0, 0
    for i, row in enumerate(batch['rows']):
        A, targets = batch['advantages'][i].item(), batch['mask'][i].nonzero().flatten().tolist()
        logs = []
        for t in targets:
            allowed = batch['support'][i, t].nonzero().flatten().tolist() if keep_mask else range(11)
            y = row[t + 1].item()
            new, ref = (one_log_prob(m, row, t, temperature, allowed)[y] for m in (model, reference))
            logs.append((new, ref, batch['sampled_logp'][i, t].item()))
        drift = sum(sampled - new for new, _, sampled in logs) / len(logs)
        M = 0 if options.get('mask_drift') and A < 0 and drift > options['mask_drift'] else 1
        for new, ref, sampled in logs:
            ratio = math.exp(new - sampled) if options.get('old_logp') == 'rollout' else 1.0
            kl = math.exp(ref - new) - (ref - new) - 1
            kl *= ratio if options.get('unbiased_kl') else 1
            bound = min(max(ratio, 0.95), 1.08)
            gain += (M * min(ratio * A, bound * A) - options.get('kl_coef', 0.0) * kl) / len(logs) / len(batch['rows'])
            tokens, kls, clipped = tokens + 1, kls + kl, clipped + (bound * A < ratio * A)
            left_out += 1 - M
    assert -sum(losses) == pytest.approx(gain, abs=1e-5)
    assert numbers['kl'] == pytest.approx(kls / tokens, rel=1e-3)
    assert numbers['clip'] == pytest.approx(clipped / tokens)
    assert clipped > 0 or 'old_logp' not in options
    if 'mask_drift' in options:
        assert numbers['drifted'] == pytest.approx(left_out / tokens) and 0 < left_out < tokens


@pytest.mark.parametrize('options', [*V32, dict(replay_routing=True)], ids=lambda options: ' '.join(options))
def test_two_steps_of_an_update_follow_the_gradient_of_the_loops(options):
    """With mu=2: the parameters after two steps of SGD, against autograd through one token's probability at a time."""
    temperature = 0.7
    model, reference, batch, options, keep_mask = off_policy(options, temperature)
    batch['experts'] = torch.rand(*batch['experts'].shape[:3], 8).argsort(dim=-1)[..., :3].short()  # some of 8
    twin, before = copy.deepcopy(model).train(), copy.deepcopy(model)
    grpo.update(model, torch.optim.SGD(model.parameters(), lr=0.5), **batch, mu=2, reference=reference, clip_low=0.05,
                clip_high=0.08, temperature=temperature, batch_size=4, grad_clip=0.0, **options)

    def log_prob(model, i, t, replay=None):
        with rl.replayed(model, replay):
            z = model.lm_head(model.main_stack(batch['rows'][i:i + 1, :t + 1])[0])[0, -1] / temperature
        allowed = batch['support'][i, t].nonzero().flatten() if keep_mask else torch.arange(11)
        return z[batch['rows'][i, t + 1]] - z[allowed].logsumexp(dim=0)

    optimizer, old, left_out = torch.optim.SGD(twin.parameters(), lr=0.5), {}, 0
    for _ in range(2):
        gain = 0.0
        for i, mask in enumerate(batch['mask']):
            A, targets = batch['advantages'][i], mask.nonzero().flatten().tolist()
            replay = [batch['experts'][i:i + 1, :t + 1] if options.get('replay_routing') else None for t in targets]
            new = torch.stack([log_prob(twin, i, t, experts) for t, experts in zip(targets, replay)])
            ref = torch.stack([log_prob(reference, i, t) for t in targets])
            sampled = batch['sampled_logp'][i, targets]
            old.setdefault(i, sampled if options.get('old_logp') == 'rollout' else new.detach())
            ratio, kl = (new - old[i]).exp(), (ref - new).exp() - (ref - new) - 1
            drifted = A < 0 and (sampled - new).mean() > options.get('mask_drift', math.inf)
            parts = torch.minimum(ratio * A, ratio.clamp(0.95, 1.08) * A) * (0.0 if drifted else 1.0)
            kl = kl * ratio if options.get('unbiased_kl') else kl
            gain = gain + (parts - options.get('kl_coef', 0.0) * kl).mean() / len(batch['rows'])
            left_out += bool(drifted)
        optimizer.zero_grad()
        (-gain).backward()
        optimizer.step()
    assert left_out > 0 or 'mask_drift' not in options
    for (name, p), want in zip(model.named_parameters(), twin.parameters()):
        torch.testing.assert_close(p, want, atol=2e-5, rtol=1e-3, msg=name)
    moved = max((p - start).abs().max().item() for p, start in zip(model.parameters(), before.parameters()))
    assert moved > 1e-2


def test_what_is_frozen_stays():
    """V4's indexer keeps choosing as it has learned to: no weight decay moves it."""
    model = v4(layer_types='sch', sliding_window=8, compress_rate_hca=4, index_topk=4)
    optimizer = model.configure_optimizers(0.1, 1e-2, (0.9, 0.95), 'cpu')
    indexer = {name: p.clone() for name, p in model.named_parameters() if '.indexer.' in name}
    for name, p in model.named_parameters():
        p.requires_grad_(name not in indexer)
    before = copy.deepcopy(model)
    grpo.update(model, optimizer, **batch_of(model))
    moved = {name for (name, p), q in zip(model.named_parameters(), before.parameters()) if not torch.equal(p, q)}
    assert indexer and moved and not moved & set(indexer)


def test_the_gradient_of_the_weighted_kl_is_the_kls():
    """In expectation over tokens of the policy. The plain k3 has that value, and another gradient."""
    z, ref = torch.randn(6, requires_grad=True), torch.randn(6).log_softmax(0)
    logp = z.log_softmax(0)
    p = logp.exp()
    exact, = torch.autograd.grad((p * (logp - ref)).sum(), z, retain_graph=True)
    weighted, = torch.autograd.grad((p.detach() * (logp - logp.detach()).exp() * grpo.k3(logp, ref)).sum(), z,
                                    retain_graph=True)
    plain, = torch.autograd.grad((p.detach() * grpo.k3(logp, ref)).sum(), z)
    torch.testing.assert_close(weighted, exact)
    assert not torch.allclose(plain, exact, atol=0.01)


@pytest.mark.parametrize('length_norm, top_k', [('response', 0), ('token', 0), ('constant', 5)])
def test_distillation_against_loops(length_norm, top_k, monkeypatch):
    """The reverse KL to the teacher over the vocabulary at each token of the responses; advantages do not matter."""
    model, teacher, temperature = policy(), policy(std=0.25).requires_grad_(False).eval(), 0.8
    batch = batch_of(model, temperature=temperature, **({'top_k': top_k} if top_k else {}))
    losses, backward = [], torch.Tensor.backward
    monkeypatch.setattr(torch.Tensor, 'backward', lambda x, **more: losses.append(x.item()) or backward(x, **more))
    numbers = grpo.update(model, torch.optim.SGD(model.parameters(), lr=0.0), **batch, teacher=teacher, batch_size=4,
                          max_new_tokens=12, temperature=temperature, length_norm=length_norm)
    loss, total, tokens = 0.0, 0.0, int(batch['mask'].sum())
    for i, row in enumerate(batch['rows']):
        targets = batch['mask'][i].nonzero().flatten().tolist()
        for t in targets:
            allowed = batch['support'][i, t].nonzero().flatten().tolist() if top_k else range(11)
            student, other = (one_log_prob(m, row, t, temperature, allowed) for m in (model, teacher))
            kl = sum(math.exp(student[v]) * (student[v] - other[v]) for v in allowed)
            norm = {'response': len(targets) * len(PROMPTS), 'token': tokens, 'constant': 12 * len(PROMPTS)}
            loss, total = loss + kl / norm[length_norm], total + kl
    assert sum(losses) == pytest.approx(loss, rel=1e-4)
    assert numbers['teacher_kl'] == pytest.approx(total / tokens, rel=1e-4) and total > 0


def test_a_student_becomes_its_teacher():
    """On-policy distillation alone, without a reward: the KL falls and falls."""
    model, teacher = policy(n_layer=1), policy(n_layer=1, std=0.25).requires_grad_(False)
    optimizer = model.configure_optimizers(0.0, 5e-3, (0.9, 0.99), 'cpu')
    kl = []
    for _ in range(40):
        kl.append(grpo.update(model, optimizer, **batch_of(model, PROMPTS * 2), teacher=teacher)['teacher_kl'])
    assert kl[0] > 0.5 and kl[-1] < 0.4 * kl[0]


# MTP modules

def test_mtp_modules_learn_and_the_policy_does_not_notice():
    """With train_mtp the main stack takes bit for bit the same steps; the modules' loss on the responses falls."""
    start = policy(num_nextn_predict_layers=2, bias_update_speed=0.001)
    results = {}
    for train_mtp in (False, True):
        model = policy(num_nextn_predict_layers=2, bias_update_speed=0.001)
        model.load_state_dict(start.state_dict())
        optimizer = model.configure_optimizers(0.1, 1e-2, (0.9, 0.95), 'cpu')
        model.mtp.requires_grad_(train_mtp)
        torch.manual_seed(1)
        batch = batch_of(model, PROMPTS * 2)
        losses = [grpo.update(model, optimizer, **batch, mu=2, train_mtp=train_mtp, batch_size=5).get('mtp_loss')
                  for _ in range(6)]
        results[train_mtp] = model.state_dict()
    assert losses[-1] < 0.9 * losses[0]
    for name, value in results[True].items():
        same = torch.equal(value, start.state_dict()[name])
        if name.startswith('mtp.'):
            assert not same, name                                                              # their biases too
            assert torch.equal(results[False][name], start.state_dict()[name])
        else:
            assert torch.equal(value, results[False][name]), name


def test_the_mtp_loss_against_loops():
    """Module k at position i predicts token i + k + 1, if tokens i + 1 to i + k + 1 are the response's."""
    model = policy(num_nextn_predict_layers=2)
    prompts, responses = [[3, 4, 5], [6, 7]], [[1, 2, 9, STOP], [4, STOP]]
    rows, mask, _ = grpo.pack(prompts, responses, STOP, 'cpu')
    numbers = grpo.update(model, torch.optim.SGD(model.parameters(), lr=0.0), rows, mask, torch.randn(2), batch_size=1,
                          train_mtp=True)
    means = []
    for k in (1, 2):
        found = []
        for prompt, response in zip(prompts, responses):
            row = torch.tensor([prompt + response])
            for i in range(len(prompt) - 1, row.size(1) - 1 - k):
                h = model.main_stack(row[:, :i + 1])[0]
                for j in range(1, k + 1):
                    h = model.mtp_module(model.mtp[j - 1], row[:, j:i + 1 + j], h)[0]
                found.append(-model.lm_head(h)[0, -1].log_softmax(0)[row[0, i + k + 1]].item())
        means.append(sum(found) / len(found))
    assert len(found) == 2 and numbers['mtp_loss'] == pytest.approx(sum(means) / 2, rel=1e-4)


def test_rollouts_still_know_nothing_of_what_is_not_kept():
    """Without the flags a State holds no experts and no support; nor does greedy decoding hold a support."""
    decoder = Decoder(policy(), keep_support=True)
    decoder.generate(PROMPTS, 4, 0.0, 3, STOP)
    assert all(support.numel() == 0 for support in decoder.support)
    decoder = Decoder(policy())
    decoder.generate(PROMPTS, 4, 1.0, 3, STOP)
    assert all(experts.numel() == 0 for experts in decoder.experts)
    assert all(support.numel() == 0 for support in decoder.support)
    assert rollouts(policy())[1]
