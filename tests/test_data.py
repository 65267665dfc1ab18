"""The prepare scripts, through the real tiktoken and datasets."""

import pickle

import numpy as np
from conftest import run

TEXT = ''.join(f'{i} green bottles, standing on the wall; and if {i} more should fall...\n' for i in range(400))


def tokens(path, dtype=np.uint16):
    return np.fromfile(path, dtype=dtype)


def test_pydocs_needs_no_network(clone):
    printed = run('data/pydocs_char/prepare.py', cwd=clone)
    meta = pickle.loads((clone / 'data/pydocs_char/meta.pkl').read_bytes())
    train, val = (tokens(clone / f'data/pydocs_char/{s}.bin') for s in ('train', 'val'))
    assert len(train) + len(val) > 300_000 and abs(len(train) / (len(train) + len(val)) - 0.9) < 1e-4
    assert 'different' in printed and 80 < meta['vocab_size'] < 200
    text = ''.join(meta['itos'][i] for i in train[:2000].tolist())
    assert 'statement' in text and max(train) < meta['vocab_size']
    assert not list((clone / 'data/pydocs_char').glob('*.tmp'))


def test_characters_of_a_local_text(clone, tmp_path):
    (tmp_path / 'in.txt').write_text(TEXT)
    run('data/shakespeare_char/prepare.py', f'--input={tmp_path}/in.txt', cwd=clone)
    meta = pickle.loads((clone / 'data/shakespeare_char/meta.pkl').read_bytes())
    assert set(meta) == {'vocab_size', 'itos', 'stoi'} and meta['vocab_size'] == len(set(TEXT))
    both = np.concatenate([tokens(clone / f'data/shakespeare_char/{s}.bin') for s in ('train', 'val')])
    assert ''.join(meta['itos'][i] for i in both.tolist()) == TEXT
    assert len(tokens(clone / 'data/shakespeare_char/train.bin')) == int(0.9 * len(TEXT))


def test_many_characters_are_written_as_uint32(clone, tmp_path):
    many = [chr(c) for c in range(1, 70_000) if not 0xD800 <= c < 0xE000 and c != 0x0D]
    (tmp_path / 'in.txt').write_text(''.join(many), encoding='utf-8')
    run('data/shakespeare_char/prepare.py', f'--input={tmp_path}/in.txt', cwd=clone)
    meta = pickle.loads((clone / 'data/shakespeare_char/meta.pkl').read_bytes())
    assert meta['dtype'] == 'uint32' and meta['vocab_size'] == len(many)
    ids = tokens(clone / 'data/shakespeare_char/train.bin', np.uint32)
    assert ids.tolist() == list(range(int(0.9 * len(many))))


def test_gpt2_tokens_of_a_local_text(clone, tmp_path, tiktoken_cache):
    import tiktoken  # noqa: F401  the real one, in the script too
    (tmp_path / 'in.txt').write_text(TEXT)
    run('data/shakespeare/prepare.py', f'--input={tmp_path}/in.txt', cwd=clone, TIKTOKEN_CACHE_DIR=tiktoken_cache)
    script = 'import tiktoken, numpy as np; e = tiktoken.get_encoding("gpt2"); ' \
             'print(e.decode(np.fromfile("data/shakespeare/train.bin", dtype=np.uint16).tolist()), end="")'
    assert run('-c', script, cwd=clone, TIKTOKEN_CACHE_DIR=tiktoken_cache) == TEXT[:int(0.9 * len(TEXT))]
    assert not (clone / 'data/shakespeare/meta.pkl').exists()


def test_openwebtext_on_local_documents(clone, tmp_path, tiktoken_cache):
    docs = tmp_path / 'docs'
    docs.mkdir()
    for i in range(30):
        (docs / f'{i:02}.txt').write_text(f'Document {i}.\n\n' + TEXT[100 * i:100 * i + 500])
    printed = run('data/openwebtext/prepare.py', f'--input={docs}', '--num_proc=2', cwd=clone, HF_HOME=tmp_path / 'hf',
                  HF_HUB_OFFLINE=1, TIKTOKEN_CACHE_DIR=tiktoken_cache)
    train, val = (tokens(clone / f'data/openwebtext/{s}.bin') for s in ('train', 'val'))
    assert (train == 50256).sum() == 29 and (val == 50256).sum() == 1
    assert train[-1] == val[-1] == 50256                            # each document is closed by it
    assert f'train: {len(train):,} tokens' in printed
    script = 'import tiktoken, numpy as np; e = tiktoken.get_encoding("gpt2"); ' \
             'print(e.decode(np.fromfile("data/openwebtext/train.bin", dtype=np.uint16).tolist()))'
    text = run('-c', script, cwd=clone, TIKTOKEN_CACHE_DIR=tiktoken_cache)
    assert sum(f'Document {i}.' in text for i in range(30)) == 29


def test_failures_say_what_to_do(clone, tmp_path):
    offline = dict(HTTPS_PROXY='http://127.0.0.1:9', https_proxy='http://127.0.0.1:9', HF_HOME=tmp_path / 'hf')
    printed = run('data/shakespeare_char/prepare.py', cwd=clone, ok=False, **offline)
    assert '--input=FILE' in printed and 'Traceback' not in printed
    printed = run('data/shakespeare/prepare.py', '--input=nowhere', cwd=clone, ok=False)
    assert 'no such text file' in printed and 'Traceback' not in printed
    (tmp_path / 'in.txt').write_text(TEXT)
    printed = run('data/shakespeare/prepare.py', f'--input={tmp_path}/in.txt', cwd=clone, ok=False,
                  TIKTOKEN_CACHE_DIR=tmp_path / 'none', **offline)
    assert 'TIKTOKEN_CACHE_DIR' in printed and 'Traceback' not in printed
    assert not list((clone / 'data').glob('*/*.bin')) and not list((clone / 'data').glob('*/*.tmp'))


def test_openwebtext_download_failure_says_what_to_do(clone, tmp_path, tiktoken_cache):
    printed = run('data/openwebtext/prepare.py', cwd=clone, ok=False, HF_HUB_OFFLINE=1, HF_HOME=tmp_path / 'hf',
                  TIKTOKEN_CACHE_DIR=tiktoken_cache)
    assert '--input=FOLDER' in printed and 'Traceback' not in printed
