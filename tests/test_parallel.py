"""train.py in shards (FSDP2, HSDP, expert parallelism) and its sharded checkpoints: on gloo, by torchrun."""

import copy
import dataclasses
import json
import math
import os
import pathlib
import pickle
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
import soak
import torch
from conftest import SMALL, load, log, losses, run, run_inside, tiny_model, torchrun, train
from safetensors.torch import load_file, save_file

from extras import dcp, hf, parallel, scripts
from model import MLA, GPTConfig, Mistake

RESUME = '--init_from=resume'
FLAGS = ['--gradient_accumulation_steps=4', '--eval_iters=3', '--mtp_late_from=1']
LAYOUTS = {  # ranks, and their flags
    'one': (1, []),
    'ddp 2': (2, []),
    'fsdp 2': (2, ['--shard=0']),
    'fsdp 4': (4, ['--shard=0']),
    'hsdp 2x2': (4, ['--shard=2']),
    'ep 2': (2, ['--expert_parallel=2']),
    'ep 4': (4, ['--expert_parallel=4']),
    'ep 2 x fsdp 2': (4, ['--shard=0', '--expert_parallel=2']),
    'ep 2 x hsdp 2x2': (4, ['--shard=2', '--expert_parallel=2']),
}
BIASES = """
import os, runpy, torch, model
update = model.GPT.update_balance
def kept(self, load):
    update(self, load)
    torch.save({k: b for k, b in self.named_buffers() if 'correction_bias' in k}, 'bias' + os.environ['RANK'])
model.GPT.update_balance = kept
runpy.run_path('train.py', run_name='__main__')
"""


def train_in(clone, layout, *flags):
    ranks, more = LAYOUTS[layout]
    if ranks == 1:
        return train(clone, *FLAGS, *more, *flags)
    (clone / 'biases.py').write_text(BIASES)
    code, printed = torchrun(clone, *FLAGS, *more, *flags, n=ranks, script='biases.py')
    assert code == 0 and 'Traceback' not in printed and 'terminate called' not in printed, printed[-4000:]
    assert 'Warning' not in printed
    kept = [torch.load(clone / f'bias{rank}') for rank in range(ranks)]
    assert all(torch.equal(biases[k], kept[0][k]) and biases[k].any() for biases in kept for k in kept[0])
    return printed


def assert_same_run(clone, out, like='one', atol=2e-5, state_rtol=1e-3):
    """Losses and gradient norm of each step, weights and optimizer: as one process's, and so is the file's form."""
    a, b = losses(clone, like), losses(clone, out)
    assert b.keys() == a.keys()
    worst = max(abs(x - y) for step in a for x, y in zip(a[step], b[step]))
    assert worst < 1e-4, worst
    evals = [[r['val_loss'] for r in log(clone, folder) if 'val_loss' in r][-1] for folder in (like, out)]
    assert abs(evals[0] - evals[1]) < max(1e-4, atol)
    a, b = load(clone, f'{like}/ckpt.pt'), load(clone, f'{out}/ckpt.pt')
    assert list(a['model']) == list(b['model']) and a['optimizer']['param_groups'] == b['optimizer']['param_groups']
    torch.testing.assert_close(b['model'], a['model'], atol=atol, rtol=1e-4)
    torch.testing.assert_close(b['optimizer']['state'], a['optimizer']['state'], atol=atol / 20, rtol=state_rtol)
    return worst


def convert(clone, out):
    printed = subprocess.run([sys.executable, '-m', 'extras.dcp', out], cwd=clone, text=True, capture_output=True)
    assert printed.returncode == 0, printed.stderr
    return printed.stdout


# layouts

def test_fsdp_with_expert_parallelism_and_a_sharded_checkpoint(small, monkeypatch):
    """Two ranks, in every way at once, and one process that goes on from what they saved."""
    train_in(small, 'one', '--out_dir=one')
    (ranks, flags), out = (2, ['--shard=0', '--expert_parallel=2', '--checkpoint=dcp']), '--out_dir=two'
    monkeypatch.setitem(LAYOUTS, 'both', (ranks, flags))
    train_in(small, 'both', out, '--max_iters=3')
    assert os.path.islink(small / 'two/ckpt.dcp') and not (small / 'two/ckpt.pt').exists()
    shutil.copytree(small / 'two', small / 'three', symlinks=True)
    assert 'going on from two/ckpt.dcp, iteration 3' in train_in(small, 'one', RESUME, out)
    assert_same_run(small, 'two')
    printed = train_in(small, 'both', RESUME, '--out_dir=three')  # and two ranks again
    assert 'going on from three/ckpt.dcp, iteration 3' in printed
    assert 'wrote three/ckpt.pt\nwrote three/ckpt_best.pt\n' in convert(small, 'three')
    assert_same_run(small, 'three')


def test_copies_of_the_weights_exchange_their_gradients(small):
    """Two copies of all but the experts, as in HSDP, and two micro-batches a rank: the last one exchanges."""
    train(small, *FLAGS, '--max_iters=2', '--out_dir=one')
    code, printed = torchrun(small, *FLAGS, '--max_iters=2', '--expert_parallel=2', '--out_dir=two')
    assert code == 0, printed[-4000:]
    assert_same_run(small, 'two')


def test_fsdp_goes_on_from_one_process_and_back(small):
    """With recomputed activations."""
    train_in(small, 'one', '--out_dir=one')
    train_in(small, 'one', '--out_dir=two', '--max_iters=2')
    train_in(small, 'fsdp 2', RESUME, '--out_dir=two', '--recompute=True', '--max_iters=4')
    train_in(small, 'one', RESUME, '--out_dir=two')
    assert_same_run(small, 'two')


@pytest.mark.parametrize('optimizer', ['muon', pytest.param('muon_split', marks=pytest.mark.slow)])
def test_muon_where_a_weight_has_fewer_rows_than_ranks(small, optimizer):
    """Some ranks hold nothing of it. torch then gave its update to all ranks whole, which no shard can add."""
    flags = [f'--optimizer={optimizer}', '--q_lora_rank=1', '--n_routed_experts=2', '--num_experts_per_tok=1',
             '--gradient_accumulation_steps=3', '--max_iters=3']
    train(small, *flags, '--out_dir=one')
    code, printed = torchrun(small, *flags, '--shard=0', '--out_dir=two', n=3)
    assert code == 0, printed[-4000:]
    assert_same_run(small, 'two')


@pytest.mark.slow
def test_shards_look_at_the_logits_and_clip_them(small):
    flags = ['--qk_clip=1e-3', '--max_iters=3', '--eval_interval=2']
    train(small, *FLAGS, *flags, '--out_dir=one')
    code, printed = torchrun(small, *FLAGS, *flags, '--shard=0', '--out_dir=two')
    assert code == 0, printed[-4000:]
    one, two = ([torch.tensor(line['max_logits']) for line in log(small, out) if 'max_logits' in line]
                for out in ('one', 'two'))
    assert len(one) == len(two) == 2 and one[0].max() > 1e-3 and (two[0] >= one[0] - 1e-6).all()  # of two micro-batches
    weights = load(small, 'two/ckpt.pt')['model']
    assert all(w.isfinite().all() for w in weights.values())


def test_recompute_runs_the_blocks_again(small, monkeypatch):
    calls, forward = [], MLA.forward
    monkeypatch.setattr(MLA, 'forward', lambda *args: calls.append(torch.is_grad_enabled()) or forward(*args))
    train(small, '--max_iters=1', '--dropout=0.2', '--out_dir=kept')
    plain = sum(calls)
    train(small, '--max_iters=1', '--dropout=0.2', '--recompute=True')
    assert sum(calls) == 3 * plain and losses(small) == losses(small, 'kept')


SHARDS = '''
import dataclasses, os, sys, torch
import torch.distributed as dist
from extras import parallel
from extras.optim import AdamW16, muon
from model import GPT, GPTConfig
from torch.distributed.tensor import DTensor

dist.init_process_group('gloo')
config = GPTConfig(**{config})
torch.manual_seed(7)
whole = GPT(config).train()
idx = torch.randint(61, (2, 17))
x, y = idx[:, :-1], idx[:, 1:]
for flags in ((0, 1), (1, 2), (0, 2), (1, 2, 'all tokens on one rank')):
    if len(flags) == 2:
        torch.manual_seed(7)
        drawn = parallel.distribute(config, None, 'cpu', 'float32', *flags)         # draws what GPT(config) drew
    for moe in whole.moe_layers() if len(flags) == 3 else ():
        moe.e_score_correction_bias[:4] = 10.0
    given = parallel.distribute(config, whole.state_dict(), 'cpu', 'float32', *flags[:2])
    for model in (drawn, given) if len(flags) == 2 else (given,):
        state = {k: x.full_tensor() if isinstance(x, DTensor) else x for k, x in model.state_dict().items()}
        assert dist.get_rank() or all(torch.equal(v, state[k]) for k, v in whole.state_dict().items())
        assert model.get_num_params(False) == whole.get_num_params(False)
        assert model.get_num_active_params() == whole.get_num_active_params()
        assert model.transformer.wte.weight is model.lm_head.weight
    assert torch.equal(given.eval().generate(x, 20, top_k=1), whole.eval().generate(x, 20, top_k=1))
    assert all(type(p) is not torch.nn.Parameter for p in given.parameters())
    # each rank holds half, or of experts and nothing else
    mine = sum(p.to_local().numel() for p in given.parameters())
    experts = sum(p.numel() for k, p in whole.named_parameters() if 'experts_' in k and 'shared' not in k)
    rest = whole.get_num_params(False) - experts
    assert mine == experts / 2 + (rest if flags[0] == 1 else rest / 2), (flags, mine, experts, rest)
    # clipping: the norm of the whole gradient, and each part of it
    whole.train()(x, y)[1].backward()
    given.train()(x, y)[1].backward()
    a, b = torch.nn.utils.clip_grad_norm_(whole.parameters(), 0.01), parallel.clip_grad_norm_(given.parameters(), 0.01)
    torch.testing.assert_close(a, b)
    for (name, p), q in zip(whole.named_parameters(), given.parameters()):
        torch.testing.assert_close(q.grad.full_tensor(), p.grad, atol=1e-7, rtol=1e-4, msg=lambda m: name + m)
    whole.zero_grad()
print('done')
dist.destroy_process_group()
'''


def test_weights_gradients_and_generation(small):
    """Each layout of two ranks against the whole model."""
    config = dict(block_size=32, vocab_size=64, n_layer=2, n_head=4, n_embd=32, n_routed_experts=8,
                  num_experts_per_tok=3, initializer_range=0.2)
    (small / 'shards.py').write_text(SHARDS.replace('{config}', repr(config)))
    code, printed = torchrun(small, script='shards.py')
    assert code == 0 and printed.count('done') == 2, printed[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize('optimizer', ['adamw', 'muon_split', 'bf16'])
def test_all_layouts_train_alike(small, optimizer):
    """20 steps with 2 MTP modules and loss-free balancing."""
    flags = {'adamw': [], 'muon_split': ['--optimizer=muon_split', '--n_routed_experts=12'],
             # with the default seed the MTP losses part at step 11, as where last bits choose a token's expert
             'bf16': ['--bf16_moments=True', '--seed=1']}
    flags = [*flags[optimizer], '--gradient_accumulation_steps=8', '--max_iters=20', '--lr_decay_iters=20',
             '--eval_interval=20']
    for layout in LAYOUTS:
        train_in(small, layout, *flags, f'--out_dir={layout.replace(" ", "-")}')
    for layout in LAYOUTS:
        out = layout.replace(' ', '-')
        # a bf16 moment may be one step of bf16 away
        worst = assert_same_run(small, out, **({'atol': 1e-3, 'state_rtol': 2 ** -7} if optimizer == 'bf16' else {}))
        print(f'{optimizer}, {layout}: losses and gradient norms within {worst:.1e}')


@pytest.mark.slow
@pytest.mark.parametrize('form', ['whole', 'dcp'])
def test_each_layout_goes_on_from_each(small, form):
    train_in(small, 'one', '--out_dir=whole')
    layouts = ['one', 'ddp 2', 'fsdp 4', 'hsdp 2x2', 'ep 2', 'ep 2 x fsdp 2']
    for before in layouts:
        train_in(small, before, '--max_iters=3', f'--checkpoint={form}', f'--out_dir={before}')
        for after in layouts:
            out = f'{before}, {after}'
            shutil.copytree(small / before, small / out, symlinks=True)
            other = 'whole' if form == 'dcp' and before == after else form  # and from one form to the other
            train_in(small, after, RESUME, f'--checkpoint={other}', f'--out_dir={out}')
            if other == 'dcp':
                convert(small, out)
            assert_same_run(small, out, like='whole')
            shutil.rmtree(small / out)


def test_an_imported_folder_in_shards(small):
    """Each rank reads its shards; the run is that of one process. Embedding and head are two tensors."""
    train_in(small, 'one', '--max_iters=1', '--tie_word_embeddings=False')
    code, printed, said = run_inside('convert.py', 'export', '--out_dir=out', '--hf_dir=hf', cwd=small)
    assert code == 0, said
    flags = ['--init_from=hf', '--max_iters=2']
    train_in(small, 'one', *flags, '--out_dir=one')
    train_in(small, 'fsdp 2', *flags, '--out_dir=two')
    assert_same_run(small, 'two')


MOONLIGHT = dict(  # with fewer layers, and narrower
    architectures=['DeepseekV3ForCausalLM'], hidden_size=512, num_hidden_layers=6, moe_intermediate_size=192,
    intermediate_size=2816, vocab_size=20480, num_attention_heads=4, n_routed_experts=64, n_shared_experts=2,
    num_experts_per_tok=6, kv_lora_rank=256, q_lora_rank=None, qk_nope_head_dim=128, qk_rope_head_dim=64,
    v_head_dim=128, first_k_dense_replace=1, routed_scaling_factor=2.446, max_position_embeddings=8192,
    rope_theta=50000.0, scoring_func='sigmoid', topk_method='noaux_tc', norm_topk_prob=True)
WATCH = """
import ctypes, gc, sys, threading, time, torch
import torch.distributed as dist
from extras import hf, parallel
from model import GPT, GPTConfig
from torch.distributed.tensor import DTensor

def resident():
    with open('/proc/self/status') as f:
        return int(f.read().split('RssAnon:')[1].split()[0]) * 1024

def watch():
    while True:
        peaks.append(resident())
        time.sleep(0.002)

def begin():
    global before, peaks
    dist.barrier()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what the round before gave back would hide what this one takes
    before, peaks = resident(), []

ctypes.CDLL(None).mallopt(-3, 2 ** 17)  # M_MMAP_THRESHOLD: malloc would raise it, and keep tensors that are freed
dist.init_process_group('gloo')
peaks = []
threading.Thread(target=watch, daemon=True).start()
"""
IMPORT = WATCH + """
for flags in ((0, 1), (0, 4)):
    begin()
    model, tensors = hf.open_model('hf', {'block_size': 128}, 'meta')
    model = parallel.distribute(model.config, tensors, 'cpu', 'float32', *flags)
    peak, whole = max(peaks) - before, 4 * model.get_num_params(False)
    share, block = whole / dist.get_world_size(), 4 * sum(p.numel() for p in model.transformer.h[1].parameters())
    print(f'{flags}: share {share / 1e6:.0f} MB of {whole / 1e6:.0f}, block {block / 1e6:.0f}, peak {peak / 1e6:.0f}')
    assert share < peak < share + block
    state = {k: x.full_tensor() if isinstance(x, DTensor) else x for k, x in model.state_dict().items()}
    if dist.get_rank() == 0:
        given = hf.from_pretrained('hf', {'block_size': 128}).state_dict()
        assert all(torch.equal(state[name], tensor) for name, tensor in given.items())
    del model, state
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_importing_takes_a_share_and_a_block(small):
    """Resident anonymous memory of each of four ranks, which read a random folder of Moonlight's shape: 0.13B."""
    (small / 'hf').mkdir()
    (small / 'hf/config.json').write_text(json.dumps(MOONLIGHT))
    config = GPTConfig(**hf.settings_in(MOONLIGHT))
    save_file({part: torch.randn(view.shape).bfloat16() for name, tensor in hf.skeleton(config).items()
               for part, view in hf.parts(config, name, tensor)}, small / 'hf/model.safetensors')
    (small / 'imports.py').write_text(IMPORT)
    code, printed = torchrun(small, n=4, script='imports.py')
    print(printed)
    assert code == 0, printed[-3000:]


MEMORY = WATCH + """
config = GPTConfig(block_size=64, vocab_size=16000, n_layer=8, n_head=8, n_embd=512, n_routed_experts=8,
                   num_nextn_predict_layers=1)
x = torch.randint(16000, (1, 64))
for name, flags in (('DDP', None), ('shard=0', (0, 1)), ('shard=0 expert_parallel=2', (0, 2)),
                    ('expert_parallel=4', (1, 4))):
    begin()
    model = parallel.distribute(config, None, 'cpu', 'float32', *flags) if flags else GPT(config)
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), 'cpu')
    forward = model.train() if flags else torch.nn.parallel.DistributedDataParallel(model.train())
    for _ in range(2):
        forward(x, x)[1].backward()
        optimizer.step()
    moments = [state[key] for state in optimizer.state.values() for key in ('exp_avg', 'exp_avg_sq')]
    held = [sum(parallel.local(t).nbytes for t in tensors) / 1e6
            for tensors in (model.parameters(), [p.grad for p in model.parameters()], moments)]
    peak = (max(peaks) - before) / 1e6
    if name == 'DDP':
        of = sum(held), peak
    if dist.get_rank() == 0:
        print(f'{name}: {held[0]:.1f} + {held[1]:.1f} + {held[2]:.1f} = {sum(held):.1f} MB, {sum(held) / of[0]:.3f} of '
              f"DDP's; peak {peak:.0f} MB, {peak / of[1]:.2f} of DDP's", flush=True)
    assert not (flags and flags[0] == 0) or sum(held) < 0.26 * of[0] and peak < 0.5 * of[1]
    del model, forward, optimizer, moments
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_four_ranks_hold_a_quarter_each(small):
    """52 million parameters. glibc keeps smaller pieces that were freed, which hides what is in use."""
    (small / 'memory.py').write_text(MEMORY)
    code, printed = torchrun(small, n=4, script='memory.py', MALLOC_MMAP_THRESHOLD_='262144')
    print(printed)
    assert code == 0, printed[-3000:]


# sharded checkpoints

@pytest.mark.parametrize('theirs', [b'PosixPath', b'WindowsPath'])
def test_a_sharded_checkpoint_opens_on_a_system_with_other_paths(small, theirs):
    """torch writes the folder's Path into .metadata, and Python makes only its own system's Paths."""
    train(small, '--checkpoint=dcp', '--max_iters=1')
    path = small / 'out/ckpt.dcp/.metadata'
    written = pickle.dumps(pickle.loads(path.read_bytes()), protocol=2)  # which spells names out
    assert b'PosixPath' in written
    path.write_bytes(written.replace(b'PosixPath', theirs))
    found = dcp.Reader(str(small / 'out/ckpt.dcp')).read_metadata()
    assert 'model.transformer.ln_f.weight' in found.state_dict_metadata
    assert type(found.storage_meta.checkpoint_id) is pathlib.PurePosixPath


@pytest.mark.parametrize('call', ['os.rename', 'os.symlink', 'os.replace', 'os.fsync', 'torch.save'])
def test_a_sharded_checkpoint_that_cannot_be_written(small, monkeypatch, call):
    """Whatever step fails: one line, exit code 2, and the checkpoint of before; and the next save cleans up."""
    flags = ['--checkpoint=dcp']
    train(small, *flags, '--max_iters=3')
    before = os.path.realpath(small / 'out/ckpt.dcp')

    def fail(*_):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(call, fail)
    printed = train(small, *flags, RESUME, code=2)
    assert printed.splitlines()[-1].endswith('what was saved before is whole: [Errno 28] No space left on device')
    monkeypatch.undo()
    assert os.path.realpath(small / 'out/ckpt.dcp') == before
    train(small, *flags, RESUME)
    names = sorted(path.name for path in (small / 'out').iterdir())
    last = os.path.basename(os.path.realpath(small / 'out/ckpt.dcp'))
    assert names == sorted({last, os.path.basename(os.path.realpath(small / 'out/ckpt_best.dcp')), 'ckpt.dcp',
                            'ckpt_best.dcp', 'log.jsonl', '.lock'})
    assert last == 'ckpt-6.dcp'


def saved_as_dcp(model, folder, iteration, best):
    """Begin to write a model, as train.py does."""
    checkpoint = {'model': model.state_dict(), 'model_args': dataclasses.asdict(model.config), 'iter_num': iteration,
                  'optimizer': {'state': {}, 'param_groups': []}}
    dcp.save_checkpoint(checkpoint, f'{folder}/ckpt.dcp', f'{folder}/ckpt_best.dcp' if best else None)


def test_training_goes_on_while_shards_are_written_and_does_not_change_them(tmp_path, monkeypatch):
    """The best one's folder stays, with what is in it, while the last one moves on."""
    write = dcp.dcp.FileSystemWriter.write_data
    monkeypatch.setattr(dcp.dcp.FileSystemWriter, 'write_data', lambda *args: time.sleep(0.3) or write(*args))
    model, kept = tiny_model(), []
    for iteration in (1, 2, 3):
        kept.append(copy.deepcopy(model.state_dict()))
        saved_as_dcp(model, tmp_path, iteration, best=iteration == 1)
        with torch.no_grad():
            for p in model.parameters():
                p += 1
    dcp.finish()
    for name, of in (('ckpt_best.dcp', 1), ('ckpt.dcp', 3)):
        loaded, saved = dcp.from_checkpoint(str(tmp_path / name))
        assert saved['iter_num'] == of
        torch.testing.assert_close(loaded.state_dict(), kept[of - 1], rtol=0, atol=0)


@pytest.mark.skipif(not os.path.exists('/proc/self/fd'), reason='the files of open descriptors are read there')
def test_a_sharded_checkpoint_is_on_the_disk_before_it_gets_its_names(tmp_path, monkeypatch):
    """Its files, its folder, then its name, then the best one's link before the last one's, then the run's folder."""
    events, fsync, rename, replace = [], os.fsync, os.rename, os.replace

    def name_of(path):
        return os.path.basename(os.fspath(path))

    monkeypatch.setattr('os.fsync', lambda file: events.append(name_of(os.readlink(f'/proc/self/fd/{file}')))
                        or fsync(file))
    monkeypatch.setattr('os.rename', lambda a, b: events.append('name ' + name_of(b)) or rename(a, b))
    monkeypatch.setattr('os.replace', lambda a, b: events.append('link ' + name_of(b)) or replace(a, b))
    saved_as_dcp(tiny_model(), tmp_path, 1, best=True)
    dcp.finish()
    tail = ['rest.pt', 'ckpt.dcp.new', 'name ckpt-1.dcp', 'link ckpt_best.dcp', 'link ckpt.dcp', tmp_path.name]
    assert events[-6:] == tail and '__0_0.distcp' in events[:-6]


def test_a_new_run_keeps_the_sharded_checkpoints_of_earlier_ones(small):
    train(small, '--checkpoint=dcp', '--max_iters=1')
    train(small, '--checkpoint=dcp', '--max_iters=2')
    assert os.path.realpath(small / 'out.old1/ckpt.dcp') == str(small / 'out.old1/ckpt-1.dcp')
    assert dcp.from_checkpoint(str(small / 'out.old1/ckpt.dcp'))[1]['iter_num'] == 1
    train(small, '--max_iters=1')
    assert dcp.from_checkpoint(str(small / 'out.old2/ckpt.dcp'))[1]['iter_num'] == 2
    assert load(small)['iter_num'] == 1 and not (small / 'out/ckpt.dcp').exists()


def test_the_first_is_the_best_until_a_better_one_comes(small, monkeypatch):
    """Though it is still being written when the second is saved."""
    rename = os.rename
    monkeypatch.setattr(os, 'rename', lambda *names: time.sleep(0.5) or rename(*names))
    train(small, '--checkpoint=dcp', '--max_iters=2', '--eval_interval=1', '--learning_rate=0', '--min_lr=0')
    assert os.path.realpath(small / 'out/ckpt_best.dcp').startswith(str(small / 'out/ckpt-1.'))
    assert os.path.realpath(small / 'out/ckpt.dcp').startswith(str(small / 'out/ckpt-2.'))


def test_what_is_not_a_checkpoint_of_ours_stays(small):
    """Folders of the user's, and what a copy without links has in the place of one."""
    train(small, '--checkpoint=dcp', '--max_iters=1')
    shutil.copytree(small / 'out', small / 'copied')  # follows links
    shutil.copytree(small / 'out/ckpt.dcp', small / 'copied/ckpt-good.dcp')
    assert not (small / 'copied/ckpt.dcp').is_symlink()
    train(small, '--checkpoint=dcp', RESUME, '--out_dir=copied', '--max_iters=2')
    kept = [dcp.from_checkpoint(str(small / 'copied' / name))[1]['iter_num']
            for name in ('ckpt.dcp', 'ckpt.dcp.old', 'ckpt-good.dcp')]
    assert kept == [2, 1, 1]
    assert len(list((small / 'copied').glob('ckpt-[0-9]*.dcp'))) == 1


def test_a_malicious_sharded_checkpoint_runs_nothing(small):
    class Evil:
        def __reduce__(self):
            return os.system, (f'touch {small}/ran',)

    train(small, '--checkpoint=dcp', '--max_iters=1')
    folder = small / 'out/ckpt.dcp'
    plain = (folder / '.metadata').read_bytes()
    pickled = pickle.loads(plain)  # where a tensor should be, torch would unpickle bytes
    name = 'model.lm_head.weight' if 'model.lm_head.weight' in pickled.state_dict_metadata else \
        'model.transformer.wte.weight'
    (folder / 'evil').write_bytes(pickle.dumps(Evil()))
    pickled.state_dict_metadata[name] = torch.distributed.checkpoint.metadata.BytesStorageMetadata()
    pickled.storage_data[torch.distributed.checkpoint.metadata.MetadataIndex(name)] = \
        torch.distributed.checkpoint.filesystem._StorageInfo('evil', 0, (folder / 'evil').stat().st_size)
    for name, evil in (('.metadata', pickle.dumps(Evil())), ('rest.pt', pickle.dumps(Evil())),
                       ('.metadata', pickle.dumps(pickled))):
        kept = (folder / name).read_bytes()
        (folder / name).write_bytes(evil)
        printed = train(small, RESUME, code=2)
        assert 'ckpt.dcp is no checkpoint of this model' in printed.splitlines()[-1]
        (folder / name).write_bytes(kept)
    assert not (small / 'ran').exists()
    assert 'going on from out/ckpt.dcp' in train(small, RESUME, '--max_iters=2')


def test_a_sharded_checkpoint_that_asks_for_more_than_it_holds(small):
    """Layers in rest.pt, bytes in .metadata, files elsewhere."""
    train(small, '--checkpoint=dcp', '--max_iters=1')
    folder = small / 'out/ckpt.dcp'
    rest, metadata = torch.load(folder / 'rest.pt'), (folder / '.metadata').read_bytes()
    torch.save({**rest, 'model_args': {**rest['model_args'], 'n_layer': 10**7}}, folder / 'rest.pt')
    assert 'n_layer=10000000, and there are weights for 2' in train(small, RESUME, code=2)
    torch.save(rest, folder / 'rest.pt')

    def change(pickled):
        (folder / '.metadata').write_bytes(pickle.dumps(pickled))
        return train(small, RESUME, code=2)

    pickled = pickle.loads(metadata)
    pickled.state_dict_metadata['optimizer.0.exp_avg'].size = torch.Size((10**9, 32))
    assert 'its tensors are' in change(pickled)
    pickled = pickle.loads(metadata)
    next(iter(pickled.storage_data.values())).relative_path = '../../../private'
    assert '.metadata names something else' in change(pickled)
    (folder / '.metadata').unlink()
    os.mkfifo(folder / '.metadata')                                  # to open it would wait for its other end
    assert '.metadata is no regular file' in train(small, RESUME, code=2)


def test_of_both_forms_the_newer_one_goes_on(small):
    train(small, '--checkpoint=dcp', '--max_iters=1')
    assert 'going on from out/ckpt.dcp, iteration 1' in train(small, RESUME, '--max_iters=2')
    assert 'going on from out/ckpt.pt, iteration 2' in train(small, RESUME, '--max_iters=3', '--checkpoint=dcp')
    assert 'going on from out/ckpt.dcp, iteration 3' in train(small, RESUME, '--max_iters=4')


@pytest.mark.parametrize('forms', [('whole', 'dcp'), ('dcp', 'whole')])
def test_every_script_reads_the_newer_one_of_both_forms(small, forms):
    """Once, all but train.py read ckpt.pt, even if it was older; the weights are those that were trained last."""
    (small / 'text.txt').write_text('0123456789' * 3)
    for n, form in enumerate(forms, start=1):
        train(small, RESUME if n > 1 else '--init_from=scratch', f'--checkpoint={form}', f'--max_iters={n}')
    end = {'whole': 'ckpt.pt', 'dcp': 'ckpt-2.dcp'}[forms[1]]
    path, model, saved = scripts.open_checkpoint(small / 'out')
    assert os.path.basename(path) == end and saved['iter_num'] == 2
    code, _, said = run_inside('sample.py', '--device=cpu', '--start=0', '--max_new_tokens=2', cwd=small)
    assert code == 0, said
    code, _, said = run_inside('inside.py', '--out_dir=out', '--text=text.txt', '--device=cpu', cwd=small)
    assert code == 0 and '"iteration":2,' in (small / 'out/inside.html').read_text(), said
    code, _, said = run_inside('convert.py', 'export', '--out_dir=out', '--hf_dir=hf', cwd=small)
    assert code == 0 and '| iterations | 2' in (small / 'hf/README.md').read_text(), said
    exported = load_file(small / 'hf/model.safetensors')
    assert torch.equal(exported['model.norm.weight'], model.state_dict()['transformer.ln_f.weight'])


@pytest.mark.parametrize('name', ['rest.pt', '.metadata', '__0_0.distcp'])
def test_a_damaged_sharded_checkpoint(small, name, caplog):
    """In one line: torch once added two tracebacks about .metadata."""
    train(small, '--checkpoint=dcp', '--max_iters=1')
    path = small / 'out/ckpt.dcp' / name
    path.write_bytes(path.read_bytes()[:-100])
    said = train(small, RESUME, code=2).splitlines()[-1]
    assert 'out/ckpt.dcp is no checkpoint of this model: ' in said and said.count('ckpt.dcp') == 1, said
    os.remove(path)
    assert 'out/ckpt.dcp is no checkpoint of this model' in train(small, RESUME, code=2).splitlines()[-1]
    assert 'metadata is not found' not in caplog.text


def test_the_metadata_of_a_sharded_checkpoint_is_read_once(small, monkeypatch):
    """Once, four times: by us and by torch, for the weights and for the optimizer."""
    train(small, '--checkpoint=dcp', '--max_iters=1')
    load, read = dcp.Reader.Unpickler.load, []
    monkeypatch.setattr(dcp.Reader.Unpickler, 'load', lambda self: read.append(self) or load(self))
    assert 'going on from out/ckpt.dcp' in train(small, RESUME, '--max_iters=2') and len(read) == 1


SPY = """
import os, runpy
from extras import dcp, integrity
def spied(path):
    print(f'rank {os.environ["RANK"]} reads {os.path.basename(path)}\\n', end='', flush=True)
    return crc32_of(path)
crc32_of, dcp.crc32_of, integrity.crc32_of = integrity.crc32_of, spied, spied
runpy.run_path('train.py', run_name='__main__')
"""


def test_the_ranks_share_the_checksums_of_a_sharded_checkpoint(small):
    """Each rank those of the files that it wrote; when they are read, half of them. Rank 0 alone read every byte. A
    changed file that the other rank finds ends both.
    """
    (small / 'spy.py').write_text(SPY)
    flags = ['--shard=0', '--checkpoint=dcp', '--eval_interval=9']
    code, printed = torchrun(small, *flags, '--max_iters=1', script='spy.py')
    files = {'.metadata', '__0_0.distcp', '__1_0.distcp'}
    own = [('0', '.metadata'), ('0', '__0_0.distcp'), ('1', '__1_0.distcp')]
    assert code == 0 and sorted(re.findall(r'^rank (\d) reads (\S+)$', printed, re.M)) == own, printed
    assert torch.load(small / 'out/ckpt.dcp/rest.pt')['crc32'].keys() == files
    flip = small / 'out/ckpt.dcp/__0_0.distcp'
    data = bytearray(flip.read_bytes())
    data[len(data) // 2] ^= 1
    flip.write_bytes(data)
    code, printed = torchrun(small, *flags, RESUME, script='spy.py')
    assert code == 1 and 'out/ckpt.dcp is damaged: a part has another checksum than was written' in printed
    assert sorted(re.findall(r'^rank (\d) reads (\S+)$', printed, re.M)) == \
        [('0', '.metadata'), ('0', '__1_0.distcp'), ('1', '__0_0.distcp')]


def test_a_flipped_bit_in_a_sharded_checkpoint(small):
    """Its files of tensors have no checksums of their own."""
    train(small, '--checkpoint=dcp', '--max_iters=1')
    path = small / 'out/ckpt.dcp/__0_0.distcp'
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert '__0_0.distcp has another checksum than was written' in train(small, RESUME, code=2).splitlines()[-1]


def test_a_sharded_checkpoint_that_outgrows_its_room(small):
    """The kernel's limit on a file's size, as a full disk would."""
    train(small, '--checkpoint=dcp', '--max_iters=3')
    before = os.path.realpath(small / 'out/ckpt.dcp')
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    try:
        printed = train(small, '--checkpoint=dcp', RESUME, code=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert 'what was saved before is whole: ' in printed.splitlines()[-1], printed
    assert os.path.realpath(small / 'out/ckpt.dcp') == before and not unpublished(small)
    assert 'iteration 3' in train(small, '--checkpoint=dcp', RESUME)


def unpublished(clone):
    """What is in the folder that a save had not finished, or to which no link points."""
    names = {path.name for path in (clone / 'out').glob('ckpt*')}
    linked = {os.path.basename(os.path.realpath(clone / 'out' / name)) for name in ('ckpt.dcp', 'ckpt_best.dcp')}
    return names - linked - {'ckpt.dcp', 'ckpt_best.dcp'}


KILLED = """
import os, runpy, signal
os.symlink = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
runpy.run_path('train.py', run_name='__main__')
"""


def test_a_kill_between_a_folder_and_its_links(small, monkeypatch):
    """Nothing points to the folder, and a save takes a name that is free: such folders would fill the disk."""
    train(small, '--checkpoint=dcp', '--max_iters=3')
    os.symlink('ckpt-3.dcp', small / 'out/mine')
    (small / 'killed.py').write_text(KILLED)
    flags = ['--checkpoint=dcp', RESUME, '--max_iters=5', '--eval_interval=5']
    killed = subprocess.run([sys.executable, 'killed.py', *SMALL, *flags], cwd=small)
    assert killed.returncode == -signal.SIGKILL and unpublished(small) == {'ckpt-5.dcp'}
    (small / 'out/ckpt.dcp.new').mkdir()  # and of a kill while it is written
    (small / 'out/ckpt.dcp.new/__0_0.distcp').write_bytes(b'half')
    seen, save = [], dcp.dcp.async_save
    monkeypatch.setattr(dcp.dcp, 'async_save', lambda *args, **kw: seen.append(unpublished(small)) or save(*args, **kw))
    assert 'iteration 3 of 5' in train(small, *flags)
    assert seen == [set()] and unpublished(small) == {'ckpt-3.dcp'}  # which a link of the user's names
    assert os.path.realpath(small / 'out/ckpt.dcp') == str(small / 'out/ckpt-5.dcp')


def test_an_optimizer_that_does_not_fit_the_shards(small):
    """The sizes are compared before anything is read: a fused step reads past the end of a smaller state."""
    train(small, '--checkpoint=dcp', '--max_iters=1')
    state = torch.load(small / 'out/ckpt.dcp/rest.pt', weights_only=True)['optimizer']
    state['folder'] = str(small / 'out/ckpt.dcp')
    whole = dcp.load_optimizer(state)['state']
    params = [whole[i]['exp_avg'] for i in sorted(whole)]
    torch.testing.assert_close(dcp.load_optimizer(state, params)['state'], whole)
    for wrong in (params[:-1], [params[0][1:], *params[1:]]):
        with pytest.raises(Mistake, match='out/ckpt.dcp is damaged, or does not fit: resume with the --optimizer'):
            dcp.load_optimizer(state, wrong)


def test_a_number_that_is_not_finite_in_the_shard_of_one_rank(small):
    """All ranks end, in one line."""
    train(small, '--checkpoint=dcp', '--max_iters=1')
    path = str(small / 'out/ckpt.dcp')
    model, saved = dcp.from_checkpoint(path)
    saved['optimizer']['state'][0]['exp_avg'][-1, -1] = math.nan
    dcp.save_checkpoint(saved | {'model': model.state_dict(), 'iter_num': 2}, path)
    dcp.finish()
    message = 'the optimizer in out/ckpt.dcp is damaged, or does not fit: resume with the --optimizer of its run\n'
    assert train(small, RESUME, code=2).endswith(message)
    code, printed = torchrun(small, RESUME, '--shard=0')
    ours = printed.partition('torch/distributed/elastic')[0]  # torchrun adds a traceback of its own
    assert code == 1 and printed.count(message) == 1 and 'Traceback' not in ours, printed


def begin(clone, *flags, restarts=0, **kwargs):
    python = ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', f'--max-restarts={restarts}']
    return soak.start(clone, '--checkpoint=dcp', '--shard=0', '--expert_parallel=2', '--out_dir=out', *flags,
                      python=python, **kwargs)


def has_steps(clone, n):
    return (soak.steps_of_this_start(clone / 'out') or 0) >= n


@pytest.mark.slow
def test_kills_while_sharded_checkpoints_are_written(small):
    """kill -9 of either rank at random instants of a run that saves each iteration; torchrun starts both again."""
    flags = ['--max_iters=40', '--eval_interval=1', '--eval_iters=2']
    soak.prepare(small)
    assert begin(small, *flags).wait(300) == 0
    (small / 'out').rename(small / 'whole')
    process, writing = begin(small, *flags, restarts=100), 0
    for _ in range(12):
        soak.wait_for(lambda: has_steps(small, 1), process)
        time.sleep(random.uniform(0, 0.6))
        ranks = soak.children(process.pid)
        if process.poll() is not None or not ranks:
            break
        os.kill(random.choice(ranks), signal.SIGKILL)
        writing += (small / 'out/ckpt.dcp.new').exists()
        if (small / 'out/ckpt.dcp').exists():
            dcp.from_checkpoint(str(small / 'out/ckpt.dcp'))
        time.sleep(1)
    assert process.wait(600) == 0, (small / 'printed').read_text()[-3000:]
    print(f'{writing} of 12 kills while a checkpoint was written')
    for out in ('whole', 'out'):
        convert(small, out)
    assert soak.same_weights(small / 'out/ckpt.pt', small / 'whole/ckpt.pt')
    assert unpublished(small) == {'ckpt.pt', 'ckpt_best.pt'}  # convert()'s


@pytest.mark.slow
def test_a_signal_to_one_rank_saves_the_shards_of_both(small):
    soak.prepare(small)
    process = begin(small, '--max_iters=100000', '--eval_interval=100000')
    soak.wait_for(lambda: has_steps(small, 2), process)
    os.kill(max(soak.children(process.pid)), signal.SIGTERM)
    assert process.wait(60) == 0
    done = soak.steps_of_this_start(small / 'out') + 1
    assert dcp.from_checkpoint(str(small / 'out/ckpt.dcp'))[1]['iter_num'] == done


@pytest.mark.slow
@pytest.mark.parametrize('flags, times', [([], 50), (['--shard=0', '--expert_parallel=2'], 20)], ids=['ddp', 'shards'])
def test_ranks_end_without_an_abort(small, flags, times):
    """gloo's threads that outlive Python abort it now and then (pytorch#190489), more often on a machine with other
    work.
    """
    work = [subprocess.Popen([sys.executable, '-c', 'while True: pass']) for _ in range(os.cpu_count())]
    try:
        for i in range(times):
            code, printed = torchrun(small, *flags, '--max_iters=1', '--eval_iters=1', f'--out_dir=out{i}',
                                     '--checkpoint=' + ('dcp', 'whole')[i % 2])
            assert code == 0 and 'terminate called' not in printed and 'Traceback' not in printed, printed[-3000:]
            shutil.rmtree(small / f'out{i}')
    finally:
        for process in work:
            process.kill()
            process.wait()


# two hosts

@pytest.fixture
def hosts():
    """Two network namespaces with an interface each, and nothing between them but a cable."""
    names = [f'host{i}-{os.getpid()}' for i in range(2)]
    try:
        for name in names:
            subprocess.run(['ip', 'netns', 'add', name], check=True, capture_output=True)
        ends = [word for i, name in enumerate(names) for word in ([] if i == 0 else ['type', 'veth', 'peer']) +
                ['name', f'eth{i}', 'netns', name]]
        subprocess.run(['ip', 'link', 'add', *ends], check=True, capture_output=True)
        for i, name in enumerate(names):
            for words in (['addr', 'add', f'10.99.0.{i + 1}/24', 'dev', f'eth{i}'], ['link', 'set', f'eth{i}', 'up'],
                          ['link', 'set', 'lo', 'up']):
                subprocess.run(['ip', '-n', name, *words], check=True, capture_output=True)
        yield names
    except (OSError, subprocess.CalledProcessError) as e:
        pytest.skip(f'network namespaces are not to be had here: {e}')
    finally:
        for name in names:
            subprocess.run(['ip', 'netns', 'del', name], capture_output=True)


def start_hosts(clone, hosts, *flags):
    agents = []
    for node, name in enumerate(hosts):
        command = ['ip', 'netns', 'exec', name, sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node=2',
                   '--nnodes=2', f'--node_rank={node}', '--master_addr=10.99.0.1', '--master_port=29500', 'train.py']
        agents.append(subprocess.Popen([*command, *SMALL, *FLAGS, *flags], cwd=clone, start_new_session=True,
                                       env={**os.environ, 'OMP_NUM_THREADS': '1', 'GLOO_SOCKET_IFNAME': f'eth{node}'},
                                       stdout=open(clone / f'printed{node}', 'a'), stderr=subprocess.STDOUT))
    return agents


@pytest.mark.slow
@pytest.mark.parametrize('flags', [['--shard=0', '--checkpoint=dcp'], ['--shard=2', '--expert_parallel=2']])
def test_two_hosts_of_which_one_is_killed(small, hosts, flags):
    flags = [*flags, '--max_iters=20', '--lr_decay_iters=20', '--eval_interval=1', '--out_dir=out']
    train_in(small, 'one', *flags[2:-1], '--out_dir=one')
    agents = start_hosts(small, hosts, *flags)
    soak.wait_for(lambda: has_steps(small, 4), agents[0])
    for pid in (*soak.children(agents[1].pid), agents[1].pid):  # the second host is gone
        os.kill(pid, signal.SIGKILL)
    assert agents[0].wait(120) != 0
    stopped = soak.steps_of_this_start(small / 'out')
    assert stopped < 19
    agents = start_hosts(small, hosts, *flags, RESUME)
    assert [agent.wait(300) for agent in agents] == [0, 0], (small / 'printed0').read_text()[-3000:]
    assert 'going on from out/ckpt.' in (small / 'printed0').read_text()
    if '--checkpoint=dcp' in flags:
        convert(small, 'out')
    assert_same_run(small, 'out')


# mistakes

@pytest.mark.parametrize('flags, ranks, message', [
    (['--shard=3'], 4, 'shard=3: 3 must divide the number of ranks, 4'),
    (['--expert_parallel=3'], 4, 'expert_parallel=3: 3 must divide'),
    (['--shard=4', '--expert_parallel=8'], 8, None),
    (['--shard=6', '--expert_parallel=4'], 12, 'does not divide the 6'),
    (['--shard=0', '--fp8=True'], 2, 'fp8=True goes with neither'),
    (['--shard=0', '--dtype=float16'], 2, 'dtype=float16 goes with neither'), (['--shard=0'], 0, 'torchrun'),
])
def test_settings_that_do_not_go_together(flags, ranks, message):
    settings = dict(shard=1, expert_parallel=1, fp8=False, dtype='float32')
    for flag in flags:
        key, value = flag[2:].split('=')
        settings[key] = {'fp8': bool, 'dtype': str}.get(key, int)(value)
    if message is None:
        parallel.check(settings, ranks)
        return
    with pytest.raises(ValueError, match=message):
        parallel.check(settings, ranks)


@pytest.mark.parametrize('flags, message', [
    (['--shard=0'], 'start them with torchrun'), (['--expert_parallel=2'], 'start them with torchrun'),
    (['--shard=yes'], 'shard must be int'), (['--shard=-1'], 'must be 1 (off), 0 (all ranks) or a number of ranks'),
    (['--expert_parallel=0'], 'must be positive'), (['--checkpoint=zip'], "must be 'whole' or 'dcp'"),
])
def test_one_process_says_what_is_wrong(small, flags, message):
    printed = train(small, *flags, code=2)
    assert message in printed.splitlines()[-1] and not (small / 'out').exists()


MIXED = """
import os, runpy, sys, torch
if os.environ['RANK'] == '1':  # as on a machine with GPUs
    zeros = torch.zeros
    torch.zeros = lambda *size, device=None: zeros(*size)
    torch.cuda.device_count = lambda: 2
    torch.cuda.set_device = lambda device: None
    sys.argv.append('--device=cuda')
    os.environ['LOCAL_RANK'] = '0'
runpy.run_path('train.py', run_name='__main__')
"""


@pytest.mark.parametrize('flags, script, message, times', [
    (['--expert_parallel=2', '--n_routed_experts=5'], None, 'does not divide the 5 routed experts', 1),
    ([], MIXED, 'some ranks have a GPU and others have none', 2),  # a line on each machine
])
def test_ranks_say_what_is_wrong_in_one_line(small, flags, script, message, times):
    if script:
        (small / 'script.py').write_text(script)
    code, printed = torchrun(small, *flags, script='script.py' if script else 'train.py')
    assert code != 0 and printed.count(message) == times, printed[-3000:]
    assert 'train.py", line' not in printed and not (small / 'out').exists(), printed


RANK_1 = """
import os, runpy, model
def wrong(*args):
    raise ERROR
if os.environ['RANK'] == '1':
    model.GPT.PLACE = wrong
runpy.run_path('train.py', run_name='__main__')
"""


MISTAKE, BUG = ("model.Mistake('rank 1 alone; do this')", 2), ("KeyError('a bug')", 1)


@pytest.mark.parametrize('place, error, code', [  # before the loop, and in it
    ('configure_optimizers', *MISTAKE), ('update_balance', *BUG),
    pytest.param('configure_optimizers', *BUG, marks=pytest.mark.slow),
    pytest.param('update_balance', *MISTAKE, marks=pytest.mark.slow)])
def test_what_one_rank_alone_meets(small, place, error, code):
    """It is said once: in a line, or with its traceback. The other rank says no more than that it is alone."""
    (small / 'script.py').write_text(RANK_1.replace('ERROR', error).replace('PLACE', place))
    ended, printed = torchrun(small, script='script.py')
    assert ended == 1 and re.search(r'rank +: 1 \(local_rank: 1\)\s+exitcode +: (\d+)', printed)[1] == str(code)
    assert printed.count('rank 1 alone; do this' if code == 2 else "KeyError: 'a bug'") == 1
    assert printed.count('in wrong') == printed.count('train.py", line') == 2 - code
    assert 'RuntimeError' not in printed and printed.count('another rank is gone, or cannot be reached: ') <= 1
    assert 'terminate called' not in printed


@pytest.mark.parametrize('script, flag', [('train.py', '--bach_size=2'), ('train.py', '--batch_size=0'),
                                          ('scale/pipeline.py', '--schedule=gpipe')])
def test_silent_ranks_wait_for_the_one_that_speaks(small, script, flag):
    """torchrun ends all ranks when one has ended: of rank 0, if it came later, nothing was heard. A rank that
    is still there after that met the mistake alone, and says it.
    """
    (small / 'wait.py').write_text('import runpy, sys, time\n'
                                   'time.sleep = lambda seconds: print("slept", seconds, flush=True)\n'
                                   'sys.argv = sys.argv[1:]\n'
                                   'runpy.run_path(sys.argv[0], run_name="__main__")\n')
    said = run('wait.py', script, flag, '--device=cpu', cwd=small, ok=False, RANK=1, LOCAL_RANK=1, WORLD_SIZE=2,
               LOCAL_WORLD_SIZE=2).splitlines()
    assert said[0] == 'slept 10' and len(said) == 2, said


def test_without_the_file_one_line_says_so(small):
    os.remove(small / 'extras/dcp.py')
    assert 'checkpoint=dcp needs extras/dcp.py: copy the folder extras/' in train(small, '--checkpoint=dcp', code=2)
    shutil.rmtree(small / 'extras')
    train(small, '--max_iters=1')
    assert 'shard or expert_parallel needs extras/parallel.py' in train(small, '--shard=0', code=2)
