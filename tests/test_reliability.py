"""What a run survives: kills, signals, a full disk, numbers that are not finite. tests/by_hand/soak.py has more."""

import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import soak
import torch
from conftest import SMALL, load, log, losses, optimizer_of, run, run_inside, tiny_model, torchrun, train

import model
from extras import dcp, folder, scripts
from model import GPT

RESUME = '--init_from=resume'
EQUAL = dict(rtol=0, atol=0)


def assert_same(a, b):
    """Two checkpoints of the same weights, the same optimizer and the same iteration, bit for bit."""
    for key in ('model', 'optimizer', 'iter_num', 'best_val_loss'):
        torch.testing.assert_close(a[key], b[key], **EQUAL)


# resuming

@pytest.mark.parametrize('flags', [[], ['--dropout=0.2'], ['--optimizer=muon']])
def test_a_resumed_run_is_bit_identical(small, flags):
    train(small, *flags, '--out_dir=whole')
    train(small, *flags, '--max_iters=3')
    assert len(losses(small)) == 3
    train(small, *flags, RESUME)
    assert losses(small) == losses(small, 'whole')
    assert_same(load(small), load(small, 'whole/ckpt.pt'))


def test_whatever_draws_from_torch_goes_on_where_it_was(small, monkeypatch):
    forward = GPT.forward

    def noisy(self, *args, **kwargs):
        logits, loss = forward(self, *args, **kwargs)
        return logits, loss * (1 + torch.rand(())) if self.training else loss

    train(small, '--out_dir=plain')
    monkeypatch.setattr(GPT, 'forward', noisy)
    train(small, '--out_dir=whole')
    train(small, '--max_iters=3')
    torch.rand(7)
    train(small, RESUME)
    assert losses(small) == losses(small, 'whole') != losses(small, 'plain')
    assert_same(load(small), load(small, 'whole/ckpt.pt'))


def test_evaluating_more_often_changes_nothing(small):
    train(small, '--dropout=0.2', '--out_dir=seldom', '--eval_interval=6')
    train(small, '--dropout=0.2', '--out_dir=often', '--eval_interval=1', '--eval_iters=3')
    assert losses(small, 'seldom') == losses(small, 'often')
    torch.testing.assert_close(load(small, 'seldom/ckpt.pt')['model'], load(small, 'often/ckpt.pt')['model'], **EQUAL)


def test_another_number_of_ranks_goes_on_alike(small):
    """The micro-batches and their dropout are numbered over all ranks: only the order of the sums differs."""
    flags = ['--dropout=0.2', '--gradient_accumulation_steps=4']
    train(small, *flags, '--out_dir=one')
    code, printed = torchrun(small, *flags, '--max_iters=3')
    assert code == 0, printed
    train(small, *flags, RESUME)
    one, both = load(small, 'one/ckpt.pt')['model'], load(small)['model']
    for name in one:
        torch.testing.assert_close(both[name], one[name], atol=2e-5, rtol=1e-4, msg=lambda m, n=name: f'{n}: {m}')


def test_fewer_micro_batches_per_iteration_after_a_resume_repeat_none(small, monkeypatch):
    """A checkpoint counts micro-batches. Once, iteration times gradient_accumulation_steps numbered them."""
    default_rng, drawn = np.random.default_rng, []

    def spy(key):
        if len(key) == 4 and key[1:3] == (0, 0):  # training rows, and not dropout or an evaluation
            drawn[-1].append(key[3])
        return default_rng(key)

    monkeypatch.setattr(np.random, 'default_rng', spy)
    for flags in (['--gradient_accumulation_steps=4', '--max_iters=3'],
                  [RESUME, '--gradient_accumulation_steps=2', '--max_iters=6'],
                  [RESUME, '--gradient_accumulation_steps=3', '--max_iters=7']):
        drawn.append([])
        train(small, *flags)
    assert drawn == [[0, *range(12)], [0, *range(12, 18)], [0, *range(18, 21)]]  # before the loop, one is tried
    assert load(small)['micro_batches'] == 21


def test_ranks_with_short_and_long_rows_are_as_one_process(small):
    """Each label weighs the same. Once, the ranks took the mean of each rank's mean over its own labels."""
    rng = np.random.default_rng(0)
    for split, rows in (('train', 250), ('val', 30)):
        mask = np.zeros((rows, 16), np.uint8)
        mask[np.arange(rows), 15] = 1                       # a row has one label
        mask[rng.random(rows) < 0.5, 1:] = 1                # or fifteen
        mask.tofile(small / f'data/abc/{split}_mask.bin')
        (small / f'data/abc/{split}.bin').write_bytes((small / f'data/abc/{split}.bin').read_bytes()[:rows * 32])
    meta = pickle.loads((small / 'data/abc/meta.pkl').read_bytes())
    (small / 'data/abc/meta.pkl').write_bytes(pickle.dumps(meta | {'row_length': 16}))
    # the first moment is the gradient
    flags = ['--batch_size=1', '--max_iters=2', '--beta1=0.0', '--grad_clip=0.0', '--learning_rate=1e-6',
             '--bias_update_speed=0.0']
    train(small, *flags, '--out_dir=one')
    code, printed = torchrun(small, *flags, '--out_dir=two')
    assert code == 0, printed
    one, two = losses(small, 'one'), losses(small, 'two')
    for step in one:
        assert two[step] == pytest.approx(one[step], abs=1e-5)
    for a, b in zip(*(load(small, f'{out}/ckpt.pt')['optimizer']['state'].values() for out in ('one', 'two'))):
        torch.testing.assert_close(b['exp_avg'], a['exp_avg'], atol=1e-5, rtol=1e-3)

    # the loss of an iteration: the sum over the labels of its micro-batches by the number of labels
    gpt, _ = GPT.from_checkpoint(small / 'one/ckpt.pt')     # the rate is so small that the weights are as before
    tokens = np.fromfile(small / 'data/abc/train.bin', np.uint16).astype(np.int64)
    labels = np.where(np.fromfile(small / 'data/abc/train_mask.bin', np.uint8), tokens, -1)
    total, counts = 0, []
    for index in (2, 3):
        start = 16 * np.random.default_rng((1337, 0, 0, index)).integers((len(tokens) - 17) // 16 + 1)
        x, y = torch.from_numpy(tokens[start:start + 16])[None], torch.from_numpy(labels[start + 1:start + 17])[None]
        counts.append((y >= 0).sum().item())
        total += gpt.eval()(x, y)[1].item() * counts[-1]
    assert counts[0] != counts[1] and one[1][0] == pytest.approx(total / sum(counts), abs=0.01)


# two checkpoints

def diverging(clone, *flags):
    """Better at 1, worse at 2 and 3."""
    printed = train(clone, '--learning_rate=0.3', '--decay_lr=False', '--warmup_iters=0', '--eval_interval=1',
                    '--max_iters=3', *flags)
    evals = {r['step']: r['val_loss'] for r in log(clone) if 'val_loss' in r}
    best = min((1, 2, 3), key=evals.get)
    assert best < 3
    return best, evals, printed


def test_the_last_is_ckpt_and_the_best_is_beside(small):
    best, evals, _ = diverging(small)
    last, kept = load(small), load(small, 'out/ckpt_best.pt')
    assert last['iter_num'] == 3 and kept['iter_num'] == best
    assert last['best_val_loss'] == kept['best_val_loss'] == evals[best]
    assert not list((small / 'out').glob('*.tmp')) and not (small / 'out/ckpt_last.pt').exists()
    train(small, '--eval_interval=3', '--out_dir=good')
    assert os.path.samefile(small / 'good/ckpt.pt', small / 'good/ckpt_best.pt')  # one file while they are the same


def test_the_best_is_ckpt_and_the_last_is_beside(small):
    best, evals, _ = diverging(small, '--always_save_checkpoint=False')
    assert load(small)['iter_num'] == best and load(small, 'out/ckpt_last.pt')['iter_num'] == 3
    printed = train(small, RESUME, '--always_save_checkpoint=False', '--max_iters=4')
    assert 'going on from out/ckpt_last.pt, iteration 3' in printed
    assert load(small)['best_val_loss'] == evals[best]


def iterations(out):
    """{name: its iteration}, of the checkpoints in a folder."""
    return {path.name: (dcp.from_checkpoint(path)[1] if path.suffix == '.dcp' else torch.load(path))['iter_num']
            for path in out.glob('ckpt*') if not path.name.startswith('ckpt-')}


@pytest.mark.parametrize('form', ['whole', 'dcp'])
@pytest.mark.parametrize('first', [True, False])
def test_a_resume_that_changes_always_save_checkpoint_keeps_the_best_and_the_last(small, first, form):
    """And back again. The next save would write over the best one, which had the name that is now the last one's."""
    end = {'whole': '.pt', 'dcp': '.dcp'}[form]
    names = {True: ('ckpt' + end, 'ckpt_best' + end), False: ('ckpt_last' + end, 'ckpt' + end)}
    best, _, _ = diverging(small, f'--checkpoint={form}', f'--always_save_checkpoint={first}')
    assert iterations(small / 'out') == dict(zip(names[first], (3, best)))
    for last, always in ((3, not first), (4, first)):
        printed = train(small, RESUME, f'--checkpoint={form}', f'--always_save_checkpoint={always}',
                        f'--max_iters={last + 1}', '--learning_rate=0', '--min_lr=0')
        assert f'going on from out/{names[not always][0]}, iteration {last} of' in printed
        assert iterations(small / 'out') == dict(zip(names[always], (last + 1, best)))


@pytest.mark.parametrize('first, second', [('whole', 'dcp'), ('dcp', 'whole')])
def test_a_resume_that_changes_the_form_of_checkpoints_saves_no_worse_one_as_the_best(small, first, second):
    end = {'whole': '.pt', 'dcp': '.dcp'}
    best, _, _ = diverging(small, f'--checkpoint={first}')
    train(small, RESUME, f'--checkpoint={second}', '--max_iters=4', '--learning_rate=0', '--min_lr=0')
    assert iterations(small / 'out') == {'ckpt' + end[first]: 3, 'ckpt_best' + end[first]: best,
                                         'ckpt' + end[second]: 4}


@pytest.mark.parametrize('first', [True, False])
def test_a_resume_that_changes_both_the_form_and_the_names_reads_the_best_and_the_last(small, first):
    """Whole, then shards that are no better, then the other names: those of the shards stayed, the last one as the best
    one's or the best one as the last one's.
    """
    best, _, _ = diverging(small, f'--always_save_checkpoint={first}')
    for always, n in ((first, 4), (not first, 5)):
        train(small, RESUME, '--checkpoint=dcp', f'--always_save_checkpoint={always}', f'--max_iters={n}',
              '--learning_rate=0', '--min_lr=0')
    main, other = ('ckpt', 'ckpt_best') if not first else ('ckpt_last', 'ckpt')
    assert iterations(small / 'out') == {f'{main}.pt': 3, f'{other}.pt': best, f'{main}.dcp': 5}
    assert scripts.open_checkpoint(small / 'out')[2]['iter_num'] == (best if first else 5)


@pytest.mark.parametrize('always', [True, False])
def test_a_kill_between_two_renames_of_checkpoints(tmp_path, monkeypatch, always):
    """The next resume, with the same setting or the other, gives both of them a name that it looks for."""
    def content():
        return {path.name: path.read_text() for path in tmp_path.iterdir()}

    names = {True: {'ckpt.pt': 'last', 'ckpt_best.pt': 'best'}, False: {'ckpt_last.pt': 'last', 'ckpt.pt': 'best'}}
    rename, made = os.rename, []
    for again in (True, False):
        for name, text in names[not always].items():
            (tmp_path / name).write_text(text)
        with monkeypatch.context() as patch:
            patch.setattr('os.rename', lambda *pair: made.append(rename(*pair)) if not made else 1 / 0)
            with pytest.raises(ZeroDivisionError):
                folder.keep_names(tmp_path, always)
        assert 'ckpt.pt' not in content()
        folder.keep_names(tmp_path, again)
        assert content() == names[again]
        folder.keep_names(tmp_path, again)
        assert content() == names[again]
        made.clear()
        for path in tmp_path.iterdir():
            path.unlink()


def test_which_checkpoint_is_the_last_one(tmp_path):
    """That of the highest iteration, of either form; the best one, which was not the last, if there is no other."""
    def save(name, iteration):
        if name.endswith('.dcp'):
            (tmp_path / name).mkdir(exist_ok=True)
            name += '/rest.pt'
        torch.save({'iter_num': iteration}, tmp_path / name)

    assert folder.last_checkpoint(tmp_path) == str(tmp_path / 'ckpt.pt')
    for name, iteration, last in (('ckpt_best.pt', 9, 'ckpt_best.pt'), ('ckpt.pt', 3, 'ckpt.pt'),
                                  ('ckpt_last.dcp', 7, 'ckpt_last.dcp'), ('ckpt.dcp', 5, 'ckpt_last.dcp'),
                                  ('ckpt_last.pt', 8, 'ckpt_last.pt'), ('ckpt.pt', 12, 'ckpt.pt')):
        save(name, iteration)
        assert folder.last_checkpoint(tmp_path) == str(tmp_path / last)
    assert folder.last_checkpoint(tmp_path, ['ckpt']) == str(tmp_path / 'ckpt.pt')
    save('ckpt.dcp', 13)
    assert folder.last_checkpoint(tmp_path, ['ckpt']) == str(tmp_path / 'ckpt.dcp')
    (tmp_path / 'ckpt_last.pt').write_bytes(b'cut short')  # nothing older goes on in silence
    assert folder.last_checkpoint(tmp_path) == str(tmp_path / 'ckpt_last.pt')
    shutil.rmtree(tmp_path / 'ckpt.dcp')
    os.symlink('ckpt-13.dcp', tmp_path / 'ckpt.dcp')  # which was deleted by hand, or not copied
    assert folder.last_checkpoint(tmp_path, ['ckpt']) == str(tmp_path / 'ckpt.dcp')


# where a run is written

def steps(path):
    return sum('"loss"' in line for line in path.read_text().splitlines())


def test_starting_again_and_again_loses_nothing(small, monkeypatch):
    """Run A is done, B crashes at its first step, C starts: once, A's log was written over, and then its checkpoint."""
    train(small, '--max_iters=3')
    a = contents(small / 'out')
    with monkeypatch.context() as patch:
        patch.setattr(GPT, 'update_balance', lambda *_: 1 / 0)
        code, printed, said = run_inside('train.py', *SMALL, cwd=small)
        assert code == 1 and 'ZeroDivisionError' in said and 'the earlier run in out is now in out.old1\n' in printed
    assert contents(small / 'out.old1') == a
    missing = 'out/ckpt.pt is missing: train a model first, or name the out_dir it is in. Earlier runs are in out.old1'
    assert train(small, RESUME, code=2).splitlines()[-1] == missing
    printed = train(small, '--max_iters=2', '--eval_interval=5')
    assert 'the earlier run in out is now in out.old2\n' in printed and list(contents(small / 'out.old2')) == LOG
    c = contents(small / 'out')
    train(small, '--max_iters=1')
    assert contents(small / 'out.old3') == c and steps(small / 'out.old3/log.jsonl') == 2
    assert contents(small / 'out.old1') == a and load(small)['iter_num'] == 1
    assert 'going on from out.old1/ckpt.pt, iteration 3 of 6' in train(small, RESUME, '--out_dir=out.old1')


LOG = ['.lock', 'log.jsonl']


def contents(path):
    """{name: bytes} of a folder, with those of the folders in it."""
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob('*')) if p.is_file()}


def untouched(small, *flags, message, out='out'):
    """A start over a finished run that ends with one line and exit code 2, and leaves all files as they were."""
    before = contents(small / out), sorted(os.listdir(small))
    printed = train(small, *flags, code=2)
    assert message in printed.splitlines()[-1]
    assert (contents(small / out), sorted(os.listdir(small))) == before


def test_what_can_fail_fails_before_an_earlier_run_is_touched(small, monkeypatch):
    train(small, '--max_iters=1')
    for name in ('WANDB_API_KEY', 'WANDB_MODE'):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv('HOME', str(small))  # no login is kept here
    monkeypatch.setenv('WANDB_BASE_URL', 'http://127.0.0.1:9')
    untouched(small, '--wandb_log=True', message='wandb cannot start')
    untouched(small, '--vocab_size=2000000000', message='out of memory')
    untouched(small, '--n_embd=8000000', message='choose a smaller n_embd')
    forward = GPT.forward

    def no_room(self, *args, **kwargs):
        if self.training:
            raise torch.OutOfMemoryError('CUDA out of memory')
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(GPT, 'forward', no_room)
    untouched(small, message='out of memory: try --batch_size=2 --gradient_accumulation_steps=4')


@pytest.mark.parametrize('out, message', [
    ('.', "out_dir='.' holds an earlier run and cannot be renamed"), ('..', "out_dir='..' holds"),
    ('data/abc', 'data/abc is in it'), ('data', 'data/abc is in it')])
def test_a_folder_that_must_keep_its_name(small, out, message):
    """A run begins in it, and the next one is refused: the working folder, one above it, and the data's."""
    clone = shutil.copytree(small, small / 'above/clone')
    (clone / out / 'log.jsonl').write_text('{}\n')  # an earlier run's
    untouched(clone, f'--out_dir={out}', out=out, message=message)
    assert 'give this run its own --out_dir' in train(clone, f'--out_dir={out}', code=2)
    (clone / out / 'log.jsonl').unlink()
    train(clone, f'--out_dir={out}', '--max_iters=1')
    assert (clone / out / 'ckpt.pt').exists()
    train(clone, RESUME, f'--out_dir={out}', '--max_iters=2')


def test_a_folder_around_the_code(small, tmp_path):
    """From a working folder elsewhere."""
    (small / 'log.jsonl').write_text('{}\n')
    before = contents(small)
    elsewhere = tmp_path / 'elsewhere'
    elsewhere.mkdir()
    printed = run(small / 'train.py', *SMALL, f'--out_dir={small}', cwd=elsewhere, ok=False)
    assert f'cannot be renamed: {small}/extras is in it' in printed.splitlines()[-1]
    assert {k: v for k, v in contents(small).items() if '__pycache__' not in k} == before


def test_a_mount_keeps_its_name(small):
    """A file system of its own, in a namespace that ends with the test."""
    script = 'mount -t tmpfs tmpfs out && exec "$@"'
    (small / 'out').mkdir()
    command = ['unshare', '--mount', '--map-root-user', 'sh', '-ec', script, 'sh']
    if subprocess.run([*command, 'true'], cwd=small, capture_output=True).returncode != 0:
        pytest.skip('no file system can be mounted here')
    twice = '"$@" --max_iters=1 && ls out; "$@" || echo "code $?"; ls out && ls -d out*'
    done = subprocess.run([*command, 'sh', '-c', twice, 'sh', sys.executable, 'train.py', *SMALL], cwd=small,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    said = "out_dir='out' holds an earlier run and cannot be renamed: it is a mount; give this run its own --out_dir"
    files = 'ckpt.pt\nckpt_best.pt\nlog.jsonl\n'
    assert files in done.stdout and done.stdout.endswith(f'{said}\ncode 2\n{files}out\n'), done.stdout


def test_an_out_dir_that_is_a_link(small, tmp_path):
    """The folder that it points to is renamed, on its own disk; the link stays."""
    (tmp_path / 'disk').mkdir()
    os.symlink(tmp_path / 'disk/run', small / 'out')  # which does not exist yet
    train(small, '--max_iters=3')
    before = contents(tmp_path / 'disk/run')
    printed = train(small, '--max_iters=1')
    assert 'the earlier run in out is now in ../disk/run.old1\n' in printed
    assert contents(tmp_path / 'disk/run.old1') == before and load(small)['iter_num'] == 1
    assert (small / 'out').is_symlink() and os.readlink(small / 'out') == str(tmp_path / 'disk/run')
    assert sorted(p.name for p in (tmp_path / 'disk').iterdir()) == ['run', 'run.old1']
    assert not list(small.glob('out.*'))
    (tmp_path / 'disk/run/ckpt.pt').unlink()
    (tmp_path / 'disk/run/ckpt_best.pt').unlink()
    assert train(small, RESUME, code=2).splitlines()[-1].endswith('. Earlier runs are in ../disk/run.old1')


def test_no_folder_of_the_users_is_taken(small):
    """A run's new folder is written beside the earlier one: under a name that nobody has."""
    train(small, '--max_iters=1', '--out_dir=out.new1')
    train(small, '--max_iters=2', '--out_dir=out.old1')
    before = contents(small / 'out.new1'), contents(small / 'out.old1')
    train(small, '--max_iters=3')
    train(small, '--max_iters=1')
    assert (contents(small / 'out.new1'), contents(small / 'out.old1')) == before
    assert load(small, 'out.old2/ckpt.pt')['iter_num'] == 3 and load(small)['iter_num'] == 1


def test_a_second_process_in_the_same_folder(small):
    """Neither a new run nor a resume; and a process that was killed holds nothing."""
    train(small, '--max_iters=1')
    process = soak.start(small, *SMALL, RESUME, '--max_iters=100000', '--eval_interval=100000')
    wait_for_iterations(small, process)
    os.kill(process.pid, signal.SIGSTOP)
    try:
        for flags in ([], [RESUME], [RESUME, '--always_save_checkpoint=False']):
            untouched(small, *flags, message='another process is training in out; give this run its own --out_dir')
        assert 'step 1: ' in train(small, RESUME, '--eval_only=True')  # it saves nothing
    finally:
        process.kill()
        process.wait()
    train(small, RESUME)
    assert load(small)['iter_num'] == 6


def test_no_links_no_matter(small, monkeypatch):
    def link(*_):
        raise OSError('no links here')
    fsync, forced = os.fsync, set()
    monkeypatch.setattr('os.link', link)
    monkeypatch.setattr('os.fsync', lambda file: (forced.add(os.fstat(file).st_ino), fsync(file)))
    train(small)
    assert {(small / f'out/{name}.pt').stat().st_ino for name in ('ckpt', 'ckpt_best')} <= forced
    assert (small / 'out/ckpt.pt').read_bytes() == (small / 'out/ckpt_best.pt').read_bytes()
    assert not os.path.samefile(small / 'out/ckpt.pt', small / 'out/ckpt_best.pt')


@pytest.mark.parametrize('call', ['torch.save', 'os.link', 'os.replace', 'os.fsync'])
def test_a_checkpoint_that_cannot_be_written(small, monkeypatch, call):
    """Whatever step of saving fails: one line, exit code 2, and the checkpoint of before."""
    train(small, '--max_iters=3')

    def fail(*_):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(call, fail)
    if call == 'os.link':  # the best checkpoint is then written as another file: that fails too
        save, saved = torch.save, []
        monkeypatch.setattr('torch.save', lambda *args: fail() if saved else saved.append(save(*args)))
    printed = train(small, RESUME, code=2)
    assert printed.splitlines()[-1].endswith('[Errno 28] No space left on device')
    assert load(small)['iter_num'] == 3 and not list((small / 'out').glob('*.tmp'))
    monkeypatch.undo()
    train(small, RESUME)
    train(small, '--out_dir=whole')
    assert_same(load(small), load(small, 'whole/ckpt.pt'))


def test_a_file_that_outgrows_its_room(small):
    """The kernel's own limit on a file's size, as a full disk would: within the checkpoint, then within the log."""
    train(small, '--max_iters=3')
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for name, share in (('out/ckpt.pt', 0.6), ('out/log.jsonl', 1.1)):
        room = int((small / name).stat().st_size * share)
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
        try:
            printed = train(small, RESUME, code=2)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert f'{name} could not be written' in printed.splitlines()[-1] and 'too large' in printed.splitlines()[-1]
        assert load(small)['iter_num'] == 3 and not list((small / 'out').glob('*.tmp'))
    train(small, RESUME)
    train(small, '--out_dir=whole')
    assert_same(load(small), load(small, 'whole/ckpt.pt'))


# numbers that are not finite

class Poison(torch.autograd.Function):
    """0, with a gradient that is not finite."""

    @staticmethod
    def forward(ctx, x, gradient):
        ctx.gradient = gradient
        return x.sum() * 0

    @staticmethod
    def backward(ctx, grad):
        return torch.full_like(grad, ctx.gradient), None


def poisoned(monkeypatch, bad, loss=0.0, gradient=0.0):
    """Training forwards whose number is in `bad` have a loss, or a gradient, with something added.

    The one before the loop, which tries a micro-batch, has no number.
    """
    forward, count = GPT.forward, iter(range(-1, 10**9))

    def spoilt(self, *args, **kwargs):
        logits, value = forward(self, *args, **kwargs)
        if self.training and next(count) in bad:
            self.stats['losses'] = self.stats['losses'] + loss
            value = value + loss + Poison.apply(self.transformer.ln_f.weight.sum(), gradient)
        return logits, value

    monkeypatch.setattr(GPT, 'forward', spoilt)


@pytest.mark.parametrize('flags', [[], ['--optimizer=muon'], ['unfused']])
@pytest.mark.parametrize('spoil', [dict(loss=float('nan')), dict(loss=float('inf')), dict(gradient=float('inf')),
                                   dict(gradient=float('nan'))])
def test_an_iteration_that_is_not_finite_changes_nothing(small, monkeypatch, flags, spoil):
    """Weights, both moments, momentum, step counts and balance bias; AdamW fused and not, and Muon."""
    if flags == ['unfused']:
        configure = GPT.configure_optimizers

        def unfused(self, *args):
            optimizer = configure(self, *args)
            for group in (optimizer.defaults, *optimizer.param_groups):
                group['fused'] = False
            return optimizer
        monkeypatch.setattr(GPT, 'configure_optimizers', unfused)
        flags = []
    flags = [*flags, '--eval_interval=100', '--decay_lr=False', '--grad_clip=0.5']
    train(small, *flags, '--max_iters=2', '--out_dir=two')
    poisoned(monkeypatch, {5, 6, 9}, **spoil)  # of two micro-batches per iteration: iterations 2, 3 and 4
    printed = train(small, *flags, '--max_iters=5')
    assert re.findall(r'^iter (\d): .*, skipped (\d)$', printed, re.M) == [('2', '1'), ('3', '2'), ('4', '3')]
    assert [r['skipped'] for r in log(small) if 'loss' in r] == [0, 0, 1, 2, 3]
    for key in ('model', 'optimizer'):
        torch.testing.assert_close(load(small)[key], load(small, 'two/ckpt.pt')[key], **EQUAL)
    assert any(v.abs().sum() > 0 for k, v in load(small)['model'].items() if 'correction_bias' in k)


def test_too_many_in_a_row_stop_the_run(small, monkeypatch):
    train(small, '--max_iters=3')
    before = (small / 'out/ckpt.pt').read_bytes()
    poisoned(monkeypatch, {2, *range(8, 100)}, loss=float('nan'))  # one alone, and from iteration 3 + 4 on all
    printed = train(small, RESUME, '--max_iters=50', '--eval_interval=100', '--max_skipped_iters=3', code=2)
    assert printed.splitlines()[-1].startswith('3 iterations in a row had a loss or a gradient that is not finite; try')
    assert [r['skipped'] for r in log(small) if 'loss' in r][3:] == [0, 1, 1, 1, 2, 3, 4]
    assert (small / 'out/ckpt.pt').read_bytes() == before


def test_a_validation_loss_that_is_not_finite_is_not_saved(small, monkeypatch):
    train(small, '--max_iters=3')
    before = load(small)
    forward = GPT.forward

    def spoilt(self, *args, **kwargs):
        logits, value = forward(self, *args, **kwargs)
        return logits, value if self.training else value * float('nan')

    monkeypatch.setattr(GPT, 'forward', spoilt)
    printed = train(small, RESUME)
    assert 'val loss nan' in printed and 'no checkpoint is written' in printed
    assert_same(load(small), before)
    assert_same(load(small, 'out/ckpt_best.pt'), before)


def test_found_inf_of_zero_changes_no_bit():
    for kind in ('adamw', 'muon'):
        made = []
        for found_inf in (None, torch.zeros(())):
            torch.manual_seed(0)
            model = tiny_model().train()
            optimizer = optimizer_of(model, kind, 0.1, 1e-2, (0.9, 0.99), 'cpu')
            optimizer.found_inf = found_inf
            for _ in range(3):
                idx = torch.randint(61, (2, 17))
                model(idx[:, :-1], idx[:, 1:])[1].backward()
                optimizer.step()
                optimizer.zero_grad()
            made.append(model.state_dict())
        torch.testing.assert_close(made[0], made[1], **EQUAL)


# kills and signals

@pytest.mark.slow
def test_three_kills_at_random_instants(small):
    good, text = soak.kill(soak.prepare(small), 3, iterations=60)
    assert good and text.startswith('3 kills'), text


@pytest.mark.slow
def test_a_killed_rank_is_started_again(small):
    good, text = soak.ranks(soak.prepare(small), 2, iterations=60)
    assert good, text


def wait_for_iterations(clone, process):
    soak.wait_for(lambda: (soak.steps_of_this_start(clone / 'out') or 0) >= 2, process)


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_with_a_checkpoint(small, number):
    soak.prepare(small)
    process = soak.start(small, '--max_iters=100000', '--eval_interval=100000', '--out_dir=out')
    wait_for_iterations(small, process)
    process.send_signal(number)
    assert process.wait(60) == 0
    last = (small / 'printed').read_text().splitlines()[-1]
    stopped = int(re.search(r'stopped by a signal before iteration (\d+); .*--init_from=resume', last)[1])
    assert 'out/ckpt.pt' in last
    assert load(small)['iter_num'] == stopped == soak.steps_of_this_start(small / 'out') + 1
    code, printed, said = run_inside('train.py', *soak.FLAGS, RESUME, f'--max_iters={stopped + 3}',
                                     '--eval_interval=100000', cwd=small)
    assert code == 0 and f'going on from out/ckpt.pt, iteration {stopped}' in printed, said
    assert load(small)['iter_num'] == stopped + 3


def test_a_second_interrupt_leaves_at_once(small):
    """The first one waits for the step, which here takes forever."""
    (small / 'stuck.py').write_text('''
import runpy, sys, time
import model
forward = model.GPT.forward
forwards = 0
def stuck(self, *args, **kwargs):
    global forwards
    forwards += self.training
    if forwards == 2:  # the first one is before the loop
        print('stuck', flush=True)
        end = time.time() + 60
        while time.time() < end:
            time.sleep(0.01)
    return forward(self, *args, **kwargs)
model.GPT.forward = stuck
sys.argv[0] = 'train.py'
runpy.run_path('train.py', run_name='__main__')
''')
    process = subprocess.Popen([sys.executable, 'stuck.py', *SMALL], cwd=small, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line == 'stuck\n':
            break
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    t0 = time.time()
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130 and time.time() - t0 < 5
    process.stdout.close()


def test_a_signal_to_one_rank_ends_both_after_the_same_iteration(small):
    soak.prepare(small)
    process = soak.start(small, '--max_iters=100000', '--eval_interval=100000', '--out_dir=out', python=soak.TORCHRUN)
    wait_for_iterations(small, process)
    os.kill(max(soak.children(process.pid)), signal.SIGTERM)
    assert process.wait(60) == 0
    printed = (small / 'printed').read_text()
    stopped = int(re.search(r'stopped by a signal before iteration (\d+)', printed)[1])
    assert load(small)['iter_num'] == stopped == soak.steps_of_this_start(small / 'out') + 1


DIES = """
import os, runpy, sys
import model
attempt = int(os.environ['TORCHELASTIC_RESTART_COUNT'])
death = int(os.environ['DEATHS'].split()[attempt])
configure, update, steps = model.GPT.configure_optimizers, model.GPT.update_balance, 0
def dies(self, load):  # rank 1 dies in that step
    global steps
    steps += 1
    if os.environ['RANK'] == '1' and steps == death:
        os._exit(7)
    update(self, load)
model.GPT.update_balance = dies
if death == 0:  # rank 0 dies before anything is renamed
    model.GPT.configure_optimizers = lambda *args: os._exit(7) if os.environ['RANK'] == '0' else configure(*args)
sys.argv[0] = 'train.py'
runpy.run_path('train.py', run_name='__main__')
"""


@pytest.mark.parametrize('rendezvous, deaths, renamed', [
    pytest.param('--standalone', '0 2 5 -1', ['out.old1', 'out.old2'], marks=pytest.mark.slow),
    ('--master_port=29653', '5 -1', ['out.old1'])])
def test_torchrun_starts_again_from_what_this_run_has_saved(small, rendezvous, deaths, renamed):
    """Over a finished run. An attempt that dies before it has renamed that, and one that dies before its first
    checkpoint, start from scratch again; one that dies in its fifth step goes on from the checkpoint before the fourth.
    """
    train(small)
    before = contents(small / 'out')
    (small / 'dies.py').write_text(DIES)
    code, printed = torchrun(small, '--max_iters=7', script='dies.py', DEATHS=deaths,
                             python=[rendezvous, f'--max-restarts={len(deaths.split()) - 1}'])
    assert code == 0, printed
    assert re.findall(r'^the earlier run in out is now in (\S+)$', printed, re.M) == renamed
    assert re.findall(r'^going on from (\S+), iteration (\d+) of 7$', printed, re.M) == [('out/ckpt.pt', '3')]
    assert contents(small / 'out.old1') == before and load(small)['iter_num'] == 7
    assert all(list(contents(small / out)) == LOG for out in renamed[1:])
    if rendezvous == '--standalone':
        code, printed = torchrun(small, '--max_iters=7', '--out_dir=whole')
        assert code == 0, printed
        assert_same(load(small), load(small, 'whole/ckpt.pt'))


@pytest.mark.skipif(not os.path.exists('/proc/self/fd'), reason='the files of open descriptors are read there')
@pytest.mark.parametrize('links', [True, False])
def test_what_gets_a_name_is_on_the_disk_before(tmp_path, monkeypatch, links):
    """The best one too, where the file system has no links and it is a copy."""
    events, fsync, replace = [], os.fsync, os.replace

    def synced(file):
        events.append('fsync ' + os.path.basename(os.readlink(f'/proc/self/fd/{file}')))
        fsync(file)

    def replaced(source, target):
        events.append('replace ' + os.path.basename(target))
        replace(source, target)

    if not links:
        monkeypatch.setattr('os.link', lambda *_: (_ for _ in ()).throw(OSError('no links here')))
    monkeypatch.setattr('os.fsync', synced)
    monkeypatch.setattr('os.replace', replaced)
    model.save_checkpoint({'step': 1}, tmp_path / 'ckpt.pt', tmp_path / 'ckpt_best.pt')
    assert events == ['fsync ckpt.pt.tmp'] + ['fsync ckpt_best.pt.tmp'] * (not links) + [
        'replace ckpt_best.pt', 'replace ckpt.pt', f'fsync {tmp_path.name}']


@pytest.mark.parametrize('links', [True, False])
def test_a_kill_between_the_two_names_leaves_the_best_one_alone(tmp_path, monkeypatch, links):
    """The temporary file was then a second name of ckpt_best.pt, and the next save wrote into it."""
    last, best = str(tmp_path / 'ckpt.pt'), str(tmp_path / 'ckpt_best.pt')
    replace = os.replace

    def killed(source, target):
        if target == last:
            raise KeyboardInterrupt  # as a kill would: nothing is cleaned up
        replace(source, target)

    if not links:
        monkeypatch.setattr('os.link', lambda *_: (_ for _ in ()).throw(OSError('no links here')))
    with monkeypatch.context() as patch:
        patch.setattr('os.replace', killed)
        with pytest.raises(KeyboardInterrupt):
            model.save_checkpoint({'step': 1}, last, best)
    assert torch.load(best)['step'] == 1 and not os.path.exists(last)
    model.save_checkpoint({'step': 2}, last)
    assert torch.load(best)['step'] == 1 and torch.load(last)['step'] == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ['ckpt.pt', 'ckpt_best.pt']


def test_a_full_disk_at_the_start_renames_nothing(small):
    """The kernel's limit on a file's size stands for the disk: nothing longer than 50 kB can be written."""
    train(small, '--max_iters=1')
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        untouched(small, message="out_dir='out' cannot be written: File too large")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_an_optimizer_from_another_device_is_used_as_this_one_can(small):
    """A checkpoint of an unfused AdamW, as MPS writes it, went on into an AssertionError at the first step."""
    train(small, '--max_iters=3')
    saved = load(small)
    for group in saved['optimizer']['param_groups']:
        group['fused'] = False
    torch.save(saved, small / 'out/ckpt.pt')
    train(small, RESUME)
    train(small, '--out_dir=whole')
    assert_same(load(small), load(small, 'whole/ckpt.pt'))


def test_without_a_compiler_the_micro_batch_is_tried_again(small, monkeypatch):
    """A fault that is not the compiler's was taken for one, and met again after an earlier run had been renamed."""
    train(small, '--max_iters=1')
    before = {p: p.read_bytes() for p in (small / 'out').iterdir()}
    monkeypatch.setattr(GPT, 'compile', lambda self: None)
    monkeypatch.setattr('model.swiglu', lambda *_: 1 / 0)
    code, printed, said = run_inside('train.py', *SMALL, '--compile=True', cwd=small)
    assert code == 1 and 'ZeroDivisionError' in said and 'going on without torch.compile' in printed
    assert {p: p.read_bytes() for p in (small / 'out').iterdir()} == before


def test_a_flag_that_does_not_fit_is_not_blamed_on_the_checkpoint(small):
    train(small, '--max_iters=1')
    assert train(small, RESUME, '--dropout=1.5', code=2).splitlines()[-1] == \
        'GPTConfig: dropout=1.5 must lie in [0, 1)'
