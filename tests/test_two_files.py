"""The drop-in: model.py and train.py in an empty folder, as in a nanoGPT clone, without and with extras/."""

import json
import pickle
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT, run_inside, run_outside

# nanoGPT's contract: sets globals by --key=literal, insists on the default's very type, exec()s the other arguments
CONFIGURATOR = '''
import sys
from ast import literal_eval
for a in sys.argv[1:]:
    if '=' not in a:
        exec(open(a).read())
    else:
        k, v = a[2:].split('=')
        try:
            v = literal_eval(v)
        except (SyntaxError, ValueError):
            pass
        assert k in globals() and type(v) == type(globals()[k]), k
        globals()[k] = v
'''
# nanoGPT's sample.py, as far as it touches the model: the prefix is that of a compiled model
SAMPLE = '''
import pickle, sys
import torch
from model import GPTConfig, GPT
checkpoint = torch.load(sys.argv[1], map_location='cpu')
model = GPT(GPTConfig(**checkpoint['model_args']))
state = {k.removeprefix('_orig_mod.'): v for k, v in checkpoint['model'].items()}
model.load_state_dict(state)
model.eval()
meta = pickle.load(open('data/abc/meta.pkl', 'rb'))
x = torch.tensor([[meta['stoi'][c] for c in '024']])
with torch.no_grad():
    y = model.generate(x, 40, temperature=0.8, top_k=200)
print(''.join(meta['itos'][i] for i in y[0].tolist()))
'''
CONFIG = '''
out_dir = 'out'
dataset = 'abc'
device = 'cpu'
dtype = 'float32'
compile = False
n_layer = n_head = 2
n_embd = 32
block_size = 16
batch_size = 4
gradient_accumulation_steps = 2
max_iters = lr_decay_iters = 6
eval_interval = 3
eval_iters = 4
warmup_iters = 2
learning_rate = 3e-3
min_lr = 3e-4
'''


@pytest.fixture
def nanogpt(tmp_path):
    folder = tmp_path / 'nanoGPT'
    (folder / 'data/abc').mkdir(parents=True)
    (folder / 'config').mkdir()
    for name in ('model.py', 'train.py'):
        shutil.copy(ROOT / name, folder)
    for name, text in (('configurator.py', CONFIGURATOR), ('sample.py', SAMPLE), ('config/abc.py', CONFIG)):
        (folder / name).write_text(text)
    rng = np.random.default_rng(0)
    for split, n in (('train', 4000), ('val', 500)):
        (rng.integers(40, size=n) // 2 * 2).astype(np.uint16).tofile(folder / f'data/abc/{split}.bin')
    itos = {i: chr(48 + i) for i in range(40)}
    meta = {'vocab_size': 40, 'itos': itos, 'stoi': {c: i for i, c in itos.items()}}
    (folder / 'data/abc/meta.pkl').write_bytes(pickle.dumps(meta))
    return folder


def python(folder, *args, code=0):
    """What a command prints, standard error after standard output."""
    got, printed, said = run_outside(*args, cwd=folder, PYTHONPATH='')
    assert got == code, printed + said
    return printed + said


def train(folder, *flags, code=0):
    """The same in this process: the text of model.py is ROOT's."""
    got, printed, said = run_inside('train.py', 'config/abc.py', *flags, cwd=folder)
    assert got == code, said
    return printed + said


def records(folder, out='out'):
    lines = [json.loads(line) for line in (folder / out / 'log.jsonl').read_text().splitlines() if line]
    return {r['step']: (r['loss'], r['grad_norm']) for r in lines if 'loss' in r}


def test_train_sample_and_resume(nanogpt):
    """On resume every setting but the architecture may change, and a smaller block_size crops the context."""
    printed = python(nanogpt, 'train.py', 'config/abc.py', '--always_save_checkpoint=False', '--max_iters=3')
    assert re.findall(r'^iter (\d+): loss \d+\.\d{4}, time \d+\.\d\dms', printed, re.M) == ['0', '1', '2']
    assert re.findall(r'^step (\d+): train loss \d+\.\d{4}, val loss \d+\.\d{4}$', printed, re.M) == ['0', '3']
    checkpoint = torch.load(nanogpt / 'out/ckpt.pt', weights_only=True)
    assert {'model', 'optimizer', 'model_args', 'iter_num', 'best_val_loss', 'config'} <= set(checkpoint)
    assert checkpoint['iter_num'] == 3 and checkpoint['model_args']['vocab_size'] == 40
    text = python(nanogpt, 'sample.py', 'out/ckpt.pt').rstrip('\n')
    assert len(text) == 43 and text.startswith('024')

    changed = ['--init_from=resume', '--always_save_checkpoint=True', '--eval_interval=2', '--batch_size=6',
               '--gradient_accumulation_steps=1', '--dropout=0.1', '--learning_rate=0.001', '--decay_lr=False',
               '--weight_decay=0.2', '--grad_clip=0.5', '--block_size=8', '--n_embd=64']
    printed = python(nanogpt, 'train.py', 'config/abc.py', *changed)
    assert 'going on from' in printed and 'iteration 3 of 6' in printed and 'tokens per iteration: 48' in printed
    assert re.findall(r'^step (\d+)', printed, re.M) == ['4', '6']
    checkpoint = torch.load(nanogpt / 'out/ckpt.pt', weights_only=True)
    assert checkpoint['iter_num'] == 6 and checkpoint['optimizer']['param_groups'][0]['lr'] == 0.001
    args = checkpoint['model_args']
    assert (args['block_size'], args['dropout'], args['n_embd']) == (8, 0.1, 32)


def test_an_optimizer_that_does_not_fit_is_refused(nanogpt):
    """A fused step reads past the end of a state that is too small. The flags decide the settings, not the file."""
    train(nanogpt, '--max_iters=1')
    saved = torch.load(nanogpt / 'out/ckpt.pt')
    saved['optimizer']['param_groups'] = []
    torch.save(saved, nanogpt / 'out/ckpt.pt')
    train(nanogpt, '--max_iters=2', '--init_from=resume')
    for size in ((3,), ()):
        for state in saved['optimizer']['state'].values():
            state.update(exp_avg=torch.ones(size), exp_avg_sq=torch.ones(size))
        torch.save(saved, nanogpt / 'out/ckpt.pt')
        said = train(nanogpt, '--max_iters=3', '--init_from=resume', code=1).splitlines()[-1]
        assert said == 'model.Mistake: the optimizer in out/ckpt.pt does not fit'


def test_the_scale_of_fp16_gradients_goes_on(nanogpt):
    flags = ['--dtype=float16', '--n_routed_experts=0', '--num_nextn_predict_layers=0']
    train(nanogpt, *flags, '--max_iters=3')
    saved = torch.load(nanogpt / 'out/ckpt.pt')
    assert saved['scaler']['_growth_tracker'] == 3
    torch.save(saved | {'scaler': saved['scaler'] | {'scale': 1024.0}}, nanogpt / 'out/ckpt.pt')
    train(nanogpt, *flags, '--max_iters=5', '--init_from=resume')
    scaler = torch.load(nanogpt / 'out/ckpt.pt')['scaler']
    assert (scaler['scale'], scaler['_growth_tracker']) == (1024.0, 5)


def test_two_ranks_are_as_one(nanogpt):
    train(nanogpt, '--out_dir=one')
    python(nanogpt, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', 'train.py', 'config/abc.py',
           '--out_dir=two')
    one, two = records(nanogpt, 'one'), records(nanogpt, 'two')
    assert list(one) == list(two) == [*range(6)]
    np.testing.assert_allclose([*one.values()], [*two.values()], rtol=1e-4)


@pytest.mark.parametrize('flag, message', [
    ('--init_from=gpt2', "'gpt2' has no ckpt.pt, and GPT-2's weights do not fit this architecture"),
    ('--shard=0', 'shard or expert_parallel needs extras/parallel.py: copy the folder extras/'),
    ('--optimizer=muon', 'optimizer=muon needs extras/optim.py: copy the folder extras/'),
    ('--qk_clip=100.0', 'qk_clip needs extras/qk_clip.py: copy the folder extras/'),
    ('--init_from=resume', 'out/ckpt.pt is no checkpoint of this model: FileNotFoundError'),
])
def test_a_mistake_ends_in_a_line_that_says_what_is_wrong(nanogpt, flag, message):
    assert message in train(nanogpt, flag, code=1).splitlines()[-1]


def test_with_extras_it_is_the_same_run_and_keeps_the_earlier_one(nanogpt):
    train(nanogpt)
    alone = records(nanogpt)
    shutil.copytree(ROOT / 'extras', nanogpt / 'extras', ignore=shutil.ignore_patterns('__pycache__'))
    assert 'is now in out.old1' in train(nanogpt)
    assert records(nanogpt) == records(nanogpt, 'out.old1') == alone
    said = train(nanogpt, '--max_iters=-1', code=1).splitlines()[-1]  # nanoGPT's configurator has no hook
    assert said == 'model.Mistake: max_iters=-1 must be finite, not negative, and below 2**63'
    shutil.copy(ROOT / 'configurator.py', nanogpt)
    said = train(nanogpt, '--max_iters=-1', code=2).splitlines()[-1]
    assert said == 'max_iters=-1 must be finite, not negative, and below 2**63' and not (nanogpt / 'out.old2').exists()


def test_sample_alone_says_what_it_needs(nanogpt):
    """Copied over nanoGPT's beside the two files, without extras/."""
    shutil.copy(ROOT / 'sample.py', nanogpt)
    code, out, said = run_outside('sample.py', '--out_dir=out', cwd=nanogpt, PYTHONPATH='')
    assert (code, out, said.count('\n')) == (2, '', 1) and said.startswith('this sample.py needs the folder extras/')
