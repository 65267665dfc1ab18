"""Bad input of every kind: exit code 2, one line on standard error that says what is wrong, and nothing written."""

import math
import os
import pickle
import re
import shutil
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL, run_inside, run_outside

from extras.integrity import all_finite, check_checkpoint
from model import GPT, Mistake, first_line

RESUME = '--init_from=resume'
NO_FIT = 'the optimizer in out/ckpt.pt is damaged, or does not fit: resume with the --optimizer of its run'


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob('*') if path.is_file() and '__pycache__' not in path.parts}


def expect(clone, script, flags, message, run=run_inside):
    before = contents(clone)
    code, _, said = run(script, *(SMALL if script == 'train.py' else []), *flags, cwd=clone)
    assert 'Traceback' not in said, said
    # bench.py keeps its standard output for the table
    said = [line for line in said.splitlines() if not (script == 'bench.py' and line.startswith('Overriding: '))]
    assert len(said) == 1 and message in said[0], said
    assert code == 2
    assert contents(clone) == before


@pytest.mark.parametrize('flag, message', [
    # the form of a flag, and its type
    ('--n_emb=32', 'did you mean n_embd'), ('--n_embd', '--key=value'), ('-n_embd=32', '--key=value'),
    ('n_embd=32', 'did you mean --n_embd=32?'), ('data', 'did you mean --out_dir=data?'), ('--=3', 'unknown key'),
    ('--gradient_accumulation_steps=0.5', 'must be int'), ('--n_layer=two', 'must be int'),
    ('--n_layer=', 'must be int'), ('--n_layer=None', 'must be int'), ('--n_layer=[2]', 'must be int'),
    ('--max_iters=1e999', 'must be int'),
    ('--bias=1', 'must be bool'), ('--decay_lr=yes', 'must be bool'), ('--learning_rate=fast', 'must be float'),
    ('--learning_rate=nan', 'must be float'), ('--dropout=True', 'must be float'),
    # values that no run can have
    ('--batch_size=0', 'positive'), ('--block_size=-1', 'positive'), ('--gradient_accumulation_steps=0', 'positive'),
    ('--eval_interval=0', 'positive'), ('--eval_iters=0', 'positive'), ('--log_interval=0', 'positive'),
    ('--max_skipped_iters=0', 'positive'), ('--learning_rate=-1', 'not negative'), ('--learning_rate=1e999', 'finite'),
    ('--min_lr=-1e-5', 'not negative'), ('--weight_decay=-0.1', 'not negative'), ('--grad_clip=-1', 'not negative'),
    ('--warmup_iters=-1', 'not negative'), ('--lr_decay_iters=-1', 'not negative'), ('--max_iters=-1', 'not negative'),
    ('--mtp_lambda_late=-1', 'not negative'), ('--mtp_late_from=-1', 'not negative'), ('--beta1=1.0', 'in [0, 1)'),
    ('--beta2=-0.1', 'in [0, 1)'), ('--seed=-1', 'seed'), ('--activation_memory=2', 'in 0..1'),
    ('--optimizer=sgd', "'adamw', 'muon' or"), ('--dtype=int8', 'must be'), ('--dtype=float16', 'needs CUDA'),
    ('--device=gpu', 'cannot be used'), ('--device=cuda:99', 'cannot be used'), ('--init_from=gpt2', 'do not fit'),
    # sizes that no model can have
    ('--n_head=3', 'must divide'), ('--n_layer=0', 'positive'), ('--n_embd=-32', 'positive'),
    ('--dropout=1', 'dropout'), ('--dropout=-0.1', 'dropout'), ('--num_experts_per_tok=5', 'num_experts_per_tok'),
    ('--n_group=3', 'n_group'), ('--topk_group=2', 'topk_group'), ('--qk_rope_head_dim=3', 'even'),
    ('--scoring_func=relu', 'scoring_func'), ('--rope_factor=0.5', 'rope_factor'), ('--rope_theta=1e999', 'finite'),
    ('--moe_intermediate_size=12', 'must be a multiple of 8'), ('--first_k_dense_replace=3', 'first_k_dense_replace'),
    ('--vocab_size=20', 'beyond vocab_size'), ('--block_size=500', 'too few'), ('--block_size=100000', 'too few'),
    ('--batch_size=' + '9' * 20, 'below 2**31'), ('--eval_iters=' + '9' * 20, 'below 2**31'),
    ('--max_iters=' + '9' * 20, 'below 2**63'), ('--n_layer=' + '9' * 20, '< 2**31'),
    ('--n_shared_experts=' + '9' * 20, '2**31'), ('--max_iters=' + '9' * 400, 'too many digits'),
    ('--learning_rate=' + '9' * 400, 'too many digits'), ('--seed=0x' + 'f' * 5000, 'too many digits'),
    ('--n_embd=131072', 'choose a smaller n_embd'), ('--n_layer=1999999999', 'blocks do not fit'),
    # where the run is written, or taken up
    ('--out_dir=model.py', 'cannot be written: it is a file'), ('--out_dir=model.py/out', 'cannot be written'),
    ('--out_dir=/proc/self', 'cannot be written'), ('--out_dir=' + 'a/' * 2500, 'must name a folder'),
    (RESUME, 'out/ckpt.pt is missing: train a model first, or name the out_dir it is in'),
    ('--dataset=nowhere', 'nowhere/train.bin is missing: no data set has that name, or choose a prepared one: '),
    ('--dataset=arithmetic/mul2', 'train.bin is missing: run python data/arithmetic/prepare.py first, or choose'),
])
def test_flags(small, flag, message):
    expect(small, 'train.py', [flag], message)


@pytest.mark.parametrize('text, message', [
    ('learning_rate = = 1', 'SyntaxError'), ('learning_rate = 1 / 0', 'ZeroDivisionError'), ('n_emb = 32', 'n_embd'),
    ('n_layer = "two"', 'must be int'), ('learning_rate = float("nan")', 'finite'), ('import nowhere', 'nowhere'),
    ('raise ValueError("two\\nlines")', 'ValueError'), (b'\xff\xfe', 'not UTF-8'),
    ('raise KeyboardInterrupt', 'given.py, line 1: KeyboardInterrupt'), ('n_layer = 10**5000', 'too many digits'),
    ('class Odd(BaseException):\n    pass\nraise Odd("odd")', 'given.py, line 3: Odd: odd'),
])
def test_config_files(small, text, message):
    (small / 'given.py').write_bytes(text if isinstance(text, bytes) else text.encode())
    expect(small, 'train.py', ['given.py'], message)


@pytest.mark.parametrize('value', ['x', '²', ''])
@pytest.mark.parametrize('name', ['RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'LOCAL_WORLD_SIZE', 'GROUP_WORLD_SIZE',
                                  'MASTER_PORT'])
def test_ranks_that_are_no_numbers(small, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    expect(small, 'train.py', [], f'{name}={value} in the environment must be a number')


@pytest.mark.parametrize('environment', [{'RANK': '0'}, {'RANK': '0', 'WORLD_SIZE': '0'},
                                         {'RANK': '3', 'WORLD_SIZE': '2'}])
def test_ranks_that_are_not_there(small, monkeypatch, environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    expect(small, 'train.py', [], 'RANK in the environment must be below WORLD_SIZE')


def tokens(**files):
    def write(small):
        for split, data in files.items():
            path = small / f'data/abc/{split}.bin'
            path.unlink()
            if data is not None:
                path.write_bytes(data if isinstance(data, bytes) else data.tobytes())
    return write


def meta(data):
    def write(small):
        (small / 'data/abc/meta.pkl').write_bytes(data if isinstance(data, bytes) else pickle.dumps(data))
    return write


def no_meta(small):
    (small / 'data/abc/meta.pkl').unlink()


def folder_for_tokens(small):
    (small / 'data/abc/val.bin').unlink()
    (small / 'data/abc/val.bin').mkdir()


def pipe_for_meta(small):
    (small / 'data/abc/meta.pkl').unlink()
    os.mkfifo(small / 'data/abc/meta.pkl')


TEN = np.arange(1000) % 10
ONE_TOO_LARGE = np.append(TEN, 40).astype(np.uint16)


@pytest.mark.parametrize('spoil, message', [
    (tokens(train=None), 'is missing'), (tokens(val=None), 'is missing'), (folder_for_tokens, 'is missing'),
    (tokens(train=b''), 'too few'), (tokens(val=b''), 'too few'),
    (tokens(val=TEN[:16].astype(np.uint16)), 'val.bin holds 16 tokens, too few: block_size=16 needs 17'),
    (tokens(train=TEN.astype(np.uint16).tobytes()[:-1]), 'cut short'),
    (tokens(train=TEN.astype(np.float64)), 'beyond vocab_size'), (tokens(train=ONE_TOO_LARGE), 'token 40, beyond'),
    (tokens(val=ONE_TOO_LARGE), 'val.bin holds the token 40'), (tokens(val=b'words, not numbers ' * 99), 'beyond'),
    (meta(b''), 'meta.pkl cannot be used'), (meta(pickle.dumps({'vocab_size': 40})[:-5]), 'meta.pkl cannot be used'),
    (meta([40]), 'meta.pkl cannot be used'), (meta({}), 'vocab_size'),
    (meta({'vocab_size': '40'}), 'vocab_size must be int'),
    (meta({'vocab_size': 40, 'dtype': 'O'}), 'its dtype uint16 or uint32'), (meta({'vocab_size': -1}), 'positive'),
    (meta({'vocab_size': 40, 'stoi': 'ab'}), 'stoi must be dict'),
    (meta({'vocab_size': 40, 'itos': 3}), 'meta.pkl cannot be used'),
    (meta({'vocab_size': 40, 'crc32': 3}), 'crc32 must be dict'),
    (meta({'vocab_size': 40, 'stoi': {'a': -1}, 'itos': {-1: 'a'}}), 'its characters are no tables'),
    (meta({'vocab_size': 40, 'dtype': 'uint32'}), 'beyond vocab_size'), (no_meta, 'meta.pkl is missing'),
    (pipe_for_meta, 'it is no regular file'),
])
def test_data(small, spoil, message):
    spoil(small)
    expect(small, 'train.py', [], message)


@pytest.fixture(scope='session')
def checkpoint_bytes(tmp_path_factory):
    """The checkpoint of one iteration on the data of `small`; made by whoever asks first."""
    return {}


@pytest.fixture
def trained(small, checkpoint_bytes):
    """`small` with a checkpoint in out/."""
    if not checkpoint_bytes:
        code, _, said = run_inside('train.py', *SMALL, '--max_iters=1', '--eval_iters=1', cwd=small)
        assert code == 0, said
        checkpoint_bytes['ckpt'] = (small / 'out/ckpt.pt').read_bytes()
        shutil.rmtree(small / 'out')
    (small / 'out').mkdir()
    (small / 'out/ckpt.pt').write_bytes(checkpoint_bytes['ckpt'])
    return small


def checkpoint(change):
    def write(trained):
        saved = torch.load(trained / 'out/ckpt.pt', weights_only=True)
        torch.save(change(saved) or saved, trained / 'out/ckpt.pt')
    return write


def cut(n):
    def write(trained):
        data = (trained / 'out/ckpt.pt').read_bytes()
        (trained / 'out/ckpt.pt').write_bytes(data[:int(len(data) * n)])
    return write


def flipped(trained):
    data = bytearray((trained / 'out/ckpt.pt').read_bytes())
    data[40:80] = b'\xff' * 40
    (trained / 'out/ckpt.pt').write_bytes(data)


def state_of_0(**entries):
    """Of the first parameter, in the optimizer. A fused step reads past the end of one that is too small."""
    return checkpoint(lambda c: c['optimizer']['state'][0].update(entries))


def every_state(change):
    """Both moments of all parameters."""
    def write(saved):
        for state in saved['optimizer']['state'].values():
            state.update(exp_avg=change(state['exp_avg']), exp_avg_sq=change(state['exp_avg_sq']))
    return checkpoint(write)


def gpt2(saved):
    """What nanoGPT saves."""
    return {'model': {'transformer.wpe.weight': torch.zeros(16, 32)}, 'optimizer': {}, 'iter_num': 1, 'config': {},
            'best_val_loss': 1.0, 'model_args': {'n_layer': 2, 'n_head': 2, 'n_embd': 32, 'block_size': 16,
                                                 'bias': False, 'vocab_size': 40, 'dropout': 0.0}}


def other_characters(trained):
    chars = ''.join(chr(80 + i) for i in range(40))
    meta({'vocab_size': 40, 'itos': dict(enumerate(chars)), 'stoi': {c: i for i, c in enumerate(chars)}})(trained)


def flip_bit(path, bit):
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def test_a_flipped_bit_of_a_checkpoint_changes_no_weight(trained):
    """torch.load does not compare the checksums in its file: it took nearly every flipped bit for a weight."""
    path = trained / 'out/ckpt.pt'
    data, rng, refused = path.read_bytes(), np.random.default_rng(0), 0
    weights = GPT.from_checkpoint(path)[0].state_dict()
    contents = data.rindex(b'PK\1\2')  # the last entry of the table of contents, on which zipfile raises many kinds
    for bit in (*rng.integers(8 * len(data), size=60).tolist(), *range(8 * contents + 6, 8 * (contents + 70), 8)):
        flip_bit(path, bit)
        try:
            model, checkpoint = GPT.from_checkpoint(path)
            check_checkpoint(path, model, checkpoint)
            assert all(torch.equal(x, weights[name]) for name, x in model.state_dict().items())
        except Mistake:
            refused += 1
        path.write_bytes(data)
    assert refused > 50 + 20


@pytest.mark.parametrize('values, finite', [([], True), ([1.0], True), ([1.0, math.nan], False), ([-math.inf], False)])
def test_weights_that_are_finite(values, finite):
    """A rank of many may hold no rows of any tensor."""
    assert all_finite({'a': torch.tensor(values), 'b': torch.zeros(0)}) == finite


@pytest.mark.parametrize('spoil, flag, message', [
    (cut(0), RESUME, 'no checkpoint of this model'), (cut(0.5), RESUME, 'no checkpoint of this model'),
    (cut(0.99), RESUME, 'no checkpoint of this model'), (flipped, RESUME, 'no checkpoint of this model'),
    (lambda trained: flip_bit(trained / 'out/ckpt.pt', 400_000), RESUME, 'has another checksum than was written'),
    (checkpoint(lambda c: c['model'].update({'transformer.ln_f.weight': torch.full((32,), math.nan)})), RESUME,
     'weights that are not finite'),
    (checkpoint(lambda c: {'a': 1}), RESUME, 'no checkpoint of this model'),
    (checkpoint(lambda c: [1, 2]), RESUME, 'no checkpoint of this model'),
    (checkpoint(gpt2), RESUME, 'this is a nanoGPT (GPT-2) checkpoint'),
    (checkpoint(lambda c: c['model_args'].update(n_layer=3)), RESUME, 'no checkpoint of this model'),
    (checkpoint(lambda c: c['model_args'].update(n_layer='2')), RESUME, 'must be int'),
    (checkpoint(lambda c: c['model_args'].update(n_experts=2)), RESUME, 'no checkpoint of this model'),
    (checkpoint(lambda c: c.update(iter_num=-1)), RESUME, 'iter_num'),
    (checkpoint(lambda c: c.pop('best_val_loss') and None), RESUME, 'best_val_loss'),
    (checkpoint(lambda c: c.update(meta=[1])), RESUME, 'meta has a wrong type'),
    *((checkpoint(lambda c, bad=bad: c.update(bad)), RESUME, 'wrong type or is negative') for bad in (
        {'micro_batches': 'x'}, {'micro_batches': -5}, {'val_loss': 'x'}, {'wandb_id': [1]})),
    (checkpoint(lambda c: c['optimizer']['param_groups'].pop() and None), RESUME, NO_FIT),
    (checkpoint(lambda c: c.update(optimizer='none')), RESUME, NO_FIT),
    (checkpoint(lambda c: c.update(optimizer={'param_groups': c['optimizer']['param_groups']})), RESUME, NO_FIT),
    (checkpoint(lambda c: c['optimizer']['state'].update({99: c['optimizer']['state'][0]})), RESUME, NO_FIT),
    (every_state(lambda x: torch.ones(3)), RESUME, NO_FIT), (every_state(lambda x: torch.ones(())), RESUME, NO_FIT),
    (every_state(lambda x: torch.ones(1).expand(x.shape)), RESUME, NO_FIT),
    (every_state(lambda x: x.to(torch.float8_e4m3fn)), RESUME, NO_FIT),
    (every_state(lambda x: x.long()), RESUME, NO_FIT), (every_state(lambda x: -x.abs()), RESUME, NO_FIT),
    (state_of_0(exp_avg=torch.zeros(2)), RESUME, NO_FIT), (state_of_0(exp_avg_sq='none'), RESUME, NO_FIT),
    (state_of_0(exp_avg=torch.full((40, 32), math.nan)), RESUME, NO_FIT),
    (state_of_0(step=torch.tensor(-1.0)), RESUME, NO_FIT), (state_of_0(step=torch.ones(40, 32)), RESUME, NO_FIT),
    (state_of_0(more=torch.zeros(40, 32)), RESUME, NO_FIT),
    (checkpoint(lambda c: c['optimizer']['state'][0].pop('exp_avg') is None), RESUME, NO_FIT),
    (other_characters, RESUME, 'another vocabulary'), (no_meta, RESUME, 'another vocabulary'),
    (lambda trained: None, '--optimizer=muon', NO_FIT),
    (lambda trained: None, '--block_size=32', 'is longer than the 16 of the checkpoint'),
])
def test_checkpoints(trained, spoil, flag, message):
    spoil(trained)
    expect(trained, 'train.py', [RESUME, flag], message)


def test_a_long_message_ends_with_a_sentence(trained):
    """torch's about a file that is cut short stopped after 200 characters, in the middle of one."""
    cut(0.5)(trained)
    with pytest.raises(Mistake, match='failed finding central directory. This is an internal miniz error$'):
        GPT.from_checkpoint(trained / 'out/ckpt.pt')  # train.py with extras/ refuses it before that
    assert first_line(ValueError('a' * 300)) == 'a' * 200 and first_line(ValueError('a. b.')) == 'a. b.'
    assert first_line(ValueError()) == 'ValueError'


def test_what_a_checkpoint_says_of_the_optimizers_settings_is_not_used(trained):
    """The flags say it. A state that is missing is told."""
    def spoil(saved):
        for group in saved['optimizer']['param_groups']:
            del group['eps'], group['weight_decay']
            group.update(betas='0.5', amsgrad=True, fused=False, lr=[1])
        del saved['optimizer']['state'][3], saved['optimizer']['state'][4]

    parameters = len(torch.load(trained / 'out/ckpt.pt')['optimizer']['state'])
    checkpoint(spoil)(trained)
    code, printed, said = run_inside('train.py', *SMALL, RESUME, '--max_iters=3', '--beta2=0.7', cwd=trained)
    told = f'has the optimizer state of {parameters - 2} of {parameters} parameters; the others begin anew\n'
    assert code == 0 and 'note: out/ckpt.pt ' + told in printed, said
    saved = torch.load(trained / 'out/ckpt.pt')['optimizer']
    assert [(g['betas'], g['weight_decay'], g['amsgrad'], g['fused']) for g in saved['param_groups']] == \
        [((0.9, 0.7), 0.1, False, True), ((0.9, 0.7), 0.0, False, True)]
    assert [saved['state'][i]['step'] for i in (2, 3, 4)] == [3, 2, 2]


@pytest.mark.parametrize('environment, flags, message', [
    ({'WORLD_SIZE': '3'}, [], 'multiple of the 3 ranks'), ({'WORLD_SIZE': '2'}, [], 'cannot be connected'),
    ({'WORLD_SIZE': '2', 'LOCAL_RANK': '0', 'LOCAL_WORLD_SIZE': '2'}, ['--device=cuda'], 'need as many GPUs'),
])
def test_ranks(small, monkeypatch, environment, flags, message):
    monkeypatch.setattr('torch.cuda.device_count', lambda: 1)
    monkeypatch.delenv('MASTER_ADDR', raising=False)
    for key, value in {'RANK': '0', **environment}.items():
        monkeypatch.setenv(key, value)
    expect(small, 'train.py', flags, message)


@pytest.mark.parametrize('flags, message', [
    (['--out_dir=nowhere'], 'is missing'), (['--start=~'], 'does not know the characters'),
    (['--start='], 'empty prompt'), (['--start=FILE:nowhere'], 'No such file'), (['--start=FILE:out/ckpt.pt'], 'codec'),
    (['--temperature=-1'], 'negative'), (['--num_samples=0'], 'positive'), (['--top_k=-1'], 'negative'),
    (['--max_new_tokens=-1'], 'negative'), (['--dtype=int8'], 'must be'), (['--device=gpu'], 'cannot be used'),
    (['--temprature=1'], 'did you mean temperature'), (['--init_from=gpt2'], 'do not fit'),
    (['--out_dir=model.py'], 'model.py/ckpt.pt is missing'),
])
def test_sample(trained, flags, message):
    expect(trained, 'sample.py', ['--device=cpu', '--start=0', *flags], message)


@pytest.mark.parametrize('change', [lambda c: c.update(meta=[1]), lambda c: c['meta'].update(stoi=3),
                                    lambda c: c['meta']['stoi'].update({'0': -1}),
                                    lambda c: c.update(config='x')])
def test_sample_from_an_odd_checkpoint(trained, change):
    checkpoint(change)(trained)
    expect(trained, 'sample.py', ['--device=cpu', '--start=0'], 'no checkpoint of this model')
    expect(trained, 'convert.py', ['export', '--out_dir=out', '--hf_dir=hf'], 'no checkpoint of this model')


@pytest.mark.parametrize('script, flags, message', [
    ('convert.py', [], 'required'), ('convert.py', ['sideways', '--out_dir=out', '--hf_dir=hf'], 'invalid choice'),
    ('convert.py', ['export', '--hf_dir=hf'], '--out_dir'),
    ('convert.py', ['export', '--out_dir=nowhere', '--hf_dir=hf'], 'is missing'),
    ('convert.py', ['export', '--out_dir=out', '--hf_dir=data'], 'exists already'),
    ('convert.py', ['import', '--out_dir=new', '--hf_dir=nowhere'], 'nowhere has no config.json'),
    ('convert.py', ['import', '--out_dir=out', '--hf_dir=data'], 'exists already'),
    ('plot.py', [], 'required'), ('plot.py', ['nowhere.jsonl'], 'No such file'),
    ('plot.py', ['train.py'], 'no records'), ('plot.py', ['out/ckpt.pt'], 'no records'),
    ('bench.py', [], 'usage'), ('bench.py', ['fast'], 'usage'),
    ('bench.py', ['train', '--peer=gpt5'], 'must name some of'), ('bench.py', ['train', '--what=x'], 'unknown key'),
    ('bench.py', ['train', '--stps=3'], 'did you mean steps'),
    ('data/shakespeare_char/prepare.py', ['--input=nowhere'], 'no such text file'),
    ('data/shakespeare_char/prepare.py', ['--input=data/abc/train.bin'], 'UTF-8'),
    ('data/shakespeare_char/prepare.py', ['--input=short.txt'], 'too few'),
    ('data/shakespeare_char/prepare.py', ['--output=x'], 'unrecognized'),
])
def test_the_other_scripts(trained, script, flags, message):
    (trained / 'short.txt').write_text('short')
    (trained / 'data/abc/train.bin').write_bytes(b'\xff\xfe' * 50)
    expect(trained, script, flags, message)


def test_as_processes(small):
    """The same from outside: Python's exit code is that of the script."""
    expect(small, 'train.py', ['--n_emb=32'], 'did you mean n_embd', run_outside)
    tokens(val=ONE_TOO_LARGE)(small)
    expect(small, 'train.py', [], 'val.bin holds the token 40', run_outside)
    expect(small, 'data/shakespeare_char/prepare.py', ['--input=nowhere'], 'no such text file', run_outside)


ATTEND = 'def expand(self, latent):'


@pytest.mark.parametrize('before, compiled', [('def __init__(self, config, layer, mla=MLA, moe=MoE):', False),
                                              (ATTEND, False), (ATTEND, True)], ids=['building', 'forward', 'compiled'])
def test_a_bug_keeps_its_traceback(small, before, compiled):
    """A researcher's own, in model.py. A ValueError of building or of the trial was once one line, as a user's mistake
    is.
    """
    bug = 'F.cross_entropy(torch.zeros(3, 5), torch.zeros(2, dtype=torch.long))'
    text = (small / 'model.py').read_text()
    assert text.count(before) == 1
    (small / 'model.py').write_text(text.replace(before, f'{before}\n        {bug}'))
    code, printed, said = run_outside('train.py', *SMALL, f'--compile={compiled}', cwd=small)
    assert code == 1 and not (small / 'out').exists()
    assert said.startswith('Traceback') and f'model.py", line {text[:text.index(before)].count(chr(10)) + 2}' in said
    assert said.splitlines()[-1] == 'ValueError: Expected input batch_size (3) to match target batch_size (2).'
    assert ('going on without torch.compile: ' in printed) == compiled


# untrusted files

class Call:
    """Pickled, a call of any function."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


class Table(dict):
    def __reduce__(self):
        return exec, ("open('hacked', 'w')",)


def by_opcodes(module, name, argument):
    """Protocol 0, as by hand: module.name(argument)."""
    return f"(dp0\nS'vocab_size'\nI40\nsS'x'\nc{module}\n{name}\n(S'{argument}'\ntRs.".encode()


def built(state):
    """A call hidden in the BUILD opcode of an object that a REDUCE made."""
    return b'cbuiltins\ngetattr\n(cos\nsystem\nS\'__call__\'\ntR(S\'' + state.encode() + b"'\ntR."


MALICIOUS = {
    'os.system': lambda: pickle.dumps({'vocab_size': 40, 'stoi': Call(__import__('os').system, 'touch hacked')}),
    'eval': lambda: pickle.dumps({'vocab_size': 40, 'stoi': Call(eval, "open('hacked', 'w')")}),
    'a dict that is none': lambda: pickle.dumps({'vocab_size': 40, 'meta': {'deep': [Table()]}}),
    'getattr': lambda: built('touch hacked'),
    'opcodes of protocol 0': lambda: by_opcodes('posix', 'system', 'touch hacked'),
    'a dotted name': lambda: pickle.dumps({'vocab_size': 40, 'itos': Call(Path.touch, Path('hacked'))}, protocol=4),
    'subprocess': lambda: pickle.dumps(Call(__import__('subprocess').call, ['touch', 'hacked']), protocol=2),
}


@pytest.mark.parametrize('kind', MALICIOUS)
def test_a_malicious_pickle_runs_nothing(trained, monkeypatch, kind):
    """Each is first shown to be one: Python's own unpickler creates the file `hacked`."""
    canary = trained / 'hacked'
    monkeypatch.chdir(trained)
    pickle.loads(MALICIOUS[kind]())
    assert canary.exists()
    canary.unlink()
    whole = (trained / 'data/abc/meta.pkl').read_bytes()
    (trained / 'data/abc/meta.pkl').write_bytes(MALICIOUS[kind]())
    expect(trained, 'train.py', [], 'not plain data')
    (trained / 'data/abc/meta.pkl').write_bytes(whole)
    # alone, and inside a checkpoint that is whole otherwise
    (trained / 'evil.pt').write_bytes(MALICIOUS[kind]())
    saved = torch.load(trained / 'out/ckpt.pt', weights_only=True)
    saved['meta'] = Call(eval, "open('hacked', 'w')")
    torch.save(saved, trained / 'inside.pt')
    for evil in ('evil.pt', 'inside.pt'):
        shutil.copy(trained / evil, trained / 'out/ckpt.pt')
        expect(trained, 'train.py', [RESUME], 'no checkpoint of this model')
        expect(trained, 'sample.py', ['--device=cpu', '--start=0'], 'no checkpoint of this model')
        expect(trained, 'convert.py', ['export', '--out_dir=out', '--hf_dir=hf'], 'no checkpoint of this model')
    assert not canary.exists()


def larger_than_the_file(trained):
    """Shapes that agree, over storages of one number."""
    def change(saved):
        saved['model_args'].update(vocab_size=10**8)
        for name in ('lm_head.weight', 'transformer.wte.weight'):
            saved['model'][name] = torch.zeros(1, 1).expand(10**8, 32)
    checkpoint(change)(trained)


def bomb(trained):
    """The same file, with each part compressed."""
    with zipfile.ZipFile(trained / 'out/ckpt.pt') as file, zipfile.ZipFile(trained / 'small.pt', 'w') as small:
        for part in file.infolist():
            small.writestr(part.filename, file.read(part), zipfile.ZIP_DEFLATED)
    (trained / 'small.pt').rename(trained / 'out/ckpt.pt')


def pipe(trained):
    (trained / 'out/ckpt.pt').unlink()
    os.mkfifo(trained / 'out/ckpt.pt')


def asks_for(**sizes):
    return checkpoint(lambda c: c['model_args'].update(sizes))


@pytest.mark.parametrize('spoil, message', [
    (asks_for(n_layer=10**7), 'n_layer=10000000, and there are weights for 2'), (asks_for(n_layer=10**19), 'n_layer'),
    (asks_for(num_nextn_predict_layers=10**7), 'num_nextn_predict_layers=10000000, and there are weights for 2'),
    (asks_for(mtp_n_layer=10**7), 'mtp_n_layer=10000000, and there are weights for 1'),
    (asks_for(block_size=10**9), 'a context of 1,000,000,000 tokens is too long'),
    (asks_for(vocab_size=10**8), 'weight has the shape [40, 32]'), (asks_for(n_embd=2**28), 'has the shape'),
    (asks_for(n_routed_experts=2**28), 'has the shape'), (larger_than_the_file, 'its weights are'),
    (bomb, 'its parts are compressed'), (pipe, 'no regular file'),
])
def test_a_checkpoint_that_asks_for_more_than_it_holds(trained, spoil, message):
    """In memory and in time: the model is built only when its sizes are known to be the file's."""
    spoil(trained)
    start, before = time.monotonic(), peak()
    if 'a context' not in message:  # which train.py's own block_size replaces
        expect(trained, 'train.py', [RESUME], message)
        expect(trained, 'train.py', ['--init_from=out', '--out_dir=new'], message)
    expect(trained, 'sample.py', ['--device=cpu', '--start=0'], message)
    expect(trained, 'convert.py', ['export', '--out_dir=out', '--hf_dir=hf'], message)
    assert time.monotonic() - start < 20 and peak() - before < 300_000


def peak():
    """The most memory that this process has held since its peak was reset, in kB."""
    return int(re.search(r'VmHWM:\s+(\d+)', Path('/proc/self/status').read_text())[1])


@pytest.mark.parametrize('data', [
    b'\x80\x04\x8b\xff\xff\xff\x7f.', b'\x80\x04\x8d' + b'\xff' * 7 + b'\x7f.',
    b'\x80\x05\x96' + b'\xff' * 7 + b'\x7f.', b'Pname\n.',
    b'\x80\x02Nr\xff\xff\xff\x0f.', *(b'\x80\x05' + op + (2**34).to_bytes(8, 'little') + b'.' for op in (
        pickle.BYTEARRAY8, pickle.BINBYTES8, pickle.BINUNICODE8, pickle.FRAME)),
    b'\x80\x04}Q.', b'I' + b'9' * 100_000 + b'\n.', b'(' * 1000, b'\x80\x09.', b'\x80\x02\x82\x01.',
])
def test_pickles_that_ask_for_memory_or_for_other_objects(small, data):
    meta(data)(small)
    resettable = os.access('/proc/self/clear_refs', os.W_OK)  # on Linux
    if resettable:
        Path('/proc/self/clear_refs').write_text('5')  # the peak begins anew: earlier tests may have taken more
        before = peak()
    expect(small, 'train.py', [], 'meta.pkl cannot be used')
    assert not resettable or peak() - before < 300_000
