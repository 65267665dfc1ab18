"""sample.py, and which tokenizer a checkpoint speaks."""

import dataclasses
import io
import json
import math
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys

import pytest
import tokenizers
import torch
from conftest import ROOT, run_inside, tiny_model
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer

import convert
from extras import scripts, tokenizer
from extras.decode import Decoder
from model import Mistake

FEW = ['--device=cpu', '--dtype=float32', '--num_samples=1', '--max_new_tokens=20', '--temperature=0', '--start=1+2']
CHARS = {chr(i): i for i in range(61)}


def write_checkpoint(folder, stoi=CHARS, **overrides):
    model = tiny_model(**{'num_nextn_predict_layers': 1, 'mtp_n_layer': 1, **overrides})
    folder.mkdir()
    torch.save({'model': model.state_dict(), 'optimizer': None, 'model_args': dataclasses.asdict(model.config),
                'iter_num': 7, 'best_val_loss': 1.5, 'config': {'dataset': 'letters'},
                'meta': {'stoi': stoi, 'itos': dict(enumerate(stoi))} if stoi else {}}, folder / 'ckpt.pt')


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    """Checkpoints of 61 characters, without MTP modules, of many tokens and of nanoGPT; and an export of the first."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp('made')
    write_checkpoint(folder / 'out')
    write_checkpoint(folder / 'plain', num_nextn_predict_layers=0)
    write_checkpoint(folder / 'many', stoi={}, num_nextn_predict_layers=0, vocab_size=60000)
    convert.export_folder(str(folder / 'out'), str(folder / 'hf'))
    (folder / 'nanogpt').mkdir()
    torch.save({'model': {f'transformer.{name}.weight': torch.zeros(4, 8) for name in ('wte', 'wpe')},
                'model_args': dict(n_layer=1, n_head=1, n_embd=8, block_size=4, bias=False, vocab_size=4, dropout=0.0),
                'optimizer': {}, 'iter_num': 5, 'best_val_loss': 3.0, 'config': {}}, folder / 'nanogpt/ckpt.pt')
    (folder / 'prompt.txt').write_text('1+2')
    return folder


@pytest.fixture
def here(made, tmp_path):
    return shutil.copytree(made, tmp_path / 'here')


def ends(cwd, script, *args):
    """The one line that a script ends with; it leaves the folder as it was."""
    before = sorted(cwd.rglob('*'))
    code, _, said = run_inside(str(ROOT / script), *args, cwd=cwd)
    assert code == 2 and said.count('\n') == 1, said
    assert sorted(cwd.rglob('*')) == before
    return said


def text(cwd, *args):
    code, out, err = run_inside(str(ROOT / 'sample.py'), *FEW, *args, cwd=cwd)
    assert code == 0, err
    lines = out.splitlines(keepends=True)
    start = max(i for i, line in enumerate(lines) if line.startswith('Overriding')) + 1
    return ''.join(lines[start:lines.index('---------------\n', start)])[:-1]


def test_a_terminal_gets_no_control_characters(made):
    """A model's vocabulary may have them: ESC ]52 writes to the clipboard, and a form feed clears. A pipe gets all."""
    flags = '--out_dir=out', '--max_new_tokens=28', '--temperature=9'
    raw = text(made, *flags)
    unsafe = [ch for ch in raw if ch < ' ' and ch not in '\n\t']
    assert len(unsafe) > 3
    reader, terminal = pty.openpty()
    done = subprocess.run([sys.executable, ROOT / 'sample.py', *FEW, *flags], cwd=made, stdout=terminal)
    printed = os.read(reader, 1 << 16).decode().replace('\r\n', '\n')
    os.close(reader)
    os.close(terminal)
    shown = re.sub(r'[\x00-\x08\x0b-\x1f]', lambda found: f'U+{ord(found[0]):04X}', raw)
    assert done.returncode == 0 and shown in printed and not set(unsafe) & set(printed)
    assert 'noU+001B[2Jne/ckpt.pt is missing' in ends(made, 'sample.py', '--out_dir=no\x1b[2Jne')


# -----------------------------------------------------------------------------
# ways of decoding

def test_every_way_of_decoding_gives_the_same_text(made, monkeypatch):
    """Greedy; and says how fast it was, how the drafts did, and how long it compiled."""
    plain = text(made)
    asked = []
    monkeypatch.setattr(torch, 'compile', lambda f, **kwargs: asked.append(kwargs) or f)
    for flags, compiled in (((), False), (('--speculative=True',), False), (('--compile=True',), True),
                            (('--compile_from=20',), True), (('--compile_from=21',), False)):
        asked.clear()
        code, out, err = run_inside(str(ROOT / 'sample.py'), *FEW, '--num_samples=2', *flags, cwd=made)
        assert code == 0 and out.count(plain + '\n---------------\n') == 2, err
        said = out.splitlines()
        assert bool(asked) == compiled == any(re.fullmatch(r'compiled in \d+\.\d s', line) for line in said)
        if '--speculative=True' in flags:
            drafts = said.pop()
            assert re.fullmatch(r'accepted drafts: module 1 \d+%; [12]\.\d\d tokens per sample and pass', drafts)
        assert re.fullmatch(r'40 tokens in \d+\.\d\d s: \d+\.\d tokens/s; out, iteration \d+', said[-1])


def test_samples_one_by_one_as_they_come(made, monkeypatch):
    """--stream=True, and one sample: the text of the batch, in many pieces."""
    flags = '--max_new_tokens=40', '--num_samples=2'                 # the context has 32 tokens
    whole, written = [], []
    monkeypatch.setattr(scripts, 'for_output', lambda text: written.append(text) or text)
    for more in ((), ('--stream=True',), ('--stream=True', '--speculative=True'), ('--num_samples=1',)):
        written.clear()
        whole.append(text(made, *flags, *more))
        assert (len(written) == 2) == (not more) and (more == () or len(written) > 15)
    assert len(set(whole)) == 1 and len(whole[0]) == 43


@pytest.mark.parametrize('experts, K', [('all', 8), ('1', 1), ('3', 3)])
def test_another_number_of_experts(made, experts, K):
    """As a checkpoint whose config says it; 3 is what the model was trained with."""
    saved = torch.load(made / 'out/ckpt.pt', weights_only=True)
    (made / f'K{K}').mkdir()
    saved['model_args']['num_experts_per_tok'] = K
    torch.save(saved, made / f'K{K}/ckpt.pt')
    got = text(made, f'--experts={experts}')
    assert got == text(made, f'--out_dir=K{K}') == text(made, '--init_from=hf', f'--experts={experts}')
    assert (got == text(made)) == (K == 3)


@pytest.mark.parametrize('flag', ['--max_new_tokens=1', '--start=' + '1+2' * 11])
def test_speculation_without_drafts_says_so(made, flag):
    """The second prompt fills the context, of 32 tokens."""
    code, out, err = run_inside(str(ROOT / 'sample.py'), *FEW, '--speculative=True', flag, cwd=made)
    assert code == 0 and out.splitlines()[-1].startswith('no draft was verified'), err


# -----------------------------------------------------------------------------
# a conversation

def converse(cwd, monkeypatch, lines, *flags, **attributes):
    """What --interactive=True says to these lines: its answers, and its standard error output"""
    monkeypatch.setattr('sys.stdin', io.StringIO(lines))
    for name, value in attributes.items():
        monkeypatch.setattr(Decoder, name, value)
    code, out, err = run_inside(str(ROOT / 'sample.py'), *FEW[:-1], '--interactive=True', *flags, cwd=cwd)
    assert code == 0, err
    return re.sub('^(Overriding.*\n)*', '', out), err.splitlines()


@pytest.mark.parametrize('speculative', [False, True])
def test_a_conversation(made, tmp_path, monkeypatch, speculative):
    """Each answer continues all the text so far; a line that the model does not know is said, and left out."""
    flags = '--max_new_tokens=7', f'--speculative={speculative}'
    told, said = converse(made, monkeypatch, '\n1+2\né\n*4\n\n', *flags)
    want, whole = [], ''
    for line in ('1+2', '\n*4', ''):                                 # 27 characters, and the context has 32 tokens
        whole += line
        (tmp_path / 'whole.txt').write_text(whole)
        answer = text(made, '--max_new_tokens=7', f'--start=FILE:{tmp_path}/whole.txt')[len(whole):]
        want.append(answer)
        whole += answer
    assert told == ''.join(answer + '\n' for answer in want) and len(whole) == 27
    line = r'7 tokens in \d\.\d\d s: [\d.]+ tokens/s; context (\d+) of 32' + '; accepted.*' * speculative
    told = [re.fullmatch(line, s) and re.fullmatch(line, s)[1] for s in said]
    assert told == [None, '10', None, '20', '27']
    assert 'type some' in said[0] and "does not know the characters 'é'" in said[2]


def test_a_conversation_forgets_its_oldest_half(made, monkeypatch):
    _, said = converse(made, monkeypatch, '1+2\n' + '\n' * 5, '--max_new_tokens=7')
    assert [line.partition('context ')[2] for line in said] == [f'{n} of 32' for n in (10, 17, 24, 31, 32, 16 + 7)]


def test_a_line_longer_than_half_the_context_is_read_as_far_as_it_fits(made, tmp_path, monkeypatch):
    line = '1+2*3-4/5' * 5                                          # 45 characters, and the context has 32 tokens
    for lines, read in ((line, line[-31:]), ('1+2\n' + line[:29], '\n' + line[:29])):
        told, _ = converse(made, monkeypatch, lines + '\n', '--max_new_tokens=1')
        (tmp_path / 'read.txt').write_text(read)
        whole = text(made, '--max_new_tokens=1', f'--start=FILE:{tmp_path}/read.txt')
        assert told.splitlines()[-1] == whole[len(read):]


def test_ctrl_c_ends_an_answer(made, monkeypatch):
    """And not the conversation. A second one, before the next token comes, ends that too."""
    stream, times = Decoder.stream, [1]

    def interrupted(*args):
        for i, tokens in enumerate(stream(*args)):
            for _ in range(times[0] * (i == 2)):
                signal.raise_signal(signal.SIGINT)
            yield tokens

    told, said = converse(made, monkeypatch, '1+2\n1+2\n', stream=interrupted)
    assert [line.partition(' in ')[0] for line in said] == ['3 tokens'] * 2
    times[0] = 2
    monkeypatch.setattr('sys.stdin', io.StringIO('1+2\n'))
    code, _, said = run_inside(str(ROOT / 'sample.py'), *FEW, '--interactive=True', cwd=made)
    assert (code, said) == (130, 'interrupted\n')


def test_ctrl_c_at_the_prompt_says_how_to_leave(made, monkeypatch):
    monkeypatch.setattr('builtins.input', lambda prompt, presses=[signal.SIGINT]: signal.raise_signal(presses.pop())
                        if presses else sys.stdin.readline()[:-1] or exec('raise EOFError'))
    _, said = converse(made, monkeypatch, '1+2\n', '--max_new_tokens=5')
    assert said[:2] == ['', 'Ctrl-D ends the conversation'] and said[2].startswith('5 tokens') and len(said) == 3


@pytest.mark.slow
def test_a_conversation_at_a_terminal(made):
    """Answers come without control characters, and Ctrl-D leaves."""
    ours, terminal = pty.openpty()
    process = subprocess.Popen([sys.executable, ROOT / 'sample.py', *FEW, '--interactive=True', '--temperature=9',
                                '--max_new_tokens=28'], cwd=made, stdin=terminal, stdout=terminal, stderr=terminal,
                               env={**os.environ, 'OMP_NUM_THREADS': '1', 'TERM': 'dumb'}, start_new_session=True)
    os.close(terminal)
    seen = b''
    for keys, answer in ((b'', b'> '), (b'1+2\n', b'of 32\r\n> '), (b'\x04', b'')):
        os.write(ours, keys)
        while answer and answer not in seen:
            assert select.select([ours], [], [], 60)[0], seen
            seen += os.read(ours, 1 << 16)
        done, seen = seen, b''
        if keys == b'1+2\n':
            assert b'U+00' in done and not re.search(rb'[\x00-\x08\x0b\x0c\x0e-\x1f]', done.partition(b'1+2')[2])
    assert process.wait(timeout=60) == 0
    os.close(ours)


def test_text_comes_in_whole_characters(tmp_path, tiktoken_cache, monkeypatch):
    """A byte is a token: no piece has half a character, and all pieces are the whole text, through two tokenizers."""
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(tiktoken_cache))
    write_tokenizer(tmp_path / 'hf')
    said = 'the é, 東京, 😀👩‍🚀 é\n' * 20
    for speaks in (tokenizer.from_folder(tmp_path / 'hf'), tokenizer.gpt2()):
        ids = speaks.encode(said)
        spell = tokenizer.speller(speaks.decode)
        pieces = [spell([i]) for i in ids]
        assert len(ids) > 400 and '' in pieces and all('\ufffd' not in piece for piece in pieces)
        assert ''.join(pieces) + spell([], last=True) == speaks.decode(ids) == said
        for cut in range(1, 20):                                     # what ends within a character
            spell = tokenizer.speller(speaks.decode)
            assert ''.join(map(spell, ([i] for i in ids[:cut]))) + spell([], last=True) == speaks.decode(ids[:cut])
    calls = []
    spell = tokenizer.speller(lambda ids: calls.append(len(ids)) or 'a' * len(ids))
    assert ''.join(spell([7]) for _ in range(999)) == 'a' * 999 and max(calls) < 99  # no text is spelt again and again


# -----------------------------------------------------------------------------
# mistakes

@pytest.mark.parametrize('flags, message', [
    (['--out_dir=plain', '--speculative=True'], 'needs MTP modules'),
    (['--out_dir=nanogpt'], 'this is a nanoGPT (GPT-2) checkpoint'),
    (['--out_dir=many'], 'a vocabulary of 60000 tokens is not GPT-2'),
    (['--out_dir='], 'must name the folder of a run'), (['--init_from='], "init_from='' must be"),
    (['--num_samples=1000000000', '--max_new_tokens=500'], 'GB of memory'),
    (['--num_samples=' + '9' * 30], 'GB of memory'), (['--max_new_tokens=1000000000000000'], 'GB of memory'),
    (['--start=file:prompt.txt'], 'begin with FILE: in capitals'), (['--start=FILE:nowhere'], 'No such file'),
    (['--start=FILE:out/ckpt.pt'], "can't decode byte"), (['--num_samples=0'], 'must be positive'),
    (['--experts=9'], "must be 'all' or a number in 1..8"), (['--experts=0'], 'in 1..8'), (['--experts=x'], 'in 1..8'),
    (['--interactive=True', '--max_new_tokens=0'], 'be positive in'), (['--temperature=-1'], 'not be negative'),
    (['--seed=' + '1' * 23], 'must fit in 64 bits'),
    (['--device=meta'], "device='meta' cannot be used"),
    (['--init_from=out'], 'has no config.json, but a ckpt.pt'), (['--start=\udcff'], "characters '\\udcff'"),
    (['--init_from=hf', '--start=\udcff'], 'does not know all of'),
])
def test_mistakes(made, flags, message):
    assert message in ends(made, 'sample.py', *FEW, *flags)


@pytest.mark.parametrize('flags', [[], ['--temperature=1'], ['--speculative=True'], ['--start=' + '1+2' * 11]])
def test_a_model_that_computes_nan(here, flags):
    """The last prompt fills the context."""
    saved = torch.load(here / 'out/ckpt.pt', weights_only=True)
    saved['model']['transformer.ln_f.weight'].fill_(3e38)  # finite, as a checkpoint must be
    torch.save(saved, here / 'out/ckpt.pt')
    assert ends(here, 'sample.py', *FEW, *flags).startswith('the model computes nan or infinity: its weights hold some')


@pytest.mark.parametrize('name, data, message', [
    ('tokenizer.json', b'', 'tokenizer.json cannot be read'),
    ('tokenizer.json', b'[1]', 'tokenizer.json cannot be read'),
    ('tokenizer_config.json', b'', 'tokenizer_config.json cannot be read'),
    ('tokenizer_config.json', b'[1]', 'it holds no table'), ('config.json', b'', 'config.json cannot be read'),
    ('config.json', b'null', 'it holds no table'), ('config.json', b'\xff', 'config.json cannot be read'),
    ('model.safetensors', b'', 'damaged or missing'), ('model.safetensors.index.json', b'[]', 'it holds no table'),
])
def test_damaged_files_of_a_folder(here, name, data, message):
    (here / 'hf' / name).write_bytes(data)
    assert message in ends(here, 'sample.py', *FEW, '--init_from=hf')
    assert message in ends(here, 'convert.py', 'import', '--hf_dir=hf', '--out_dir=new')


def test_a_text_file_of_windows_is_read_as_prepare_reads_it(here):
    (here / 'plain.txt').write_bytes(b'1+2\n3')
    (here / 'windows.txt').write_bytes('\ufeff1+2\r\n3'.encode('utf-8'))
    samples = [run_inside(str(ROOT / 'sample.py'), *FEW[:-1], '--out_dir=out', f'--start=FILE:{name}.txt', cwd=here)
               for name in ('plain', 'windows')]
    assert samples[0][0] == samples[1][0] == 0
    assert samples[0][1].partition('1+2')[2].partition('tokens in')[0] == \
        samples[1][1].partition('1+2')[2].partition('tokens in')[0] != ''


def test_a_prompt_that_fails_fails_before_the_weights_are_read(here, monkeypatch):
    monkeypatch.setattr('extras.hf.from_pretrained', lambda *_: pytest.fail('read'))
    for flags in (['--start=é'], ['--start=FILE:nowhere'], ['--start='], ['--dtype=int8'], ['--temperature=-1']):
        ends(here, 'sample.py', *FEW, '--init_from=hf', *flags)
    (here / 'hf/tokenizer.json').unlink()
    assert 'has no tokenizer.json' in ends(here, 'sample.py', *FEW, '--init_from=hf')


def test_a_characters_table_that_does_not_fit(here):
    saved = torch.load(here / 'out/ckpt.pt', weights_only=True)
    saved['meta'] = {'stoi': {**CHARS, '1': 99}, 'itos': {99: '1'}}
    torch.save(saved, here / 'out/ckpt.pt')
    assert 'the prompt has the token 99, the vocabulary 61' in ends(here, 'sample.py', *FEW)
    saved['meta'] = {'stoi': CHARS}
    torch.save(saved, here / 'out/ckpt.pt')
    assert 'its characters are no tables' in ends(here, 'sample.py', *FEW)


@pytest.mark.parametrize('script, flags', [
    ('train.py', ['--init_from=resume', '--out_dir=nanogpt', '--dataset=abc', '--device=cpu', '--block_size=8']),
    ('sample.py', ['--out_dir=nanogpt', '--device=cpu']),
    ('convert.py', ['export', '--out_dir=nanogpt', '--hf_dir=new']),
])
def test_a_nanogpt_checkpoint_is_called_one(here, small, script, flags):
    shutil.copytree(here / 'nanogpt', small / 'nanogpt')
    code, _, said = run_inside(script, *flags, cwd=small)
    assert code == 2 and said.count('\n') == 1 and 'this is a nanoGPT (GPT-2) checkpoint' in said, said


@pytest.mark.parametrize('flags, message', [
    (['import', '--fp8', '--hf_dir=hf', '--out_dir=new'], '--fp8 belongs to export'),
    (['import', '--hf_dir=', '--out_dir=new'], '--hf_dir is empty'),
    (['export', '--hf_dir=new', '--out_dir='], '--out_dir is empty'),
    (['export', '--out_dir=many', '--hf_dir=new'], 'a vocabulary of 60000 tokens is not GPT-2'),
    (['import', '--hf_dir=hf', '--out_dir=hf'], 'hf exists already'),
])
def test_mistakes_of_convert(made, flags, message):
    assert message in ends(made, 'convert.py', *flags)


@pytest.mark.parametrize('settings, message', [
    (dict(vocab_size=10 ** 30), '0 must be positive, <'), (dict(hidden_size='x'), 'n_embd must be int'),
    (dict(rope_scaling='yarn'), 'cannot be read'), (dict(architectures={'a': 1}), 'cannot be read'),
    (dict(rope_parameters=dict(rope_type='yarn', original_max_position_embeddings=0)), 'cannot be read'),
])
def test_odd_settings(here, settings, message):
    path = here / 'hf/config.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    assert message in ends(here, 'convert.py', 'import', '--hf_dir=hf', '--out_dir=new')


# -----------------------------------------------------------------------------
# sampling

@pytest.mark.parametrize('rows, given, threads', [(1, None, 1), (10_000, None, 5), (1, '5', 5)])
def test_a_small_step_has_one_thread(monkeypatch, rows, given, threads):
    """Threads that wait for each other make a small step slow on a busy machine; a user's own number stays."""
    chosen = [5]
    monkeypatch.setattr(torch, 'set_num_threads', chosen.append)
    monkeypatch.delenv('OMP_NUM_THREADS', raising=False)
    if given:
        monkeypatch.setenv('OMP_NUM_THREADS', given)
    scripts.use_few_threads(tiny_model(), rows)
    assert chosen[-1] == threads


def test_a_temperature_next_to_zero_is_zero(made):
    for lowest in ('1e-300', '1e-39', '1e-7'):
        assert text(made, f'--temperature={lowest}', '--seed=3') == text(made, '--temperature=0')
    assert text(made, '--temperature=1e300', '--seed=3') != text(made, '--temperature=0')


def test_the_stop_token_is_the_checkpoints_or_the_tokenizers(here):
    """config.json's eos_token_id goes first, then the eos_token of tokenizer_config.json."""
    whole = text(here, '--init_from=hf', '--temperature=1')
    places = [i for i in range(4, len(whole)) if whole[i] not in whole[3:i]]  # where a character comes first
    (first, *_, second), places = (whole[i] for i in places), (places[0], places[-1])
    settings = json.loads((here / 'hf/tokenizer_config.json').read_text())
    (here / 'hf/tokenizer_config.json').write_text(json.dumps(settings | {'eos_token': {'content': second}}))
    assert text(here, '--init_from=hf', '--temperature=1') == whole[:places[1]]
    config = json.loads((here / 'hf/config.json').read_text())
    (here / 'hf/config.json').write_text(json.dumps(config | {'eos_token_id': CHARS[first]}))
    assert text(here, '--init_from=hf', '--temperature=1') == whole[:places[0]]


def start(*args, cwd, **kwargs):
    return subprocess.Popen([sys.executable, *map(str, args)], cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONUNBUFFERED': '1', **kwargs})


def test_a_reader_that_leaves(made):
    """`| head -1` ends it without a traceback."""
    process = start(ROOT / 'sample.py', *FEW, '--num_samples=3', '--max_new_tokens=400', cwd=made)
    process.stdout.readline()
    process.stdout.close()
    said = process.stderr.read()
    assert process.wait() == -signal.SIGPIPE and re.fullmatch(rb'(\d+ tokens .* lie past .*\n)?', said)


def test_tokens_past_the_context_are_announced(made):
    code, _, said = run_inside(str(ROOT / 'sample.py'), *FEW, '--num_samples=2', '--max_new_tokens=40', cwd=made)
    assert code == 0 and re.match(r'\d+ tokens of each sample lie past the context of 32', said)


@pytest.mark.parametrize('args', [['sample.py', *FEW], ['convert.py', 'export', '--out_dir=out', '--hf_dir=new'],
                                  ['inside.py', '--out_dir=out'], ['bench.py', 'loss'], ['runs/positions.py', 'out'],
                                  ['runs/ablations.py', 'time'], ['scale/schedules.py']])
def test_ctrl_c_in_the_first_seconds(made, tmp_path, args):
    """While torch is imported: a torch.py in its place says that it is, and waits."""
    (tmp_path / 'torch.py').write_text("import time\nprint('importing', flush=True)\nwhile 1: time.sleep(0.1)\n")
    process = start(ROOT / args[0], *args[1:], cwd=made, PYTHONPATH=str(tmp_path))
    assert process.stdout.readline() == b'importing\n'
    process.send_signal(signal.SIGINT)
    out, said = process.communicate(timeout=30)
    assert (process.returncode, out, said) == (130, b'', b'interrupted\n')


def test_ctrl_c_while_converting_leaves_nothing_half_written(here, monkeypatch):
    def interrupted(*_, **__):
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr('safetensors.torch.save_file', interrupted)
    monkeypatch.setattr('model.save_checkpoint', interrupted)
    before = sorted(here.rglob('*'))
    for args in (['export', '--out_dir=out', '--hf_dir=new'], ['import', '--hf_dir=hf', '--out_dir=plain/new']):
        code, out, said = run_inside(str(ROOT / 'convert.py'), *args, cwd=here)
        assert code == 130 and said == 'interrupted\n'
    assert sorted(here.rglob('*')) == before


def test_a_terminal_without_the_characters(tmp_path):
    write_checkpoint(tmp_path / 'out', stoi={chr(0x3040 + i): i for i in range(61)})
    process = start(ROOT / 'sample.py', *FEW[:-1], '--start=\u3041', cwd=tmp_path, PYTHONIOENCODING='ascii')
    out, said = process.communicate(timeout=100)
    assert process.returncode == 0 and said == b'' and b'?' * 21 in out


# -----------------------------------------------------------------------------
# tokenizers

def write_tokenizer(folder, post=None, **settings):
    """A byte-level BPE as DeepSeek's: <s> and </s>, 256 bytes, two merges; a template that adds what `post` says."""
    bytes_ = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ['<s>', '</s>', *bytes_, 'th', 'the']
    bpe = tokenizers.Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)},
                                          merges=[('t', 'h'), ('th', 'e')]))
    bpe.add_special_tokens([AddedToken('<s>'), AddedToken('</s>')])
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    if post == 'byte level':
        bpe.post_processor = processors.ByteLevel(trim_offsets=False)
    elif post:
        bpe.post_processor = processors.TemplateProcessing(single=post, special_tokens=[('<s>', 0), ('</s>', 1)])
    bpe.enable_truncation(4)  # what a tokenizer.json may hold, and AutoTokenizer does not heed
    bpe.enable_padding(length=9, pad_token='</s>', pad_id=1)
    folder.mkdir(exist_ok=True)
    bpe.save(str(folder / 'tokenizer.json'))
    (folder / 'tokenizer_config.json').write_text(json.dumps({'eos_token': '</s>', **settings}))
    (folder / 'config.json').write_text(json.dumps({'model_type': 'deepseek_v3'}))


BOS = {'__type': 'AddedToken', 'content': '<s>', 'lstrip': False, 'normalized': True, 'rstrip': False,
       'single_word': False}


@pytest.mark.parametrize('kind', ['LlamaTokenizerFast', 'PreTrainedTokenizerFast', None])
@pytest.mark.parametrize('bos', ['<s>', BOS, None], ids=['text', 'table', 'none'])
@pytest.mark.parametrize('post', [None, 'byte level', '<s> $A'])
@pytest.mark.parametrize('add', [True, False, None])
def test_prompts_are_those_of_autotokenizer(tmp_path, kind, bos, post, add):
    settings = {'tokenizer_class': kind, 'bos_token': bos, 'add_bos_token': add}
    write_tokenizer(tmp_path / 'hf', post, **{name: value for name, value in settings.items() if value is not None})
    # transformers 5 reads add_bos_token from its caller, not from the folder, as transformers 4 did
    theirs = AutoTokenizer.from_pretrained(tmp_path / 'hf', **({'add_bos_token': True} if add and bos else {}))
    ours = tokenizer.from_folder(tmp_path / 'hf')
    for said in ('the cat', ' 東京\n</s>the', '<s>the', ''):
        ids = ours.begin + ours.encode(said)
        assert ids == theirs(said).input_ids
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert ours.begin == ([0] if post == '<s> $A' or add and bos else [])
    assert ours.end == theirs.eos_token_id == 1 and ours.vocab_size == len(theirs)


def test_a_template_that_ends_texts_too(tmp_path):
    """A prompt does not end with the end of the text."""
    write_tokenizer(tmp_path / 'hf', '<s> $A </s>', bos_token='<s>')
    assert tokenizer.from_folder(tmp_path / 'hf').begin == [0]
    write_tokenizer(tmp_path / 'hf', '$A </s>', bos_token='<s>', add_bos_token=True)
    assert tokenizer.from_folder(tmp_path / 'hf').begin == [0]


def test_sampling_begins_with_the_bos(tmp_path):
    """The folder, and what is imported from it: the model sees the ids that transformers would give it."""
    write_checkpoint(tmp_path / 'out', stoi={}, vocab_size=260)
    convert.export_folder(str(tmp_path / 'out'), str(tmp_path / 'hf'))
    config = (tmp_path / 'hf/config.json').read_text()
    seen = {}
    for name, add in (('with', True), ('without', False)):
        shutil.copytree(tmp_path / 'hf', tmp_path / name)
        write_tokenizer(tmp_path / name, bos_token=BOS, add_bos_token=add)
        (tmp_path / name / 'config.json').write_text(config)
        convert.import_folder(str(tmp_path / name), str(tmp_path / f'{name}-back'))
        seen[name] = text(tmp_path, '--start=the', f'--init_from={name}')
        assert seen[name] == text(tmp_path, '--start=the', f'--out_dir={name}-back')
        assert seen[name].startswith('the')
    assert seen['with'] != seen['without']


def test_a_tokenizer_whose_model_is_no_table(tmp_path):
    (tmp_path / 'tokenizer.json').write_text('{"model": []}')
    with pytest.raises(Mistake, match='has other tokens than'):
        tokenizer.check_same(str(tmp_path), {'stoi': {'a': 0}}, 'data/abc')


def test_one_convention_for_every_tokenizer(tmp_path, tiktoken_cache, monkeypatch):
    """words(): the end of a text is no word, wherever it stands; a character is one, if it ends a response too."""
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(tiktoken_cache))
    write_tokenizer(tmp_path / 'hf')
    for speaks in (tokenizer.gpt2(), tokenizer.from_folder(tmp_path / 'hf')):
        said = speaks.encode('the end\n')
        assert speaks.words([*said, speaks.end]) == speaks.words(said) == 'the end\n'
        assert speaks.words([speaks.end, *said]) == 'the end\n'
    letters = tokenizer.characters({'a': 0, '\n': 1}, {0: 'a', 1: '\n'})
    assert letters.words([0, 0, 1]) == 'aa\n'


@pytest.mark.parametrize('size, gpt2', [(50256, False), (50257, True), (50304, True), (51200, True), (102400, False),
                                        (129280, False), (163840, False)])
def test_gpt2s_tokenizer_is_for_gpt2s_vocabulary(tmp_path, tiktoken_cache, monkeypatch, size, gpt2):
    """Moonlight's folder has tiktoken.model and no tokenizer.json."""
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(tiktoken_cache))
    (tmp_path / 'config.json').write_text(json.dumps({'vocab_size': size}))
    (tmp_path / 'tiktoken.model').write_text('')
    for known in (size, None):
        if gpt2:
            assert tokenizer.of_checkpoint(tmp_path, {}, known).end == 50256
        else:
            with pytest.raises(ValueError, match='tiktoken.model is not read'):
                tokenizer.of_checkpoint(tmp_path, {}, known)


def test_an_import_without_a_tokenizer_says_so(here):
    (here / 'hf/tokenizer.json').unlink()
    code, out, _ = run_inside(str(ROOT / 'convert.py'), 'import', '--hf_dir=hf', '--out_dir=new', cwd=here)
    assert code == 0 and 'left out: the tokenizer, because hf has no tokenizer.json' in out
    assert math.isinf(torch.load(here / 'new/ckpt.pt', weights_only=True)['best_val_loss'])
    assert "a vocabulary of 61 tokens is not GPT-2's" in ends(here, 'sample.py', *FEW, '--out_dir=new')
