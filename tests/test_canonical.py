"""extras/canonical.py: tokens that are spelled alike share the rows of Engram's tables."""

import pickle

import numpy as np
import pytest
import torch
from conftest import TINY, load, run_inside, torchrun, train
from test_sample import write_tokenizer

import model_v4
from extras import canonical, tokenizer

ENGRAM = ['--architecture=model_v4', '--engram_layers=0', '--engram_rows=50']


@pytest.fixture
def gpt2(tiktoken_cache, monkeypatch):
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(tiktoken_cache))
    return tokenizer.gpt2()


def memory_of(**overrides):
    return model_v4.GPT(model_v4.GPTConfig(**{**TINY, 'engram_layers': '0,1', 'engram_rows': 50, **overrides}))


def test_ids_are_those_of_the_library_tokenizers(gpt2):
    """The released demo's normalizer, on all of GPT-2's tokens."""
    from tokenizers import Regex, normalizers
    mark = '\ue000'
    normal = normalizers.Sequence([
        normalizers.NFKC(), normalizers.NFD(), normalizers.StripAccents(), normalizers.Lowercase(),
        normalizers.Replace(Regex(r'[ \t\r\n]+'), ' '), normalizers.Replace(Regex('^ $'), mark), normalizers.Strip(),
        normalizers.Replace(mark, ' ')])
    alike = {}
    for i in range(50257):
        text = gpt2.decode([i])
        alike.setdefault(i if '\ufffd' in text else normal.normalize_str(text) or text, []).append(i)
    want = torch.empty(50257, dtype=torch.long)
    for group in alike.values():
        want[group] = group[0]
    ids = canonical.canonical_ids(gpt2)
    assert ids == want.tolist() and len(set(ids)) == len(alike) < 34000


def test_a_new_model_learns_gpt2s_spelling(gpt2, capsys):
    """Equal texts but for case, accents and spaces have equal rows; what spells nothing keeps its own id."""
    model = memory_of(vocab_size=50304)
    canonical.begin(model, 'resume', 'nowhere', {})
    assert torch.equal(model.memories()[0].canonical, torch.arange(50305)) and capsys.readouterr().out == ''
    canonical.begin(model, 'scratch', 'nowhere', {})
    assert capsys.readouterr().out == 'Engram: 50,257 tokens have 32,982 canonical ids\n'
    for memory in model.memories():
        def ids(*words):
            return [memory.canonical[gpt2.encode(word)].tolist() for word in words]  # noqa: B023
        assert len(gpt2.encode(' The')) == 1 and len({tuple(i) for i in ids(' The', 'the', 'The', 'THE', ' the')}) == 1
        assert ids(' caf\u00e9') != ids(' the') and ids('\u00e9') == ids('e') == ids('E') and ids(' ') == ids('\n')
        byte = next(i for i in range(256) if '\ufffd' in gpt2.decode([i]))
        assert memory.canonical[byte] == byte and memory.canonical[50256] == 50256
        assert torch.equal(memory.canonical[50257:], torch.arange(50257, 50305))
        a, b, c = (torch.tensor(gpt2.encode(text))[[1, 0, 0]] for text in (' The dog', 'the Dog', ' A dog'))
        rows = [memory.rows(memory.canonical[x]) for x in (a, b, c)]
        assert torch.equal(rows[0], rows[1]) and not torch.equal(rows[0], rows[2])


def test_characters_and_unknown_tokens_keep_their_own_ids(capsys):
    model = memory_of()
    canonical.begin(model, 'scratch', 'nowhere', {})
    canonical.begin(model_v4.GPT(model_v4.GPTConfig(**TINY)), 'scratch', 'nowhere', {'tokenizer': 'x'})
    many = memory_of(vocab_size=50300)  # characters, as many as GPT-2's tokens
    canonical.begin(many, 'scratch', 'nowhere', {'stoi': {'A': 0, 'a': 1}, 'itos': {0: 'A', 1: 'a'}})
    for memory in model.memories() + many.memories():
        assert torch.equal(memory.canonical, torch.arange(len(memory.canonical)))
    assert capsys.readouterr().out == ''


@pytest.fixture
def words(small):
    """The data set abc of 260 byte-level tokens, with their tokenizer.json."""
    folder = small / 'data/abc'
    write_tokenizer(folder)
    rng = np.random.default_rng(0)
    for split, n in (('train', 4000), ('val', 500)):
        rng.integers(2, 260, size=n).astype(np.uint16).tofile(folder / f'{split}.bin')
    meta = {'vocab_size': 260, 'tokenizer': tokenizer.sha256_of(folder / 'tokenizer.json')}
    (folder / 'meta.pkl').write_bytes(pickle.dumps(meta))
    return small


def buffer_of(clone, path='out/ckpt.pt'):
    return load(clone, path)['model']['transformer.h.0.engram.canonical']


def test_a_run_saves_its_ids_and_a_resume_keeps_them(words):
    ids = canonical.canonical_ids(tokenizer.from_folder(words / 'data/abc'))
    assert 'Engram: 260 tokens have' in train(words, *ENGRAM, '--max_iters=3')
    want = torch.tensor([*ids, 260])
    upper, lower = (tokenizer.from_folder(words / 'data/abc').encode(ch)[0] for ch in 'Tt')
    assert torch.equal(buffer_of(words), want) and want[upper] == want[lower] and len(set(ids)) < 240
    assert 'Engram' not in train(words, *ENGRAM, '--init_from=resume')
    assert torch.equal(buffer_of(words), want) and load(words)['iter_num'] == 6
    code, printed, said = run_inside('sample.py', '--out_dir=out', '--start=the', '--num_samples=1',
                                     '--max_new_tokens=5', '--device=cpu', cwd=words)
    assert (code, said) == (0, '') and 'the' in printed


def test_a_run_of_characters_says_nothing(small):
    assert 'Engram' not in train(small, *ENGRAM, '--max_iters=3')
    assert torch.equal(buffer_of(small), torch.arange(41))


@pytest.mark.slow
@pytest.mark.parametrize('form', ['whole', 'dcp'])
def test_shards_have_the_same_ids(words, form):
    train(words, *ENGRAM, '--max_iters=3', '--out_dir=one')
    code, printed = torchrun(words, *ENGRAM, '--max_iters=3', '--shard=2', f'--checkpoint={form}')
    assert code == 0 and printed.count('canonical ids') == 1, printed
    code, printed = torchrun(words, *ENGRAM, '--shard=2', f'--checkpoint={form}', '--init_from=resume')
    assert code == 0 and 'canonical ids' not in printed, printed
    train(words, *ENGRAM, '--max_iters=6', '--out_dir=one', '--init_from=resume')
    if form == 'whole':
        assert torch.equal(buffer_of(words), buffer_of(words, 'one/ckpt.pt'))
    else:
        from extras import dcp
        model, _ = dcp.from_checkpoint(str(words / 'out/ckpt.dcp'), 'cpu', with_optimizer=False)
        assert torch.equal(model.memories()[0].canonical, buffer_of(words, 'one/ckpt.pt'))
