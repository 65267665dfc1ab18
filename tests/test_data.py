"""The prepare scripts, through the real tiktoken, tokenizers and datasets, and a hub on this machine."""

import hashlib
import itertools
import math
import os
import pickle
import shutil
import signal
import subprocess
import sys
import zlib

import numpy as np
import pytest
import tokenizers
from conftest import SMALL, run, run_inside, run_outside, writer_to

TEXT = ''.join(f'{i} green bottles, standing on the wall; and if {i} more should fall...\n' for i in range(400))


def tokens(path, dtype=np.uint16):
    return np.fromfile(path, dtype=dtype)


def both(folder, dtype=np.uint16):
    return tuple(tokens(folder / f'{split}.bin', dtype).tolist() for split in ('train', 'val'))


def crc32_of(folder):
    return {f'{split}.bin': zlib.crc32((folder / f'{split}.bin').read_bytes()) for split in ('train', 'val')}


def meta_of(folder):
    return pickle.loads((folder / 'meta.pkl').read_bytes())


def fail(*args, cwd, **env):
    """Run a prepare script that must stop: the one line that it says. No bins are there, whole or half-written."""
    code, _, said = run_outside(*args, cwd=cwd, **env)
    assert code == 2 and 'Traceback' not in said, said
    assert not list((cwd / 'data').rglob('*.bin')) and not list((cwd / 'data').rglob('*.tmp'))
    assert said.count('\n') == 1 or 'documents' in said, said  # a progress bar may stand before
    return said


def test_pydocs_needs_no_network(clone):
    printed = run('data/pydocs_char/prepare.py', cwd=clone)
    meta = meta_of(clone / 'data/pydocs_char')
    train, val = (tokens(clone / f'data/pydocs_char/{s}.bin') for s in ('train', 'val'))
    assert len(train) + len(val) > 300_000 and abs(len(train) / (len(train) + len(val)) - 0.9) < 1e-4
    assert 'different' in printed and 80 < meta['vocab_size'] < 200
    text = ''.join(meta['itos'][i] for i in train[:2000].tolist())
    assert 'statement' in text and max(train) < meta['vocab_size']
    assert not list((clone / 'data/pydocs_char').glob('*.tmp'))


# your own text

def test_characters_of_a_local_text(clone, tmp_path):
    (tmp_path / 'mine.txt').write_text(TEXT)
    before = sorted((clone / 'data/shakespeare_char').iterdir())
    code, printed, _ = run_inside('data/shakespeare_char/prepare.py', f'--input={tmp_path}/mine.txt', cwd=clone)
    assert code == 0 and 'into data/mine.' in printed
    assert printed.endswith('python train.py config/demo.py --dataset=mine --out_dir=out-mine\n')
    assert sorted((clone / 'data/shakespeare_char').iterdir()) == before           # the bundled data set is not touched
    meta, (train, val) = meta_of(clone / 'data/mine'), both(clone / 'data/mine')
    assert set(meta) == {'vocab_size', 'itos', 'stoi', 'bytes_per_token', 'crc32'}
    assert meta['vocab_size'] == len(set(TEXT)) and meta['bytes_per_token'] == 1
    assert ''.join(meta['itos'][i] for i in train + val) == TEXT and len(train) == int(0.9 * len(TEXT))


def test_a_text_from_windows_is_the_text_that_scripts_read(clone, tmp_path):
    """Its mark and line ends are no characters of a data set, and no prompt or text for inside.py has them."""
    from extras import scripts
    (tmp_path / 'texts').mkdir()
    for name in 'ab':
        (tmp_path / f'texts/{name}.txt').write_bytes(('\ufeff' + TEXT[:200].replace('\n', '\r\n')).encode())
    assert run_inside('data/shakespeare_char/prepare.py', f'--input={tmp_path}/texts', cwd=clone)[0] == 0
    itos, ids = meta_of(clone / 'data/texts')['itos'], sum(both(clone / 'data/texts'), [])
    assert ''.join(itos[i] for i in ids) == '\n'.join(2 * [scripts.read_text(tmp_path / 'texts/a.txt')])


def test_many_characters_are_written_as_uint32(clone, tmp_path):
    many = [chr(c) for c in range(1, 70_000) if not 0xD800 <= c < 0xE000 and c != 0x0D]
    (tmp_path / 'in.txt').write_text(''.join(many), encoding='utf-8')
    run_inside('data/pydocs_char/prepare.py', f'--input={tmp_path}/in.txt', '--name=many', cwd=clone)
    meta = meta_of(clone / 'data/many')
    assert meta['dtype'] == 'uint32' and meta['vocab_size'] == len(many)
    assert both(clone / 'data/many', np.uint32)[0] == list(range(int(0.9 * len(many))))


def test_gpt2_tokens_of_a_local_text(clone, tmp_path, tiktoken_cache):
    import tiktoken  # noqa: F401  the real one, in the script too
    (tmp_path / 'in.txt').write_text(TEXT)
    run('data/shakespeare/prepare.py', f'--input={tmp_path}/in.txt', cwd=clone, TIKTOKEN_CACHE_DIR=tiktoken_cache)
    script = 'import tiktoken, numpy as np; e = tiktoken.get_encoding("gpt2"); ' \
             'print(e.decode(np.fromfile("data/in/train.bin", dtype=np.uint16).tolist()), end="")'
    assert run('-c', script, cwd=clone, TIKTOKEN_CACHE_DIR=tiktoken_cache) == TEXT[:int(0.9 * len(TEXT))]
    assert not (clone / 'data/in/meta.pkl').exists()


@pytest.mark.parametrize('glob, there', [(None, 'bc'), ('*.py', 'ad'), ('deep/*', 'cd'), ('[ab].*', 'ab')])
def test_which_files_of_a_folder(clone, tmp_path, glob, there):
    mine = tmp_path / 'my.notes'
    for name in ('a.py', 'b.txt', 'deep/c.md', 'deep/d.py', '.git/e.txt', '.git/f.py'):
        (mine / name).parent.mkdir(parents=True, exist_ok=True)
        (mine / name).write_text(50 * name.removeprefix('deep/').removeprefix('.git/')[0])
    flags = [f'--glob={glob}'] if glob else []
    assert run_inside('data/shakespeare_char/prepare.py', f'--input={mine}/', *flags, cwd=clone)[0] == 0
    assert set(meta_of(clone / 'data/my.notes')['stoi']) == {'\n', *there}         # a folder's name has no suffix


def test_what_is_there_already(clone, tmp_path, tiktoken_cache, monkeypatch):
    """Made again: replaced. Of another kind: refused, for what one kind leaves out would be the other's."""
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(tiktoken_cache))
    (tmp_path / 'mine.txt').write_text(TEXT)
    prepare = f'--input={tmp_path}/mine.txt', '--name=mine'
    assert run_inside('data/shakespeare_char/prepare.py', *prepare, cwd=clone)[0] == 0
    (tmp_path / 'mine.txt').write_text(TEXT[:1000])
    assert run_inside('data/shakespeare_char/prepare.py', *prepare, cwd=clone)[0] == 0
    assert sum(map(len, both(clone / 'data/mine'))) == 1000
    code, _, said = run_inside('data/shakespeare/prepare.py', *prepare, cwd=clone)
    assert code == 2 and 'holds characters' in said and (clone / 'data/mine/meta.pkl').exists()
    assert run_inside('data/shakespeare/prepare.py', prepare[0], '--name=bpe', cwd=clone)[0] == 0
    assert run_inside('data/pydocs_char/prepare.py', prepare[0], '--name=bpe', cwd=clone)[0] == 2


MISTAKES = {
    # flags, in the clone's folder: what the line says
    '--input=': 'empty', '--input=mine.txt --name=': 'empty', '--input=mine.txt --glob=': 'empty',
    '--input=nowhere': 'no such text file or folder', '--input=nowhere/': 'no such text file or folder',
    '--input=empty.txt': 'too few', '--input=latin1.txt': 'UTF-8', '--input=hollow': 'no .txt or .md files',
    '--input=hollow --glob=*.py': 'no *.py files', '--input=mine.txt --glob=*.py': 'needs a folder',
    '--glob=*.py': 'needs a folder', '--input=bad': 'UTF-8', '--input=dangling': 'No such file',
    '--input=shakespeare.txt': 'comes with this repository', '--input=mine.txt --name=arithmetic': 'comes with',
    '--input=mine.txt --name=openwebtext': 'comes with', '--name=pydocs_char': 'comes with',
    '--input=mine.txt --name=../mine': 'letters, digits', '--input=mine.txt --name=..': 'letters, digits',
    '--input=mine.txt --name=a/b': 'letters, digits', '--input=mine.txt --name=-x': 'letters, digits',
    '--input=mine.txt --name=.': 'letters, digits', '--input=my text.txt': '--name=NAME', '--input=/': 'letters, digit',
    '--input=mine.txt --name=dataset.py': 'no folder', '--input=mine.txt --nmae=x': 'unrecognized',
    '--input=mine.txt --tokenizer=': 'empty', '--input=mine.txt --tokenizer=nowhere': 'tokenizer.json',
    '--input=mine.txt --tokenizer=hollow': 'tokenizer.json', '--input=mine.txt --tokenizer=bad': 'tokenizer.json',
    '--input=mine.txt --vocab=256': '257..2**20', '--input=mine.txt --vocab=1e3': 'invalid int',
    '--vocab=300': '--name',
    '--input=mine.txt --tokenizer=hollow --vocab=300': 'one of the two', '--hub=a/b --vocab=0': '257..2**20',
    '--input': 'expected one argument', '--hub=': 'empty', '--hub=a/b --config=': 'empty', '--hub=/': 'letters, digits',
    '--hub=a/b --input=mine.txt': 'one of the two', '--hub=a/shakespeare': 'comes with', '--hub=a/b c': 'letters',
    '--hub=a/b --num_proc=0': 'must lie in', '--hub=a/b --num_proc=-1': 'must lie in', '--hub=a/b --num_proc=x': 'int',
    '--hub=a/b --tokenizer=hollow': 'tokenizer.json', '--hub=a/b --glob=*.py': 'needs a folder',
}


@pytest.fixture(scope='module')
def mistaken(tmp_path_factory):
    """A clone with files to make mistakes with."""
    from conftest import copy_project
    clone = copy_project(tmp_path_factory.mktemp('mistakes') / 'clone')
    for name in ('mine.txt', 'my text.txt', 'shakespeare.txt', 'bad/a.txt', 'bad/tokenizer.json'):
        (clone / name).parent.mkdir(exist_ok=True)
        (clone / name).write_text(TEXT)
    (clone / 'empty.txt').write_text('')
    (clone / 'latin1.txt').write_bytes(50 * 'é'.encode('latin-1'))
    (clone / 'bad/z.md').write_bytes(b'\xff\xfe' * 50)
    (clone / 'hollow').mkdir()
    (clone / 'dangling').mkdir()
    (clone / 'dangling/a.txt').symlink_to('nowhere')
    return clone


@pytest.mark.parametrize('flags', MISTAKES)
def test_mistakes(mistaken, flags):
    before = sorted(mistaken.rglob('*'))
    script = 'openwebtext' if 'hub' in flags else 'shakespeare' if 'tokenizer' in flags else 'shakespeare_char'
    flags = ['--' + flag.strip() for flag in flags.split('--')[1:]]
    message = MISTAKES[' '.join(flags)]
    code, _, err = run_inside(f'data/{script}/prepare.py', *flags, cwd=mistaken)
    assert code == 2 and message in err and err.count('\n') == 1 and 'Traceback' not in err, err
    assert [p for p in sorted(mistaken.rglob('*')) if '__pycache__' not in p.parts] == \
           [p for p in before if '__pycache__' not in p.parts]


def test_failures_say_what_to_do(clone, tmp_path):
    offline = dict(HTTPS_PROXY='http://127.0.0.1:9', https_proxy='http://127.0.0.1:9', HF_HOME=tmp_path / 'hf')
    (clone / 'data/shakespeare_char/input.txt').unlink(missing_ok=True)
    assert 'data/shakespeare_char/input.txt' in fail('data/shakespeare_char/prepare.py', cwd=clone, **offline)
    (tmp_path / 'in.txt').write_text(TEXT)
    said = fail('data/shakespeare/prepare.py', f'--input={tmp_path}/in.txt', cwd=clone,
                TIKTOKEN_CACHE_DIR=tmp_path / 'none', **offline)
    assert 'TIKTOKEN_CACHE_DIR' in said


def test_a_disk_that_is_full(clone, tmp_path):
    (tmp_path / 'in.txt').write_text(TEXT)
    command = f'ulimit -f 8; exec {sys.executable} data/shakespeare_char/prepare.py --input={tmp_path}/in.txt'
    done = subprocess.run(['bash', '-c', command], cwd=clone, capture_output=True, text=True)
    assert done.returncode == 2 and 'cannot be written' in done.stderr and 'Traceback' not in done.stderr
    assert not list((clone / 'data/in').iterdir())


@pytest.mark.parametrize('script, module', [('shakespeare_char', 'numpy'), ('openwebtext', 'tiktoken')])
def test_ctrl_c_during_imports(clone, tmp_path, script, module, tiktoken_cache):
    """The signal comes while the module is imported."""
    (tmp_path / 'docs').mkdir()
    for name in 'ab':
        (tmp_path / f'docs/{name}.txt').write_text(TEXT)
    (tmp_path / 'sitecustomize.py').write_text(f"""if True:
        import os, signal, sys

        class Interrupt:
            def find_spec(name, *_):
                if name == {module!r}:
                    os.kill(os.getpid(), signal.SIGINT)

        sys.meta_path.insert(0, Interrupt)
    """)
    done = subprocess.run([sys.executable, f'data/{script}/prepare.py', f'--input={tmp_path}/docs'], cwd=clone,
                          stderr=subprocess.PIPE, text=True, timeout=60,
                          env={**os.environ, 'TIKTOKEN_CACHE_DIR': str(tiktoken_cache), 'PYTHONPATH': str(tmp_path)})
    assert (done.returncode, done.stderr) == (130, 'interrupted\n')
    assert not list((clone / 'data').glob('docs/*'))


@pytest.mark.parametrize('number, code', [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_while_it_writes(clone, tmp_path, number, code, tiktoken_cache):
    """While it waits for a document, which is a pipe. As a terminal's Ctrl-C does, the signal reaches its worker, too.
    """
    (tmp_path / 'docs').mkdir()
    (tmp_path / 'docs/a.txt').write_text(TEXT)
    os.mkfifo(tmp_path / 'docs/b.txt')
    process = subprocess.Popen([sys.executable, 'data/openwebtext/prepare.py', f'--input={tmp_path}/docs',
                                '--num_proc=1'], cwd=clone, stderr=subprocess.PIPE, text=True, start_new_session=True,
                               env={**os.environ, 'TIKTOKEN_CACHE_DIR': str(tiktoken_cache)})
    with writer_to(tmp_path / 'docs/b.txt', process):
        assert {path.name for path in (clone / 'data/docs').iterdir()} == {'train.bin.tmp', 'val.bin.tmp'}
        os.killpg(process.pid, number)
    _, said = process.communicate(timeout=60)  # the pipe is closed: a read that began after the signal ends, too
    assert process.returncode == code and 'Traceback' not in said
    assert said.endswith('\ninterrupted\n') == (number == signal.SIGINT)  # after the progress bar
    assert not list((clone / 'data/docs').iterdir())


def test_workers_end_with_a_killed_preparation_and_the_next_begins_anew(clone, tmp_path, tiktoken_cache):
    (tmp_path / 'docs').mkdir()
    (tmp_path / 'docs/a.txt').write_text(TEXT)
    os.mkfifo(tmp_path / 'docs/b.txt')
    flags = 'data/openwebtext/prepare.py', f'--input={tmp_path}/docs', '--num_proc=2'
    process = subprocess.Popen([sys.executable, *flags], cwd=clone, stderr=subprocess.PIPE,
                               env={**os.environ, 'TIKTOKEN_CACHE_DIR': str(tiktoken_cache)})
    with writer_to(tmp_path / 'docs/b.txt', process):
        with open(f'/proc/{process.pid}/task/{process.pid}/children') as f:
            workers = f.read().split()
        process.kill()
        process.communicate(timeout=60)  # the workers have its standard error: they end, too
    assert workers and not [pid for pid in workers if os.path.exists(f'/proc/{pid}/exe')]
    (tmp_path / 'docs/b.txt').unlink()
    (tmp_path / 'docs/b.txt').write_text(TEXT)
    run(*flags, cwd=clone, TIKTOKEN_CACHE_DIR=tiktoken_cache)
    assert {path.name for path in (clone / 'data/docs').iterdir()} == {'train.bin', 'val.bin'}


def with_signal(number, step, *script, cwd):
    """Run a script in a copy of this process, which gets a signal before its fsync or rename of that number."""
    pid = os.fork()
    if pid == 0:
        operations = itertools.count()

        def counted(operation):
            def operate(*args, **kwargs):
                if next(operations) == step:
                    os.kill(os.getpid(), number)
                return operation(*args, **kwargs)
            return operate

        for name in ('fsync', 'replace'):
            setattr(os, name, counted(getattr(os, name)))
        os._exit(run_inside(*script, cwd=cwd)[0])
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.fixture
def again(clone, tmp_path, tiktoken_cache, monkeypatch):
    """A function of a script -> two commands that make a data set, what is there after each, and a function that tells
    what is there now: None if train.py refuses it, in a line that says what to do.
    """
    from extras import guard
    from model import Mistake, load_meta
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(tiktoken_cache))
    folder = clone / 'data/mine'

    def make(script):
        commands = [(f'data/{script}/prepare.py', f'--input={tmp_path}/{name}.txt', '--name=mine') for name in 'ab']

        def there():
            try:
                guard.check_files(str(folder), load_meta(folder / 'meta.pkl'), 8)
            except Mistake as e:
                assert 'prepare.py' in str(e)
                return None
            return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != '.tmp'}

        states = []
        for command in commands:
            code, _, said = run_inside(*command, cwd=clone)
            assert code == 0, said
            states.append(there())
        assert states[0] != states[1]
        return commands, states, there

    (tmp_path / 'a.txt').write_text(TEXT)
    (tmp_path / 'b.txt').write_text(TEXT[::-1] + 'Another end!')
    return make


@pytest.mark.parametrize('script', ['shakespeare_char', 'shakespeare'])
def test_kill_9_between_renames_mixes_no_data_sets(clone, again, script):
    """An old val.bin stood beside a new train.bin; or its kind was not known, and the next preparation refused."""
    (first, second), states, there = again(script)
    seen = []
    for step in itertools.count():
        assert run_inside(*first, cwd=clone)[0] == 0 and there() == states[0]
        code = with_signal(signal.SIGKILL, step, *second, cwd=clone)
        seen.append(there())
        assert seen[-1] in (*states, None)
        if code == 0:
            break
        assert code == -signal.SIGKILL
        code, _, said = run_inside(*second, cwd=clone)
        assert code == 0 and there() == states[1] and not list((clone / 'data/mine').glob('*.tmp')), said
    assert all(state in seen for state in (*states, None))


@pytest.mark.parametrize('number, code', [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_the_earlier_data_set_or_the_new_one(clone, again, number, code):
    (first, second), states, there = again('shakespeare_char')
    codes = []
    for step in range(9):
        assert run_inside(*first, cwd=clone)[0] == 0
        codes.append(with_signal(number, step, *second, cwd=clone))
        assert there() == states[codes[-1] == 0] and not list((clone / 'data/mine').glob('*.tmp'))
    assert set(codes) == {0, code}


def test_two_preparations_of_one_data_set(clone, tmp_path):
    import fcntl
    (tmp_path / 'in.txt').write_text(TEXT)
    (clone / 'data/in').mkdir()
    prepare = 'data/shakespeare_char/prepare.py', f'--input={tmp_path}/in.txt'
    descriptor = os.open(clone / 'data/in', os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    code, _, said = run_inside(*prepare, cwd=clone)
    os.close(descriptor)
    assert (code, said) == (2, 'another prepare.py is writing to data/in: wait for its end\n')
    assert run_inside(*prepare, cwd=clone)[0] == 0


@pytest.mark.parametrize('change', ['cut at a whole token', 'a bit', "another data set's"])
def test_files_that_are_not_as_they_were_written(again, clone, change):
    """They pass only without meta.pkl, as nanoGPT's sets of GPT-2 tokens, or with nanoGPT's own meta.pkl."""
    _, states, there = again('shakespeare_char')
    folder, val = clone / 'data/mine', states[1]['val.bin']
    (folder / 'val.bin').write_bytes({'cut at a whole token': val[:-2], 'a bit': bytes([val[0] ^ 1]) + val[1:],
                                      "another data set's": states[0]['val.bin']}[change])
    assert there() is None
    meta = meta_of(folder)
    (folder / 'meta.pkl').write_bytes(pickle.dumps({key: meta[key] for key in ('vocab_size', 'itos', 'stoi')}))
    assert there() is not None
    (folder / 'meta.pkl').unlink()
    assert there() is not None


# tokens of a tokenizer.json

def make_tokenizer(folder, size=300, begin='<s>', add_bos_token=True):
    """A byte-level BPE with <s> and </s>, saved as Hugging Face does; the one that is really loaded comes back."""
    import json

    import tokenizers
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=size, special_tokens=[begin, '</s>'], show_progress=False,
                                             initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator([TEXT], trainer)
    folder.mkdir()
    bpe.save(str(folder / 'tokenizer.json'))
    settings = {'bos_token': begin, 'eos_token': '</s>', 'add_bos_token': add_bos_token}
    (folder / 'tokenizer_config.json').write_text(json.dumps(settings))
    from extras import tokenizer
    return tokenizer.from_folder(folder)


def test_each_file_becomes_a_document_of_an_imported_tokenizer(clone, tmp_path):
    bpe = make_tokenizer(tmp_path / 'bpe')
    (tmp_path / 'docs').mkdir()
    texts = [f'Document {i}. ' + TEXT[100 * i:105 * i + 100] for i in range(10)]
    for i, text in enumerate(texts):
        (tmp_path / f'docs/{i}.txt').write_text(text)
    (tmp_path / 'docs/3a.txt').touch()                                      # an empty file is no document
    whole = [[*bpe.begin, *bpe.encode(text), bpe.end] for text in texts]
    expected, border = sum(whole, []), int(0.9 * sum(map(len, texts))) - sum(map(len, texts[:9]))
    assert 0 < border < len(texts[9])                                       # the last document is cut
    assert len(bpe.begin) == 1 and bpe.end is not None
    code, printed, _ = run_inside('data/shakespeare/prepare.py', f'--input={tmp_path}/docs',
                                  f'--tokenizer={tmp_path}/bpe', cwd=clone)
    train, val = both(clone / 'data/docs')
    assert code == 0 and train == sum(whole[:9], []) + bpe.begin + bpe.encode(texts[9][:border])
    assert val == [*bpe.encode(texts[9][border:]), bpe.end]
    assert meta_of(clone / 'data/docs') == {
        'vocab_size': bpe.vocab_size, 'tokenizer': bpe.sha256, 'crc32': crc32_of(clone / 'data/docs'),
        'bytes_per_token': len(texts[9][border:]) / len(val)}
    assert printed.endswith('train.py config/demo.py --dataset=docs --out_dir=out-docs\n')  # the folder has no weights
    (tmp_path / 'bpe/config.json').write_text('{}')                         # now it has
    code, printed, _ = run_inside('data/shakespeare/prepare.py', f'--input={tmp_path}/docs',
                                  f'--tokenizer={tmp_path}/bpe', cwd=clone)
    assert printed.endswith(f'python train.py --init_from={tmp_path}/bpe --dataset=docs --out_dir=out-docs\n')

    run('data/openwebtext/prepare.py', f'--input={tmp_path}/docs', f'--tokenizer={tmp_path}/bpe', '--name=web',
        '--num_proc=1', cwd=clone)
    train, val = both(clone / 'data/web')
    assert sorted(train + val) == sorted(expected) and val.count(bpe.end) == 1 and train.count(bpe.end) == 9
    held_out = next(text for text, ids in zip(texts, whole) if ids == val)
    assert meta_of(clone / 'data/web') == {
        'vocab_size': bpe.vocab_size, 'tokenizer': bpe.sha256, 'crc32': crc32_of(clone / 'data/web'),
        'bytes_per_token': len(held_out) / len(val)}


# a tokenizer of the data's own

LATE = 'é東\U0001f600 zqzqzq ' * 30


def test_a_bpe_is_trained_on_the_training_text(clone, tmp_path):
    """Every script writes the tokens of a text's own tokenizer; what is in the validation text alone has no token."""
    text = TEXT[:20 * len(LATE)] + LATE                              # LATE lies in the last tenth
    (tmp_path / 'in.txt').write_text(text)
    border = int(0.9 * len(text))
    for script, size in (('pydocs_char', 300), ('shakespeare', 99999)):
        args = f'data/{script}/prepare.py', f'--input={tmp_path}/in.txt', f'--vocab={size}', '--name=mine'
        if size != 300:  # a run may need the other tokens
            def files():
                return {path.name: path.read_bytes() for path in (clone / 'data/mine').iterdir()}

            before = files()
            code, _, said = run_inside(*args, cwd=clone)
            assert code == 2 and 'data/mine is in 300 other tokens, which a run may need: say another --name' in said
            assert files() == before
            os.remove(clone / 'data/mine/tokenizer.json')
        code, printed, said = run_inside(*args, cwd=clone)
        from extras import tokenizer
        bpe = tokenizer.from_folder(clone / 'data/mine')
        assert code == 0 and f'a tokenizer of {bpe.vocab_size} tokens' in printed, said
        assert (bpe.vocab_size == size) == (size == 300) == ('no more merges' not in printed)
        train, val = both(clone / 'data/mine')
        assert train == bpe.encode(text[:border]) and val == [*bpe.encode(text[border:]), bpe.end]
        assert bpe.decode(train + val[:-1]) == text and len(train) < border / 2
        meta = meta_of(clone / 'data/mine')
        assert meta['tokenizer'] == bpe.sha256 and meta['bytes_per_token'] == len(text[border:].encode()) / len(val)
        assert len(bpe.encode('zqzqzq')) == 6 and len(bpe.encode(' bottles')) < 5


def test_a_bpe_of_a_corpus_is_trained_on_its_documents_for_training(clone, tmp_path, monkeypatch):
    (tmp_path / 'docs').mkdir()
    for i in range(12):
        (tmp_path / f'docs/{i:02}.txt').write_text(TEXT[300 * i:300 * i + 300] + f' {chr(97 + i) * 8}' * 9)
    run('data/openwebtext/prepare.py', f'--input={tmp_path}/docs', '--vocab=400', '--name=web', '--num_proc=1',
        cwd=clone)
    from extras import tokenizer
    bpe, meta = tokenizer.from_folder(clone / 'data/web'), meta_of(clone / 'data/web')
    train, val = both(clone / 'data/web')
    held_out = bpe.decode(val)
    letter = held_out[-1]                                            # no other document repeats it
    assert len(bpe.encode(' ' + letter * 8)) > len(bpe.encode(' ' + ('a' if letter != 'a' else 'b') * 8))
    assert val[-1] == train[-1] == bpe.end and train.count(bpe.end) == 11
    assert meta['vocab_size'] == 400 and meta['bytes_per_token'] == len(held_out) / len(val)


def test_a_special_token_written_in_a_corpus_is_words(clone, tmp_path):
    """'a </s> b' was cut in two by an end of text. In a prompt it is the token, as for GPT-2's tokenizer."""
    bpe = make_tokenizer(tmp_path / 'bpe')
    text = 'About <s> and </s> in ' + TEXT[:200]
    (tmp_path / 'in.txt').write_text(text)
    code, *said = run_inside('data/shakespeare/prepare.py', f'--input={tmp_path}/in.txt', f'--tokenizer={tmp_path}/bpe',
                             '--name=mine', cwd=clone)
    assert code == 0, said
    ids = sum(both(clone / 'data/mine'), [])
    assert ids.count(bpe.end) == 1 and ids[-1] == bpe.end and ids.count(bpe.begin[0]) == 1
    assert bpe.decode(ids) == text
    assert bpe.encode(text).count(bpe.end) == 1


@pytest.mark.parametrize('kind', ['unigram', 'words', 'added'])
def test_a_vocabulary_that_holds_its_special_token_as_a_word(clone, tmp_path, kind):
    """Whatever switches special tokens off, the word is found: one line, and no data set is cut by it."""
    words = ['<unk>', '</s>', *' About<s>and/in\n', 'a', 'b']
    if kind == 'unigram':
        made = tokenizers.Tokenizer(tokenizers.models.Unigram([(word, -3.0) for word in dict.fromkeys(words)], 0))
    else:
        made = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(dict.fromkeys(words))},
                                                                '<unk>'))
        made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    made.add_tokens([tokenizers.AddedToken('</s>', special=kind != 'added')])
    (tmp_path / 'made').mkdir()
    made.save(str(tmp_path / 'made/tokenizer.json'))
    (tmp_path / 'made/tokenizer_config.json').write_text('{"eos_token": "</s>"}')
    (tmp_path / 'in.txt').write_text('a b </s> b a ' * 50)
    code, _, said = run_inside('data/shakespeare/prepare.py', f'--input={tmp_path}/in.txt',
                               f'--tokenizer={tmp_path}/made', '--name=mine', cwd=clone)
    assert code == 2 and "takes the letters '</s>' of the text for its special token" in said.splitlines()[-1], said
    assert not list(clone.glob('data/mine/*.bin'))


def test_data_keep_the_tokenizer_that_they_were_made_with(clone, tmp_path):
    """Also if they are made again with another one, or with their own."""
    (tmp_path / 'in.txt').write_text(TEXT)
    make_tokenizer(tmp_path / 'small', size=280)
    make_tokenizer(tmp_path / 'large', size=300)
    for folder in (tmp_path / 'large', tmp_path / 'small', 'data/mine'):
        code, _, said = run_inside('data/shakespeare/prepare.py', f'--input={tmp_path}/in.txt', '--name=mine',
                                   f'--tokenizer={folder}', cwd=clone)
        kept = (clone / 'data/mine/tokenizer.json').read_bytes()
        assert code == 0 and meta_of(clone / 'data/mine')['tokenizer'] == hashlib.sha256(kept).hexdigest(), said


def test_data_made_again_keep_nothing_of_the_earlier_tokenizer(clone, tmp_path, tiktoken_cache, monkeypatch):
    """An old tokenizer.json would travel to the checkpoint, and sample.py would print garbage."""
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(tiktoken_cache))
    (tmp_path / 'in.txt').write_text(TEXT)
    make_tokenizer(tmp_path / 'small', size=280)
    make_tokenizer(tmp_path / 'plain', size=300)
    (tmp_path / 'plain/tokenizer_config.json').unlink()
    for name, kept in (('small', {'tokenizer.json', 'tokenizer_config.json', 'meta.pkl'}),
                       ('plain', {'tokenizer.json', 'meta.pkl'}), (None, set())):
        flags = [f'--tokenizer={tmp_path}/{name}'] if name else []
        if not name:                                                        # another kind: first remove, as it says
            (clone / 'data/mine/train.bin').unlink()
        code, _, said = run_inside('data/shakespeare/prepare.py', f'--input={tmp_path}/in.txt', '--name=mine', *flags,
                                   cwd=clone)
        names = {path.name for path in (clone / 'data/mine').iterdir()}
        assert code == 0 and names == {'train.bin', 'val.bin', *kept}, said


def test_a_tokenizer_that_is_not_the_datas_is_refused_by_every_script(clone, tmp_path):
    (tmp_path / 'in.txt').write_text(TEXT)
    make_tokenizer(tmp_path / 'right', size=280)
    make_tokenizer(tmp_path / 'wrong', size=270)
    prepare = f'--input={tmp_path}/in.txt', f'--tokenizer={tmp_path}/right', '--name=mine'
    assert run_inside('data/shakespeare/prepare.py', *prepare, cwd=clone)[0] == 0
    flags = [flag for flag in SMALL if 'dataset' not in flag] + ['--dataset=mine', '--max_iters=1', '--eval_iters=1']
    assert run_inside('train.py', *flags, cwd=clone)[0] == 0

    def use(name):
        for folder in (clone / 'data/mine', clone / 'out'):
            shutil.copy(tmp_path / name / 'tokenizer.json', folder / 'tokenizer.json')

    (clone / 'text.txt').write_text(TEXT)
    scripts = [('train.py', *flags, '--out_dir=out2'),
               ('sample.py', '--device=cpu', '--num_samples=1', '--max_new_tokens=2', '--start=The'),
               ('inside.py', '--out_dir=out', '--text=text.txt', '--device=cpu', '--count_tokens=100'),
               ('convert.py', 'export', '--out_dir=out', '--hf_dir=hf'),
               ('grpo.py', '--init_from=out', '--out_dir=out3', '--device=cpu')]
    use('wrong')
    for script in scripts:
        code, _, said = run_inside(*script, cwd=clone)
        assert code == 2 and 'has other tokens than' in said and said.count('\n') == 1, (script, said)
    use('right')
    for script in scripts[:4]:
        code, _, said = run_inside(*script, cwd=clone)
        assert code == 0, (script, said)
    (clone / 'out/tokenizer.json').unlink()
    assert 'has other tokens than out/tokenizer.json' in run_inside(*scripts[1], cwd=clone)[2]


def test_a_large_tokenizer_is_written_as_uint32(clone, tmp_path):
    import json
    make_tokenizer(tmp_path / 'bpe')
    table = json.loads((tmp_path / 'bpe/tokenizer.json').read_text())
    table['model']['vocab'].update({f'filler{i}': len(table['model']['vocab']) + i for i in range(66_000)})
    last = len(table['model']['vocab'])
    table['added_tokens'].append({**table['added_tokens'][-1], 'id': last, 'content': '<end>'})
    table['model']['vocab']['<end>'] = last
    (tmp_path / 'bpe/tokenizer.json').write_text(json.dumps(table))
    (tmp_path / 'bpe/tokenizer_config.json').write_text(json.dumps({'eos_token': '<end>'}))
    for name in 'ab':
        (tmp_path / f'docs/{name}.txt').parent.mkdir(exist_ok=True)
        (tmp_path / f'docs/{name}.txt').write_text(TEXT[:500])
    for script in ('shakespeare', 'openwebtext'):
        run(f'data/{script}/prepare.py', f'--input={tmp_path}/docs', f'--tokenizer={tmp_path}/bpe',
            f'--name={script[:3]}', cwd=clone)
        meta, (train, val) = meta_of(clone / f'data/{script[:3]}'), both(clone / f'data/{script[:3]}', np.uint32)
        assert meta['dtype'] == 'uint32' and meta['vocab_size'] == last + 1 and len(meta['tokenizer']) == 64
        assert (train + val).count(last) == 2 and val[-1] == last


def test_a_text_without_tokens_in_a_worker_process(clone, tmp_path):
    """The worker's Mistake comes back as one."""
    import tokenizers
    (tmp_path / 'words').mkdir()
    (tmp_path / 'docs').mkdir()
    tokenizers.Tokenizer(tokenizers.models.WordLevel({'cat': 0})).save(str(tmp_path / 'words/tokenizer.json'))
    for name, text in (('a', 'cat'), ('b', 'dog')):
        (tmp_path / f'docs/{name}.txt').write_text(text)
    said = fail('data/openwebtext/prepare.py', f'--input={tmp_path}/docs', f'--tokenizer={tmp_path}/words', cwd=clone)
    assert "does not know all of 'dog'" in said and not list((clone / 'data/docs').iterdir())


# corpora of documents

DOCUMENTS = [f'Document {i}.\n\nIt says {i * i} in words.' for i in range(4500)]


def put(path, texts, **columns):
    """A parquet file of documents."""
    import pyarrow
    import pyarrow.parquet
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table({'text': texts, **columns}), path, row_group_size=500)


def gpt2(texts):
    from extras import tokenizer
    bpe = tokenizer.gpt2()
    return [i for text in texts for i in bpe.encode(text) + [50256]]


@pytest.fixture
def hub(tmp_path, tiktoken_cache, monkeypatch):
    from hub import Hub
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(tiktoken_cache))
    monkeypatch.setenv('HF_HOME', str(tmp_path / 'hf'))
    with Hub(tmp_path / 'hub') as hub:
        monkeypatch.setenv('HF_ENDPOINT', hub.endpoint)
        yield hub


def script_of(hub, name='Skylion007/openwebtext'):
    """A corpus whose main branch is a loading script, as OpenWebText's was; its conversion's folder."""
    main = hub.folder / name / 'main'
    main.mkdir(parents=True)
    (main / f'{main.parent.name}.py').write_text('raise SystemExit("a script runs")')
    (main / 'README.md').write_text('---\nlicense: cc0-1.0\n---\n')
    return hub.folder / name / 'refs/convert/parquet'


def test_openwebtext_on_local_documents(clone, tmp_path, tiktoken_cache):
    docs = tmp_path / 'docs'
    docs.mkdir()
    for i in range(30):
        (docs / f'{i:02}.txt').write_text(f'Document {i}.\n\n' + TEXT[100 * i:100 * i + 500])
    printed = run('data/openwebtext/prepare.py', f'--input={docs}', '--num_proc=2', cwd=clone, HF_HOME=tmp_path / 'hf',
                  HF_HUB_OFFLINE=1, TIKTOKEN_CACHE_DIR=tiktoken_cache)
    train, val = both(clone / 'data/docs')
    assert train.count(50256) == 29 and val.count(50256) == 1
    assert train[-1] == val[-1] == 50256                            # each document is closed by it
    assert f'train: {len(train):,} tokens' in printed and '--dataset=docs' in printed
    script = 'import tiktoken, numpy as np; e = tiktoken.get_encoding("gpt2"); ' \
             'print(e.decode(np.fromfile("data/docs/train.bin", dtype=np.uint16).tolist()))'
    text = run('-c', script, cwd=clone, TIKTOKEN_CACHE_DIR=tiktoken_cache)
    assert sum(f'Document {i}.' in text for i in range(30)) == 29


def test_a_script_on_the_hub_is_read_from_its_conversion(clone, hub):
    """datasets runs no scripts; the hub keeps their rows as parquet. In order, every 2000th for validation."""
    conversion = script_of(hub)
    for i in range(2):
        put(conversion / f'plain_text/train/000{i}.parquet', DOCUMENTS[i * 2500:i * 2500 + 2500])
    printed = run('data/openwebtext/prepare.py', '--num_proc=2', cwd=clone)
    assert 'a script runs' not in printed
    assert 'python train.py config/train_deepseek.py --dataset=openwebtext' in printed
    train, val = both(clone / 'data/openwebtext')
    assert val == gpt2(DOCUMENTS[::2000])
    assert train == gpt2(text for i, text in enumerate(DOCUMENTS) if i % 2000)
    asked = '\n'.join(hub.asked)                          # the owner's files are tried first, for they are whole
    assert asked.index('resolve/main') < asked.index('refs/convert/parquet')


def test_the_first_part_of_a_corpus_is_not_taken_for_the_whole(clone, hub):
    put(script_of(hub) / 'plain_text/partial-train/0000.parquet', DOCUMENTS)
    said = fail('data/openwebtext/prepare.py', cwd=clone)
    assert 'only the first part' in said and '--hub=HuggingFaceFW/fineweb-edu' in said


def test_nanogpts_split_where_the_number_is_known(clone, hub):
    import datasets
    main = hub.folder / 'Skylion007/openwebtext/main'
    for i in range(3):
        put(main / f'data/train-0000{i}-of-00003.parquet', DOCUMENTS[i * 1500:i * 1500 + 1500])
    (main / 'README.md').write_text('---\ndataset_info:\n  features:\n  - name: text\n    dtype: string\n  splits:\n'
                                    f'  - name: train\n    num_bytes: 1\n    num_examples: {len(DOCUMENTS)}\n---\n')
    run('data/openwebtext/prepare.py', '--num_proc=1', cwd=clone)
    split = datasets.Dataset.from_dict({'text': DOCUMENTS}).train_test_split(test_size=0.0005, seed=2357, shuffle=True)
    chosen = set(split['test']['text'])
    train, val = both(clone / 'data/openwebtext')
    assert val == gpt2(text for text in DOCUMENTS if text in chosen) and len(chosen) == math.ceil(4500 / 2000)
    assert train == gpt2(text for text in DOCUMENTS if text not in chosen)


@pytest.fixture
def fineweb(hub):
    """Laid out as HuggingFaceFW/fineweb-edu is: several configurations by its README, other columns, an empty row."""
    main = hub.folder / 'HuggingFaceFW/fineweb-edu/main'
    put(main / 'data/CC/000_00000.parquet', ['another configuration'] * 10)
    for i in range(2):
        rows = DOCUMENTS[i * 1500:i * 1500 + 1500] + ['', None]
        put(main / f'sample/10BT/00{i}_00000.parquet', rows, id=list(range(len(rows))), body=rows)
    configs = ''.join(f'- config_name: {name}\n  data_files:\n  - split: train\n    path: {path}\n'
                      for name, path in (('default', 'data/*/*'), ('sample-10BT', 'sample/10BT/*')))
    (main / 'README.md').write_text(f'---\nlicense: odc-by\nconfigs:\n{configs}---\n')
    return main


FINEWEB = 'data/openwebtext/prepare.py', '--hub=HuggingFaceFW/fineweb-edu', '--config=sample-10BT'


def test_another_corpus_of_the_hub(clone, fineweb):
    printed = run(*FINEWEB, '--column=body', '--num_proc=2', cwd=clone)
    train, val = both(clone / 'data/fineweb-edu')
    assert 'python train.py config/train_deepseek.py --dataset=fineweb-edu' in printed
    assert len(train) + len(val) == len(gpt2(DOCUMENTS[:3000])) and val[:5] == gpt2(DOCUMENTS)[:5]


@pytest.mark.parametrize('flags, message', [
    (['--column=words'], "no column 'words', but text, id, body"), (['--config=sample-9BT'], 'sample-10BT'),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in (
        (['--column=id'], 'is no text'), (['--split=test'], 'Bad split'), (['--hub=.'], 'Other ways'),
        (['--hub=HuggingFaceFW/nothing'], "doesn't exist"))),
])
def test_mistakes_with_the_hub(clone, fineweb, flags, message):
    assert message in fail(*FINEWEB, *flags, cwd=clone)


def test_a_corpus_that_breaks_off_leaves_nothing(clone, fineweb):
    second = fineweb / 'sample/10BT/001_00000.parquet'
    second.write_bytes(second.read_bytes()[:2000])
    said = fail(*FINEWEB, cwd=clone)
    assert 'cannot be read' in said and not list((clone / 'data/fineweb-edu').iterdir())


def test_a_folder_of_parquet_files_stands_for_the_hub(clone, tmp_path, tiktoken_cache):
    put(tmp_path / 'corpus/train/0000.parquet', DOCUMENTS[:50])
    run('data/openwebtext/prepare.py', f'--hub={tmp_path}/corpus', '--num_proc=1', cwd=clone, HF_HUB_OFFLINE=1,
        HF_HOME=tmp_path / 'hf', TIKTOKEN_CACHE_DIR=tiktoken_cache)
    assert both(clone / 'data/corpus') == (gpt2(DOCUMENTS[1:50]), gpt2(DOCUMENTS[:1]))
    put(tmp_path / 'one/train/0000.parquet', DOCUMENTS[:1])
    (clone / 'data/corpus/train.bin').unlink()
    (clone / 'data/corpus/val.bin').unlink()
    said = fail('data/openwebtext/prepare.py', f'--hub={tmp_path}/one', cwd=clone, HF_HUB_OFFLINE=1,
                HF_HOME=tmp_path / 'hf', TIKTOKEN_CACHE_DIR=tiktoken_cache)
    assert 'too little text' in said


def test_openwebtext_without_a_network_says_what_to_do(clone, tmp_path, tiktoken_cache):
    said = fail('data/openwebtext/prepare.py', cwd=clone, HF_HUB_OFFLINE=1, HF_HOME=tmp_path / 'hf',
                TIKTOKEN_CACHE_DIR=tiktoken_cache)
    assert '--input=FOLDER' in said and '--hub=FOLDER' in said


# what train.py reads

def test_checking_the_tokens_keeps_no_memory(tmp_path, monkeypatch):
    """Of each page that a process has read through a mapping it is said to hold 4 KiB; ranks share the work."""
    from extras import guard
    with open(tmp_path / 'train.bin', 'wb') as f:
        f.truncate(200_000_000)                                             # zeros, but for two
        f.seek(70_000_000)
        f.write(b'\7\0')
        f.seek(200_000_000 - 2)
        f.write(b'\5\0')
    data = np.memmap(tmp_path / 'train.bin', dtype=np.uint16, mode='r')

    def resident():
        with open('/proc/self/statm') as f:
            return int(f.read().split()[1]) * os.sysconf('SC_PAGE_SIZE')

    before = resident()
    assert guard.largest_token(data) == 7
    assert resident() - before < 20e6
    monkeypatch.setenv('WORLD_SIZE', '4')
    tops = []
    for rank in range(4):
        monkeypatch.setenv('RANK', str(rank))
        tops.append(guard.largest_token(data))
    assert sorted(tops) == [0, 0, 5, 7]
    assert data.max() == 7 and resident() - before > 150e6                  # which the test can see
