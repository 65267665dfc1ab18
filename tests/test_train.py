"""train.py, sample.py and plot.py as users run them, on small data."""

import gc
import importlib
import json
import math
import os
import pickle
import re
import select
import shutil
import struct
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torch.distributed.fsdp._fully_shard._fsdp_init
from conftest import ROOT, SMALL, add_data, copy_project, log, losses, run, run_inside, torchrun, train

import model
from extras import dcp
from model import GPT


def train_apart(clone, *flags, **env):
    return run('train.py', *SMALL, *flags, cwd=clone, **env)


def weights(clone, out='out'):
    return torch.load(clone / out / 'ckpt.pt', weights_only=True)['model']


def train_on_two_ranks(clone, *flags):
    """Through a wrapper that keeps each rank's weights, not only those that rank 0 saves."""
    (clone / 'each_rank.py').write_text('''
import os, runpy, sys, torch
def leave(code, leave=os._exit):  # as train.py ends under torchrun
    if code == 0:
        torch.save(sys._getframe(1).f_globals['raw_model'].state_dict(), 'rank' + os.environ['RANK'])
    leave(code)
os._exit = leave
runpy.run_path('train.py', run_name='__main__')
''')
    code, printed = torchrun(clone, *flags, script='each_rank.py')
    assert code == 0, printed[-4000:]
    return printed


def test_lines_log_and_checkpoint(small):
    printed = train(small)
    evals = re.findall(r'^step (\d+): train loss (\d+\.\d{4}), val loss (\d+\.\d{4})', printed, re.M)
    iters = re.findall(r'^iter (\d+): loss (\d+\.\d{4}), time (\d+\.\d{2})ms, (?!mfu)', printed, re.M)
    assert [int(e[0]) for e in evals] == [0, 3, 6]
    assert [int(i[0]) for i in iters] == list(range(6))            # as many updates as max_iters says
    assert float(evals[-1][2]) < float(evals[0][2]) - 0.1
    assert 'tok/s' in printed and 'left' in printed
    header, *records = log(small)
    assert header['command'].endswith('--out_dir=out') and 'hardware' in header and 'git_commit' in header
    assert header['command'].split()[0].endswith('train.py') and header['versions']['torch'] == torch.__version__
    assert header['config']['n_embd'] == 32 and header['model_args']['kv_lora_rank'] == 12
    step = next(r for r in records if 'loss' in r)
    assert {'step', 'loss', 'mtp_losses', 'balance', 'lr', 'tokens_per_s', 'mfu', 'max_vio', 'grad_norm'} <= set(step)
    assert len(step['mtp_losses']) == 2 and len(step['max_vio']) == 4 and step['mfu'] is None
    checkpoint = torch.load(small / 'out/ckpt.pt', weights_only=True)
    assert {'model', 'optimizer', 'model_args', 'iter_num', 'best_val_loss', 'config'} <= set(checkpoint)
    assert checkpoint['iter_num'] == 6
    # b moved once in each of 6 steps, by u = 0.01 and a re-centring: at most 0.01 * 2 a step
    bias = checkpoint['model']['transformer.h.0.mlp.e_score_correction_bias']
    assert 0 < bias.abs().max() <= 6 * 0.02 and abs(bias.sum()) < 1e-6


def test_two_ranks_make_the_same_model_as_one(small):
    train(small, '--out_dir=one', '--gradient_accumulation_steps=4')
    printed = train_on_two_ranks(small, '--out_dir=two', '--gradient_accumulation_steps=4')
    one, two = weights(small, 'one'), weights(small, 'two')
    for k in one:
        torch.testing.assert_close(two[k], one[k], atol=2e-5, rtol=1e-4, msg=lambda m, k=k: f'{k}: {m}')
    a, b = ([r for r in log(small, out) if 'val_loss' in r] for out in ('one', 'two'))
    for x, y in zip(a, b):                                          # evaluation over ranks = evaluation on one
        assert abs(x['val_loss'] - y['val_loss']) < 1e-4 and abs(x['train_loss'] - y['train_loss']) < 1e-4
    first, second = (next(r for r in log(small, out) if 'loss' in r) for out in ('one', 'two'))
    assert abs(first['loss'] - second['loss']) < 1e-5 and first['max_vio'] == pytest.approx(second['max_vio'])
    assert abs(first['grad_norm'] - second['grad_norm']) < 1e-4
    assert len(re.findall(r'^iter 0:', printed, re.M)) == 1 and printed.count('Overriding: n_embd') == 1  # one prints
    ranks = [torch.load(small / f'rank{r}', weights_only=True) for r in range(2)]
    assert all(torch.equal(ranks[0][k], ranks[1][k]) for k in two)
    assert any('e_score_correction_bias' in k and two[k].abs().sum() > 0 for k in two)


def test_bits_per_byte(small):
    """Of the validation loss, by the bytes per token that prepare.py counted; without them no such number."""
    assert 'bits per byte' not in train(small, '--max_iters=1') and log(small)[1]['val_bpb'] is None
    meta = pickle.loads((small / 'data/abc/meta.pkl').read_bytes())
    (small / 'data/abc/meta.pkl').write_bytes(pickle.dumps(meta | {'bytes_per_token': 2.5}))
    said = train(small, '--max_iters=1')
    record = log(small)[1]
    assert record['val_bpb'] == pytest.approx(record['val_loss'] / math.log(2) / 2.5)
    assert f'val loss {record["val_loss"]:.4f} ({record["val_bpb"]:.4f} bits per byte)\n' in said
    for wrong in (0.0, -1.0, math.nan, 2):
        (small / 'data/abc/meta.pkl').write_bytes(pickle.dumps(meta | {'bytes_per_token': wrong}))
        assert 'its bytes_per_token must be float > 0' in train(small, '--max_iters=1', code=2)


def test_best_val_loss_is_the_best(small):
    """nanoGPT overwrote it with a worse one under always_save_checkpoint."""
    train(small, '--learning_rate=0.3', '--decay_lr=False', '--warmup_iters=0', '--eval_interval=1', '--max_iters=3')
    best = torch.load(small / 'out/ckpt.pt', weights_only=True)['best_val_loss']
    evals = [r['val_loss'] for r in log(small) if 'val_loss' in r][1:]
    assert evals[-1] > min(evals) + 0.05 and best == min(evals)


def test_the_best_is_judged_by_the_validation_loss(small):
    """One character is the whole training split: what the model learns makes it worse on the other split."""
    np.full(600, 6, dtype=np.uint16).tofile(small / 'data/abc/train.bin')
    train(small, '--eval_interval=2', '--learning_rate=0.1', '--decay_lr=False')
    train_losses, val_losses = ([r[name] for r in log(small) if name in r] for name in ('train_loss', 'val_loss'))
    assert train_losses[1] > train_losses[2] > train_losses[3] and val_losses[1] < val_losses[2] < val_losses[3]
    best = torch.load(small / 'out/ckpt_best.pt')
    assert (best['iter_num'], best['best_val_loss'], best['val_loss']) == (2, val_losses[1], val_losses[1])


def test_a_diverging_run_saves_its_first_evaluation(small):
    """Worse than at step 0, but step 0 is never saved: the run would leave nothing behind."""
    train(small, '--learning_rate=0.3', '--decay_lr=False', '--warmup_iters=0', '--max_iters=3',
          '--always_save_checkpoint=False')
    evals = [r['val_loss'] for r in log(small) if 'val_loss' in r]
    assert evals[1] > evals[0] and (small / 'out/ckpt.pt').exists()
    printed = train(small, '--init_from=resume', '--n_layer=3', '--max_iters=4', '--always_save_checkpoint=False')
    assert "ignored, since the architecture is the checkpoint's: n_layer=3\n" in printed


def test_eval_only_evaluates_once_on_resume_too(small):
    train(small)
    before = (small / 'out/ckpt.pt').read_bytes()
    printed = train(small, '--init_from=resume', '--eval_only=True', '--max_iters=20')
    assert len(re.findall(r'^step', printed, re.M)) == 1 and not re.findall(r'^iter', printed, re.M)
    assert (small / 'out/ckpt.pt').read_bytes() == before


def test_a_step_is_evaluated_once(small):
    """Once, a resume evaluated and logged again what the run before it had."""
    def evaluated():
        return [r['step'] for r in log(small) if 'val_loss' in r]

    train(small, '--max_iters=3')
    train(small, '--init_from=resume')
    assert evaluated() == [0, 3, 6]
    saved = torch.load(small / 'out/ckpt.pt')
    torch.save({**saved, 'val_loss': None}, small / 'out/ckpt.pt')  # as after a signal: not evaluated yet
    train(small, '--init_from=resume', '--max_iters=9')
    assert evaluated() == [0, 3, 6, 6, 9]


def test_a_resume_with_nothing_to_train_evaluates(small):
    train(small, '--max_iters=4', '--eval_interval=4')
    printed = train(small, '--init_from=resume', '--max_iters=2')
    assert 'going on from out/ckpt.pt, iteration 4 of 2\n' in printed
    assert 'note: out/ckpt.pt has all 4 iterations: to train on, raise max_iters=2\n' in printed
    assert re.findall(r'^step (\d+): train loss', printed, re.M) == ['4'] and 'iter 4' not in printed


def test_what_a_run_says_of_its_checkpoints(small):
    printed = train(small).splitlines()
    assert [printed[i - 1][:7] for i, line in enumerate(printed) if line == 'saving checkpoint to out'] == \
        ['step 3:', 'step 6:']
    assert printed[-1] == 'done; to sample from the model: python sample.py --out_dir=out --num_samples=1'
    assert 'to sample from' in train(small, '--max_iters=1', '--checkpoint=dcp')
    assert 'to sample' not in train(small, '--max_iters=0', '--out_dir=other')  # without a checkpoint


def test_a_line_passes_a_pipe_at_once(small):
    """train.py | tee: once, nothing was seen for minutes."""
    long = ['--max_iters=1000000', '--eval_interval=1000000', '--log_interval=1000000']
    env = {name: value for name, value in os.environ.items() if name != 'PYTHONUNBUFFERED'}
    process = subprocess.Popen([sys.executable, 'train.py', *SMALL, *long], cwd=small, env=env, stdout=subprocess.PIPE)
    text, end = b'', time.time() + 60
    while b'\niter 0: loss' not in text and time.time() < end:
        if select.select([process.stdout], [], [], 1)[0]:
            text += os.read(process.stdout.fileno(), 4096)
    process.kill()
    process.wait()
    process.stdout.close()
    assert b'\niter 0: loss' in text


def test_uint32_tokens_are_read_as_such(small):
    for split in ('train', 'val'):
        path = small / f'data/abc/{split}.bin'
        (np.fromfile(path, dtype=np.uint16).astype(np.uint32) + 70000).tofile(path)
    (small / 'data/abc/meta.pkl').write_bytes(pickle.dumps({'vocab_size': 70050, 'dtype': 'uint32'}))
    train(small, '--max_iters=1', '--eval_iters=1')
    assert log(small)[0]['model_args']['vocab_size'] == 70050


@pytest.mark.filterwarnings('ignore:dynamo_pgo force disabled')
def test_compile_falls_back_to_eager_in_one_line(small):
    short = ['--n_layer=1', '--num_nextn_predict_layers=0', '--max_iters=2']
    torch._dynamo.reset()
    with torch._inductor.config.patch({'force_disable_caches': True, 'cpp.cxx': ('/nonexistent/compiler',)}):
        printed = train(small, '--compile=True', *short)
    assert 'going on without torch.compile' in printed
    train(small, *short, '--out_dir=eager')
    assert losses(small) == losses(small, 'eager')


def test_graphs_of_compiled_blocks_train_like_eager_ones(small, monkeypatch):
    """Without Inductor, whose compiler takes a minute."""
    compile = GPT.compile
    monkeypatch.setattr(GPT, 'compile', lambda self: compile(self, backend='aot_eager'))
    short = ['--n_layer=1', '--num_nextn_predict_layers=1']
    train(small, *short, '--out_dir=eager')
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    assert 'without torch.compile' not in train(small, *short, '--compile=True')
    assert torch._dynamo.utils.counters['stats']['unique_graphs'] > 0
    one, eager = losses(small), losses(small, 'eager')
    assert len(one) == 6 and all(one[step] == pytest.approx(eager[step], rel=1e-4) for step in eager)


@pytest.mark.slow
@pytest.mark.parametrize('kept', [1.0, 0.0])
def test_compiled_blocks_train_like_eager_ones(small, kept):
    """On two ranks too, with DDP around the blocks: those find the first run's code in Inductor's cache."""
    short = ['--max_iters=2', '--eval_interval=2', '--n_layer=1', '--num_nextn_predict_layers=1', '--dtype=bfloat16']
    code, _, said = run_inside('train.py', *SMALL, *short, cwd=small)
    assert code == 0, said
    short += ['--compile=True', f'--activation_memory={kept}']
    printed = train(small, *short, '--out_dir=one')
    eager, one = losses(small, 'out'), losses(small, 'one')
    assert list(eager) == list(one) == [0, 1]
    assert all(one[step] == pytest.approx(eager[step], rel=0.02) for step in eager)
    printed += train_on_two_ranks(small, *short, '--out_dir=two')
    two = losses(small, 'two')
    assert all(two[step] == pytest.approx(one[step], rel=1e-3) for step in one)     # only the order of the sums differs
    ranks = [torch.load(small / f'rank{r}', weights_only=True) for r in range(2)]
    assert all(torch.equal(ranks[0][k], ranks[1][k]) for k in ranks[0])
    assert 'without torch.compile' not in printed


def wandb_history(path):
    """What a run of wandb has logged, from its file: records in blocks of 32 KiB, as LevelDB's log has them."""
    from wandb.proto.wandb_internal_pb2 import Record
    data, at, whole, history = path.read_bytes(), 7, b'', []
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:                                  # the end of a block is padding
            at += 32768 - at % 32768
        _, size, kind = struct.unpack('<IHB', data[at:at + 7])
        whole += data[at + 7:at + 7 + size]
        at += 7 + size
        if kind in (1, 4):                                          # whole, or the last part
            record, whole = Record.FromString(whole), b''
            if record.HasField('history'):
                history.append({item.key or item.nested_key[0]: json.loads(item.value_json)
                                for item in record.history.item})
    return history


def test_wandb_offline(small):
    """By nanoGPT's names, a number each; a resume goes on in the same run."""
    flags, quiet = ['--wandb_log=True', '--wandb_run_name=a=b'], {'WANDB_MODE': 'offline', 'WANDB_SILENT': 'true'}
    train_apart(small, *flags, '--max_iters=3', **quiet)
    train_apart(small, *flags, '--init_from=resume', **quiet)
    assert log(small)[0]['config']['wandb_run_name'] == 'a=b'
    first, second = sorted((small / 'wandb').glob('offline-run-*/*.wandb'))
    assert first.name == second.name and torch.load(small / 'out/ckpt.pt')['wandb_id'] in first.name
    logged = wandb_history(first) + wandb_history(second)
    assert [r['iter'] for r in logged] == [r['_step'] for r in logged]
    assert [r['iter'] for r in logged if 'loss' in r] == list(range(6))
    of_log = {r['step']: r for r in log(small) if 'val_loss' in r}
    evals = {r['iter']: r for r in logged if 'val/loss' in r}
    assert list(evals) == list(of_log) == [0, 3, 6]
    for step, r in evals.items():
        assert (r['train/loss'], r['val/loss']) == (of_log[step]['train_loss'], of_log[step]['val_loss']) and 'lr' in r
    step = next(r for r in logged if 'loss' in r)
    assert {'lr', 'grad_norm', 'mtp_losses/0', 'mtp_losses/1', 'max_vio/3'} <= step.keys()
    assert all(type(v) in (int, float) for r in logged for k, v in r.items() if not k.startswith('_'))


def test_a_mistake_after_wandb_has_begun(small):
    """wandb puts its own hook before the project's, and that prints a traceback."""
    printed = run('train.py', *SMALL, '--wandb_log=True', '--out_dir=model.py/out', cwd=small, ok=False,
                  WANDB_MODE='offline', WANDB_SILENT='true')
    assert printed.splitlines()[-1] == "out_dir='model.py/out' cannot be written: Not a directory"
    assert 'Traceback' not in printed and list((small / 'wandb').glob('offline-run-*'))


def test_it_runs_from_any_folder(small, tmp_path):
    elsewhere = tmp_path / 'elsewhere'
    elsewhere.mkdir()
    run(small / 'train.py', *SMALL, cwd=elsewhere)
    assert (elsewhere / 'out/ckpt.pt').exists()
    sample = [small / 'sample.py', '--device=cpu', '--start=0', '--num_samples=1', '--max_new_tokens=4']
    assert '---' in run(*sample, cwd=elsewhere)


# sample.py and plot.py

def inside(*args, cwd):
    code, printed, said = run_inside(*args, cwd=cwd)
    assert code == 0, said
    return printed


def test_sample_and_plot(small):
    train(small)
    (small / 'prompt.txt').write_text('024')
    sample = ['sample.py', '--out_dir=out', '--device=cpu', '--num_samples=3', '--max_new_tokens=30']
    rows = inside(*sample, '--start=FILE:prompt.txt', cwd=small).split('---------------\n')
    texts = [row.splitlines()[-1] for row in rows[:3]]
    assert all(len(t) == 33 and t.startswith('024') for t in texts) and len(set(texts)) == 3
    assert re.search(r'90 tokens in .* tokens/s', rows[3])
    assert inside(*sample, '--start=0', '--temperature=0', '--dtype=float32', cwd=small).count('---') > 0
    with open(small / 'out/log.jsonl', 'a') as f:
        f.write('{"step": 7, "lo')                                  # killed while it wrote
    inside('plot.py', 'out/log.jsonl', 'out/log.jsonl', '--out=log.png', cwd=small)
    assert (small / 'log.png').read_bytes().startswith(b'\x89PNG')


def test_plot_of_relative_losses(tmp_path):
    """Runs are compared with the one that has their seed; the moving average begins at the first loss."""
    for name, seed, loss in (('a-1', 1, 2.0), ('a-2', 2, 4.0), ('b-1', 1, 2.1), ('b-2', 2, 3.96)):
        (tmp_path / name).mkdir()
        records = [{'command': '', 'config': {'seed': seed}}] + [
            {'step': i, 'loss': loss * (1 + i % 2), 'mtp_losses': []} for i in range(120)]
        (tmp_path / name / 'log.jsonl').write_text('\n'.join(map(json.dumps, records)))
    logs = {name: tmp_path / name / 'log.jsonl' for name in ('a-1', 'a-2', 'b-1', 'b-2')}
    plot = ROOT / 'plot.py'
    printed = inside(plot, logs['b-1'], logs['b-2'], '--relative_to', logs['a-2'], logs['a-1'], cwd=tmp_path)
    assert 'b-1: 5.00%, +5.00%' in printed and 'b-2: 1.00%, -1.00%' in printed
    assert (tmp_path / 'b-1/logs.png').stat().st_size > 10000
    code, _, said = run_inside(plot, logs['b-2'], '--relative_to', logs['a-1'], cwd=tmp_path)
    assert code == 2 and 'its seed, 2' in said


def test_sampling_gpt2_tokens_stops_at_the_end_of_text(small, tiktoken_cache, monkeypatch):
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(tiktoken_cache))
    for split in ('train', 'val'):                                  # 5 = '&', then the end of the text
        np.tile([5, 50256], 300).astype(np.uint16).tofile(small / f'data/abc/{split}.bin')
    (small / 'data/abc/meta.pkl').unlink()
    train(small, '--learning_rate=0.02', '--max_iters=30', '--eval_interval=30', '--decay_lr=False')
    assert log(small)[0]['model_args']['vocab_size'] == 50304
    printed = inside('sample.py', '--device=cpu', '--start=&', '--num_samples=2', '--max_new_tokens=40',
                     '--temperature=0', cwd=small)
    assert printed.splitlines()[-5:-1] == ['&', '---------------'] * 2
    assert '2 tokens in' in printed


@pytest.mark.slow
def test_nanogpts_laptop_command(tmp_path, clone):
    """Needs the text of tiny Shakespeare: TINYSHAKESPEARE=input.txt python -m pytest -m slow"""
    text = os.environ.get('TINYSHAKESPEARE')
    if not text:
        pytest.skip('set TINYSHAKESPEARE to the path of its input.txt')
    shutil.copy(text, clone / 'data/shakespeare_char/input.txt')
    run('data/shakespeare_char/prepare.py', cwd=clone)
    command = next(p for p in (ROOT / 'README.md').read_text().replace('\\\n', ' ').splitlines() if '--n_embd=128' in p)
    printed = run(*command.split()[1:], cwd=clone, timeout=1200, anew=True)
    assert min(float(v) for v in re.findall(r'val loss (\S+)', printed)) <= 1.80


# what changes over a run

def test_the_rate_warms_up_and_decays_as_a_cosine(small):
    """Of each step, in the log and in the optimizer that took it."""
    flags = ['--max_iters=14', '--warmup_iters=3', '--lr_decay_iters=10', '--learning_rate=3e-3', '--min_lr=4e-4']

    def rate(step):
        if step < 3:
            return 3e-3 * (step + 1) / 4
        return 4e-4 + (3e-3 - 4e-4) * (1 + math.cos(math.pi * min(1, (step - 3) / 7))) / 2

    code, _, said = run_inside('train.py', *SMALL, *flags, '--eval_interval=14', cwd=small)
    assert code == 0, said
    logged = [r['lr'] for r in log(small) if 'loss' in r]
    assert logged == pytest.approx([rate(step) for step in range(14)])
    assert logged[2] < logged[3] == 3e-3 and min(logged[3:7]) > 1.5e-3 and logged[10:] == [4e-4] * 4
    for decay, last in ((True, rate(6)), (False, 3e-3)):
        flags += ['--max_iters=6', f'--decay_lr={decay}']
        code, _, said = run_inside('train.py', *SMALL, *flags, cwd=small)
        assert code == 0, said
        optimizer = torch.load(small / 'out/ckpt.pt', weights_only=True)['optimizer']
        assert [group['lr'] for group in optimizer['param_groups']] == pytest.approx([last] * 2)


@pytest.mark.parametrize('early, weights', [(0.3, [0.3] * 5 + [0.1] * 2), (0.05, [0.05] * 7)])
def test_the_mtp_weight_falls_late_in_the_run(small, monkeypatch, early, weights):
    """The weight that the loss shows, in each iteration: 0.1 from 0.67 of 7 iterations on, but never a larger one."""
    forward, seen = model.GPT.forward, []

    def spy(self, *args, **kwargs):
        out = forward(self, *args, **kwargs)
        if self.training:
            losses = self.stats['losses']
            seen.append(((out[1] - losses[0]) / losses[1:].mean()).item())
        return out

    monkeypatch.setattr(model.GPT, 'forward', spy)
    flags = ['--max_iters=7', '--lr_decay_iters=14', f'--mtp_lambda={early}', '--aux_loss_alpha=0.0',
             '--gradient_accumulation_steps=1']
    code, _, said = run_inside('train.py', *SMALL, *flags, cwd=small)
    assert code == 0, said
    assert seen[1:] == pytest.approx(weights, rel=1e-4)              # the first forward is before the loop


def test_each_micro_batch_has_randomness_of_its_own(small, monkeypatch):
    forward, drawn = model.GPT.forward, []

    def spy(self, *args, **kwargs):
        if self.training:
            drawn.append(torch.rand(()).item())
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(model.GPT, 'forward', spy)
    seen = set()
    for seed in (1337, 1338):                                        # two seeds share none of it
        train(small, f'--seed={seed}')
        seen |= set(drawn[1:])                                       # the first forward is before the loop
        assert len(drawn) == 1 + 12
        drawn.clear()
    assert len(seen) == 2 * 12


def test_runs_of_all_seeds_are_evaluated_on_the_same_rows(small):
    train(small, '--max_iters=1')
    seen = []
    for seed in (1337, 1):
        train(small, '--init_from=resume', '--eval_only=True', f'--seed={seed}')
        seen.append([(r['train_loss'], r['val_loss']) for r in log(small) if 'val_loss' in r][-1])
    assert seen[0] == seen[1]


def test_each_split_is_evaluated_on_its_own_data(small):
    """One is all threes and the other all sevens, whatever rows are drawn: exchanged, they exchange their losses."""
    seen = []
    for order, batches in (((3, 7), 4), ((7, 3), 7)):              # nor does a mean depend on their number
        for split, token in zip(('train', 'val'), order):
            np.full(600, token, dtype=np.uint16).tofile(small / f'data/abc/{split}.bin')
        flags = ['--eval_only=True', f'--eval_iters={batches}', f'--out_dir=out{order[0]}']
        code, _, said = run_inside('train.py', *SMALL, *flags, cwd=small)
        assert code == 0, said
        seen.append(next((r['train_loss'], r['val_loss']) for r in log(small, f'out{order[0]}') if 'val_loss' in r))
    assert seen[0] == pytest.approx(seen[1][::-1], rel=1e-6) and abs(seen[0][0] - seen[0][1]) > 0.01


@pytest.mark.parametrize('clip', [0.01, 100.0, 0.0])
def test_the_gradient_is_clipped_as_a_whole(small, clip):
    """With beta1=0 the first moment is the gradient that AdamW was given; the log has its norm before the clip."""
    code, _, said = run_inside('train.py', *SMALL, '--max_iters=1', '--beta1=0.0', f'--grad_clip={clip}', cwd=small)
    assert code == 0, said
    before = next(r['grad_norm'] for r in log(small) if 'loss' in r)
    states = torch.load(small / 'out/ckpt.pt', weights_only=True)['optimizer']['state'].values()
    after = math.sqrt(sum(state['exp_avg'].square().sum().item() for state in states))
    assert 0.1 < before < 100 and after == pytest.approx(0.01 if clip == 0.01 else before, rel=1e-4)


def test_the_logged_balance_is_the_loads(small, monkeypatch):
    """max_vio of a layer: the load of the busiest expert over the mean load, less 1; of all micro-batches together.

    The load itself, and b after the step, are logged ten times between evaluations.
    """
    update_balance, loads, biases = model.GPT.update_balance, [], []

    def spy(self, load):
        loads.append(load)
        update_balance(self, load)
        biases.append([moe.e_score_correction_bias.tolist() for moe in self.moe_layers()])

    monkeypatch.setattr(model.GPT, 'update_balance', spy)
    code, _, said = run_inside('train.py', *SMALL, cwd=small)
    assert code == 0, said
    for load, record in zip(loads, (r for r in log(small) if 'loss' in r), strict=True):
        # micro-batches, sequences, tokens with a label of the layer's head, experts of each
        assert load.sum(dim=1).tolist() == [2 * 4 * T * 2 for T in (16, 16, 15, 14)]
        assert record['max_vio'] == pytest.approx([max(row) / (sum(row) / 4) - 1 for row in load.tolist()])
        assert record['load'] == load.tolist()
        for row, bias in zip(record['bias'], biases[record['step']], strict=True):
            assert row == pytest.approx(bias, abs=1e-6)
    train(small, '--out_dir=rare', '--eval_interval=40', '--log_interval=2', '--max_iters=12')
    assert [r['step'] for r in log(small, 'rare') if 'load' in r] == [0, 4, 8]
    assert [r['step'] for r in log(small, 'rare') if 'loss' in r] == [0, 2, 4, 6, 8, 10]
    train(small, '--out_dir=dense', '--n_routed_experts=0')
    assert not any('load' in r for r in log(small, 'dense'))


def test_a_run_ends_with_an_evaluation_and_a_checkpoint(small):
    """Wherever eval_interval falls."""
    code, _, said = run_inside('train.py', *SMALL, '--max_iters=5', cwd=small)
    assert code == 0, said
    assert [r['step'] for r in log(small) if 'val_loss' in r] == [0, 3, 5]
    assert torch.load(small / 'out/ckpt.pt', weights_only=True)['iter_num'] == 5


def resumed(small, flags):
    """A copy of the run in out/, of two iterations, goes on for a third -> what it printed, exit code, its folder"""
    out = 'with' + re.sub(r'\W', '_', ''.join(flags))
    shutil.copytree(small / 'out', small / out)
    flags = ['--max_iters=3', '--init_from=resume', f'--out_dir={out}', *flags]
    code, printed, said = run_inside('train.py', *SMALL, *flags, cwd=small)
    return printed + said, code, out


def saved(clone, out):
    return torch.load(clone / out / 'ckpt.pt', weights_only=True)


def last_rate(clone, out):
    return [r['lr'] for r in log(clone, out) if 'loss' in r][-1]


def evaluated(clone, out):
    return [r['step'] for r in log(clone, out) if 'val_loss' in r]


RESUMES = [  # flags, and a line that is printed; or how to read what the third iteration leaves, and its value
    ('--always_save_checkpoint=False', lambda *run: (run[0] / run[1] / 'ckpt_last.pt').exists(), True),
    ('--eval_interval=1 --max_iters=5', evaluated, [0, 2, 3, 4, 5]),
    ('--eval_iters=2', lambda *run: saved(*run)['config']['eval_iters'], 2),
    ('--batch_size=2', 'tokens per iteration: 64;', None),
    ('--gradient_accumulation_steps=1', lambda *run: saved(*run)['micro_batches'], 5),
    ('--block_size=8', lambda *run: saved(*run)['model_args']['block_size'], 8),
    ('--block_size=32', 'block_size=32 is longer than the 16 of the checkpoint.* extend it with --rope_factor=2', None),
    ('--max_iters=4', lambda *run: saved(*run)['iter_num'], 4),
    ('--max_iters=1', 'note: .* has all 2 iterations: to train on, raise max_iters=1', None),
    pytest.param('--compile=True', lambda *run: saved(*run)['iter_num'], 3, marks=pytest.mark.slow),
    ('--dtype=bfloat16', lambda *run: saved(*run)['config']['dtype'], 'bfloat16'),
    ('--dtype=float16', "dtype='float16' needs CUDA .*; use bfloat16 or float32", None),
    ('--device=meta', "device='meta' cannot be used here", None),
    ('--dataset=same', lambda *run: saved(*run)['config']['dataset'], 'same'),
    ('--dataset=other', 'dataset=other has another vocabulary than .* was trained on: use the same dataset', None),
    ('--learning_rate=1e-4', last_rate, pytest.approx(1e-4)),
    ('--weight_decay=0.5', lambda *run: saved(*run)['optimizer']['param_groups'][0]['weight_decay'], 0.5),
    ('--dropout=0.1', lambda *run: saved(*run)['model_args']['dropout'], 0.1),
    ('--n_layer=3 --n_head=4 --n_embd=64 --bias=True',
     "since the architecture is the checkpoint's: n_layer=3, n_head=4, n_embd=64, bias=True", None),
    ('--n_layer=12 --vocab_size=77 --bias=False', "is the checkpoint's: .*vocab_size=77, .*n_layer=12", None),
]
REFUSED = {'--block_size=32', '--dtype=float16', '--device=meta', '--dataset=other'}


@pytest.fixture(scope='module')
def interrupted(tmp_path_factory):
    """A clone with three data sets, two of the same characters, and a run of two iterations."""
    clone = add_data(copy_project(tmp_path_factory.mktemp('resumes') / 'clone'))
    for name in ('same', 'other'):
        shutil.copytree(clone / 'data/abc', clone / 'data' / name)
    meta = pickle.loads((clone / 'data/abc/meta.pkl').read_bytes())
    meta['stoi'] = dict(zip(meta['stoi'], range(39, -1, -1)))
    (clone / 'data/other/meta.pkl').write_bytes(pickle.dumps(meta))
    train(clone, '--max_iters=2')
    return clone


@pytest.mark.parametrize('flags, what, value', RESUMES)
def test_what_a_resume_may_change(interrupted, flags, what, value):
    before = (interrupted / 'out/ckpt.pt').read_bytes()
    said, code, out = resumed(interrupted, flags.split())
    assert code == (2 if flags in REFUSED else 0), said
    if isinstance(what, str):
        assert re.search(what, said.splitlines()[-1] if flags in REFUSED else said), said
    else:
        assert what(interrupted, out) == value and 'going on from' in said, said
    assert code == 0 or (interrupted / out / 'ckpt.pt').read_bytes() == before


def test_the_table_of_resumes_has_these_flags():
    table = (ROOT / 'docs/training.md').read_text().split('| changed at a resume |')[1].split('\n\n')[0]
    rows = [row.split('|')[1] for row in table.splitlines() if row.startswith('| `')]
    cases = [case.values[0] if hasattr(case, 'values') else case[0] for case in RESUMES]
    flags = {flag for case in cases for flag in re.findall(r'--(\w+)=', case)}
    assert set(re.findall(r'`--(\w+)', ' '.join(rows))) == flags


@pytest.mark.parametrize('form', ['whole', 'dcp'])
def test_a_new_run_begins_with_another_runs_weights(small, form):
    """At iteration 0, with a new optimizer, in a folder of its own."""
    train(small, f'--checkpoint={form}', '--max_iters=3', '--n_layer=1')
    end = '.pt' if form == 'whole' else '.dcp'
    before = (GPT if form == 'whole' else dcp).from_checkpoint(str(small / f'out/ckpt{end}'))[0].state_dict()
    still = ['--init_from=out', '--out_dir=tuned', '--learning_rate=0', '--min_lr=0', '--bias_update_speed=0.0']
    printed = train(small, *still, '--max_iters=2')
    assert 'going on from' not in printed and f'beginning with the weights of out/ckpt{end}, iteration 3\n' in printed
    after = torch.load(small / 'tuned/ckpt.pt', weights_only=True)
    assert log(small, 'tuned')[1]['step'] == 0 and after['iter_num'] == 2
    assert after['optimizer']['state'][0]['step'] == 2 and after['model_args']['n_layer'] == 1
    for name, tensor in before.items():
        assert torch.equal(after['model'][name], tensor), name

    chars = ''.join(chr(80 + i) for i in range(40))
    meta = {'vocab_size': 40, 'itos': dict(enumerate(chars)), 'stoi': {c: i for i, c in enumerate(chars)}}
    (small / 'data/abc/meta.pkl').write_bytes(pickle.dumps(meta))
    (small / 'data/abc/train.bin').write_bytes(np.full(1000, 77, np.uint16).tobytes())  # beyond the checkpoint's, too
    said = train(small, *still, code=2)
    assert f'another vocabulary than out/ckpt{end} was trained on' in said and not (small / 'tuned.old1').exists()


# another torch, another system

def test_a_new_run_where_no_open_file_may_be_renamed(small, monkeypatch):
    """As on Windows, which has no fcntl either: the earlier run is kept, and the files get their names."""
    def refuse(rename):
        def checked(source, target):
            path = os.path.realpath(source)
            held = [os.path.realpath(f'/proc/self/fd/{fd}') for fd in os.listdir('/proc/self/fd')]
            if any(f'{name}/'.startswith(f'{path}/') for name in held):
                raise PermissionError(13, 'used by another process', source)
            rename(source, target)
        return checked

    monkeypatch.setitem(sys.modules, 'fcntl', None)
    for name in ('rename', 'replace'):
        monkeypatch.setattr(os, name, refuse(getattr(os, name)))
    for _ in range(2):
        train(small, '--max_iters=1')
        gc.collect()                                                # the files of that run, which ran in this process
    train(small, '--max_iters=2', '--init_from=resume')
    assert log(small, 'out.old1')[-1]['step'] == 1 and log(small)[-1]['step'] == 2


def test_a_torch_without_a_private_name_trains_or_says_so_in_one_line(small, monkeypatch):
    reference = losses(small) if train(small, '--dtype=float32') else None
    monkeypatch.delattr(torch.cpu, '_is_amx_tile_supported')
    monkeypatch.delattr(torch.nn.functional, 'grouped_mm')
    train(small, '--dtype=')
    for step, values in losses(small).items():
        assert values == pytest.approx(reference[step], rel=1e-4)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, 'torch._functorch.config', None)
        said = train(small, '--compile=True', '--activation_memory=0.5', code=2)
        assert 'this torch has no activation_memory' in said.splitlines()[-1]
    with monkeypatch.context() as patch:
        patch.delattr(torch.distributed.fsdp._fully_shard._fsdp_init, '_get_mesh_info')
        patch.delitem(sys.modules, 'extras.parallel', raising=False)
        with pytest.raises(model.Mistake, match='do not know torch .*_get_mesh_info'):
            importlib.import_module('extras.parallel')
    for name in ('skip_guard_on_all_nn_modules_unsafe', 'compile'):
        with monkeypatch.context() as patch:
            if name == 'compile':                                   # without isolate_recompiles
                patch.setattr(torch, 'compile', lambda step, fullgraph, dynamic, options, recompile_limit: step)
            else:
                patch.delattr(torch.compiler, name)
            code, printed, said = run_inside('sample.py', '--device=cpu', '--compile=True', '--num_samples=1',
                                             '--max_new_tokens=4', '--start=0', cwd=small)
            assert code == 0 and printed.count('going on without torch.compile') == 1, said
