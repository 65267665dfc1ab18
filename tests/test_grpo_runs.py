"""What a run of grpo.py does from iteration to iteration: its rate, rewards, randomness, and the traces it accepts."""

import pytest
import torch
from conftest import run_inside
from test_grpo import GRPO, STOP, inside, policy, records, rollouts, workshop  # noqa: F401

import grpo
import model


def test_responses_end_with_their_stop_token():
    """Those that were not cut off: it is what ends a row in the loss, too."""
    responses = grpo.sample_responses(policy(), [[3, 4, 5], [6, 7]], 16, 12, 1.0)
    ended = [response for response in responses if response[-1] == STOP]
    assert all(len(response) == 12 for response in responses if response[-1] != STOP)
    assert 0 < len(ended) and min(map(len, ended)) < 12 and not any(STOP in response[:-1] for response in responses)


def test_the_rate_the_reward_and_the_randomness_of_each_iteration(workshop, monkeypatch):  # noqa: F811
    """The rate warms up, then falls linearly to zero at max_iters; each iteration draws anew."""
    generate, drawn = model.GPT.generate, []

    def spy(self, idx, max_new_tokens, temperature, **kwargs):
        if temperature > 0:
            drawn.append(torch.rand(()).item())
        return generate(self, idx, max_new_tokens, temperature, **kwargs)

    monkeypatch.setattr(model.GPT, 'generate', spy)
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
    rows, mask = grpo.pack(prompts, responses, STOP, 'cpu')
    with torch.no_grad():
        logp = gpt.lm_head(gpt.main_stack(rows[:, :-1])[0]).log_softmax(dim=-1)
    want = (torch.distributions.Categorical(logits=logp).entropy() * mask).sum() / mask.sum()
    numbers = grpo.update(gpt, torch.optim.SGD(gpt.parameters(), lr=0.0), rows, mask, torch.randn(len(rows)))
    assert numbers['entropy'] == pytest.approx(want.item(), rel=1e-4) and want > 0.1


@pytest.mark.parametrize('drop', [True, False])
def test_groups_of_equal_rewards_are_idle_whatever_the_reward(workshop, drop):  # noqa: F811
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
def test_a_trace_is_right_well_formed_and_ended(workshop, rule, accepted):  # noqa: F811
    """Of 4 responses to a prompt by a start that has learned little, some are not."""
    (workshop / 'some.txt').unlink(missing_ok=True)
    (workshop / 'rule.py').write_text(f'def reward(prompt, response, answer): return {rule}')
    inside('grpo.py', *GRPO, '--reward_file=rule.py', '--traces=some.txt', '--trace_prompts=30', '--max_new_tokens=12',
           cwd=workshop)
    lines = (workshop / 'some.txt').read_text().splitlines(keepends=True)
    assert 3 < len(lines) <= 30 and all(line.endswith('\n') and accepted(line) for line in lines)


def test_no_trace_is_accepted_that_is_cut_off(workshop):  # noqa: F811
    """Three tokens are too few for any response to end: the rule likes all of them, and none is written."""
    (workshop / 'all.py').write_text('def reward(prompt, response, answer): return 1, 1')
    code, _, said = run_inside('grpo.py', *GRPO, '--reward_file=all.py', '--traces=none.txt', '--trace_prompts=8',
                               '--group_size=2', '--max_new_tokens=1', '--temperature=1e-3', cwd=workshop)
    assert code == 2 and 'none of 8 prompts' in said and not (workshop / 'none.txt').exists()
