"""scale/pipeline.py on gloo's ranks against train.py on one: the same flags, the same losses and weights."""

import pytest
import torch
from conftest import load, log, losses, run_inside, torchrun, train

FLAGS = ['--n_layer=5', '--num_nextn_predict_layers=2', '--mtp_n_layer=1', '--batch_size=2',
         '--gradient_accumulation_steps=5', '--max_iters=20', '--lr_decay_iters=20', '--warmup_iters=5',
         '--eval_interval=20', '--eval_iters=1', '--log_interval=1', '--min_lr=1e-4', '--grad_clip=0.5',
         '--aux_loss_alpha=0.1']


def pipeline(clone, *flags, n):
    code, printed = torchrun(clone, *FLAGS, *flags, '--out_dir=piped', n=n, script='scale/pipeline.py')
    assert code == 0, printed
    return printed


def check_equal(clone):
    """Losses and norms over 20 steps, and the weights after them; the balance bias to the bit."""
    one, piped = losses(clone), losses(clone, 'piped')
    assert len(one) == len(piped) == 20
    worst = max(abs(x - y) for step in one for x, y in zip(one[step], piped[step], strict=True))
    print(f'losses and gradient norms within {worst:.1e}')
    assert worst < 1e-4
    busiest = [[max(r['max_vio']) if out == 'out' else r['max_vio'] for r in log(clone, out) if 'loss' in r]
               for out in ('out', 'piped')]
    assert busiest[0] == pytest.approx(busiest[1], abs=1e-6)
    one, piped = load(clone)['model'], load(clone, 'piped/ckpt.pt')['model']
    assert one.keys() == piped.keys()
    for name, weight in one.items():
        if name.endswith('bias'):
            assert weight.abs().max() > 0 and torch.equal(piped[name], weight), name
        else:
            torch.testing.assert_close(piped[name], weight, atol=1e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize('flags', [[], ['--schedule=1f1b', '--gradient_accumulation_steps=3', '--n_layer=2']],
                         ids=['dualpipev', '1f1b'])
def test_two_ranks_are_one_process(small, flags):
    train(small, *FLAGS, *[flag for flag in flags if 'schedule' not in flag])
    printed = pipeline(small, *flags, n=2)
    check_equal(small)
    layers = ['layers [0, 1, 4]', 'layers [2, 3]'] if not flags else ['layers [0]', 'layers [1]']
    for rank in range(2):
        assert any(f'rank {rank}: ' in line and layers[rank] in line for line in printed.splitlines()), printed


@pytest.mark.slow
@pytest.mark.parametrize('flags', [
    ['--n_layer=8', '--gradient_accumulation_steps=8'],
    ['--n_layer=9', '--first_k_dense_replace=2', '--tie_word_embeddings=False', '--gradient_accumulation_steps=11'],
    ['--schedule=1f1b', '--n_layer=6', '--gradient_accumulation_steps=5'],
    ['--schedule=1f1b', '--tie_word_embeddings=False', '--num_nextn_predict_layers=0'],
    ['--n_layer=8', '--gradient_accumulation_steps=8', '--n_routed_experts=0'],
], ids=['dualpipev', 'untied', '1f1b', '1f1b-untied', 'dense'])
def test_four_ranks_are_one_process(small, flags):
    train(small, *FLAGS, *[flag for flag in flags if 'schedule' not in flag])
    pipeline(small, *flags, n=4)
    if '--n_routed_experts=0' in flags:
        one, piped = losses(small), losses(small, 'piped')
        assert torch.tensor(list(one.values())).allclose(torch.tensor(list(piped.values())), atol=1e-4, rtol=0)
    else:
        check_equal(small)


@pytest.mark.parametrize('ranks, flags, line', [
    (1, [], 'a pipeline needs two ranks or more'),
    (2, ['--gradient_accumulation_steps=3'], 'gradient_accumulation_steps=3: 2 ranks with schedule=\'dualpipev\' are '
     '4 stages, and need 4 or more, or --schedule=1f1b with 2'),
    (4, ['--gradient_accumulation_steps=3', '--schedule=1f1b'], "4 ranks with schedule='1f1b' are 4 stages"),
    (4, ['--gradient_accumulation_steps=8'], 'n_layer=5: 4 ranks'),
    (2, ['--schedule=gpipe'], "schedule='gpipe' must be"),
    (2, ['--vocab_size=20'], 'must hold tokens below vocab_size=20'),
    (2, ['--dataset=none'], 'data/none/train.bin is missing: no data set has that name'),
    (2, ['--dtype=int8'], "dtype='int8' must be"), (2, ['--batch_size=0'], 'batch_size=0 must be positive'),
    (2, ['--num_experts_per_tok=9'], 'GPTConfig: num_experts_per_tok=9 must lie in 1..n_routed_experts=4'),
])
def test_a_mistake_is_one_line(small, monkeypatch, ranks, flags, line):
    monkeypatch.setenv('RANK', '0')
    monkeypatch.setenv('WORLD_SIZE', str(ranks))
    small_flags = ['--dataset=abc', '--device=cpu', '--n_embd=32', '--n_head=2', '--n_routed_experts=4',
                   '--num_experts_per_tok=2', '--block_size=16', '--out_dir=piped']
    code, printed, said = run_inside('scale/pipeline.py', *small_flags, *FLAGS, *flags, cwd=small)
    assert code == 2 and line in said and said.count('\n') == 1, said
    assert not (small / 'piped').exists()


def test_the_other_ranks_are_silent_and_an_out_dir_that_cannot_be_written(small):
    """Rank 0 alone can meet it, after the ranks are connected."""
    (small / 'piped').write_text('a file')
    code, printed = torchrun(small, *FLAGS, '--out_dir=piped', n=2, script='scale/pipeline.py')
    assert code != 0 and printed.count("out_dir='piped' cannot be written") == 1, printed
    assert 'Error' not in printed.split('cannot be written')[0]
