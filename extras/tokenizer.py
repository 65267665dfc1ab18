"""
The tokenizers that a checkpoint can use: the characters of its data, GPT-2's BPE, or the tokenizer.json that came
with it from Hugging Face. If there is no such tokenizer, every function here raises a Mistake.
"""

import base64
import contextlib
import hashlib
import json
import math
import os
import sys
from collections.abc import Callable
from typing import NamedTuple

from extras.files import mistake, read_bytes, read_table

TOKENIZER_FILES = ('tokenizer.json', 'tokenizer_config.json', 'special_tokens_map.json')
SETTINGS = {  # of the two other files
    'tokenizer_class', 'bos_token', 'eos_token', 'unk_token', 'pad_token', 'sep_token', 'cls_token', 'mask_token',
    'additional_special_tokens', 'extra_special_tokens', 'added_tokens_decoder', 'add_bos_token', 'add_eos_token',
    'add_prefix_space', 'chat_template', 'clean_up_tokenization_spaces', 'errors', 'legacy', 'model_input_names',
    'model_max_length', 'padding_side', 'truncation_side', 'spaces_between_special_tokens', 'split_special_tokens',
    'use_default_system_prompt'}


class Tokenizer(NamedTuple):
    name: str             # in words
    encode: Callable      # text -> token ids, without `begin`; a Mistake if it has no tokens for the text
    decode: Callable      # token ids -> text
    vocab_size: int
    begin: list           # ids that stand before every document and prompt: the BOS, or nothing
    end: int | None       # the id that ends a document
    sha256: str = ''      # of a tokenizer.json: data and checkpoint must share it

    def words(self, ids):
        """token ids -> text, in which the token `end` spells nothing, whatever the tokenizer"""
        return self.decode([i for i in ids if i != self.end])


def speller(decode):
    """-> spell(ids, last=False): the text that further token ids add. In sum it is decode() of all ids, if these
    are UTF-8 (some decoders change the characters before a wrong byte, which are out already).

    A character may be spread over several tokens. Until the character is whole, decode() ends with U+FFFD, which is
    held back; last=True holds nothing back.
    """
    held, said = [], ''  # the last ids, and how much of their text was handed out

    def spell(ids, last=False):
        nonlocal held, said
        held = held + ids
        text = decode(held)
        ready = text if last else text.rstrip('\ufffd')
        piece, said = ready[len(said):], max(ready, said, key=len)
        tail = decode(held[-16:]) if len(held) > 64 and said == text else None
        if tail and text.endswith(tail):  # not if the tail begins within a character
            held, said = held[-16:], tail
        return piece

    return spell


def characters(stoi, itos):
    """One token per character."""
    def encode(text):
        unknown = sorted(set(text) - set(stoi))
        if unknown:
            raise mistake(f'this model does not know the characters {"".join(unknown)!r}: leave them out of the text')
        return [stoi[ch] for ch in text]

    def decode(ids):
        return ''.join(itos.get(i, '') for i in ids)  # a vocabulary may be larger than its characters

    return Tokenizer(f'{len(stoi)} characters', encode, decode, len(stoi), [], None)


def gpt2(special=True):
    """GPT-2's byte-level BPE. tiktoken downloads its two tables once, into TIKTOKEN_CACHE_DIR where that is set.

    special: a special token that is written in a text, such as <|endoftext|>, is that token, as in a prompt. False: it
    is ordinary words, as in a corpus, which it would cut in two.
    """
    import tiktoken
    try:
        bpe = tiktoken.get_encoding('gpt2')
    except Exception as e:  # requests has errors of its own
        raise mistake(f'tiktoken could not load the GPT-2 tokenizer ({type(e).__name__}): it downloads it once. By '
                      'hand: run it where there is a network, with TIKTOKEN_CACHE_DIR=DIR, and copy DIR') from None

    def encode(text):
        return bpe.encode(text, allowed_special={'<|endoftext|>'}) if special else bpe.encode_ordinary(text)

    def decode(ids):
        return bpe.decode([i for i in ids if i < bpe.n_vocab])  # a vocabulary may be padded beyond GPT-2's

    return Tokenizer("GPT-2's byte-level BPE", encode, decode, bpe.n_vocab, [], bpe.eot_token)


def read_config(folder):
    """The config.json of a folder in Hugging Face's format."""
    if not os.path.exists(os.path.join(folder, 'config.json')):
        run = [name for name in ('ckpt.pt', 'ckpt.dcp') if os.path.exists(os.path.join(folder, name))]
        raise mistake(f'{folder} has no config.json, ' + (f'but a {run[0]}: it is the out_dir of a run' if run else
                                                          'and no ckpt.pt'))
    return read_table(os.path.join(folder, 'config.json'))


def sha256_of(path):
    return hashlib.sha256(read_bytes(path)).hexdigest()


def tokenizer_files(folder):
    """{name: bytes} of the files that travel with a tokenizer. Settings that are not in SETTINGS stay behind: others
    may name code, as auto_map does.
    """
    found = {}
    for path in (os.path.join(folder, name) for name in TOKENIZER_FILES):
        if not os.path.exists(path):
            continue
        data = read_bytes(path)
        if not path.endswith('tokenizer.json'):
            table = read_table(path)
            known = {key: table[key] for key in table if key in SETTINGS}
            data = data if known == table else json.dumps(known, indent=2).encode() + b'\n'
        found[os.path.basename(path)] = data
    return found


def copy_tokenizer(source, target):
    """Copy the tokenizer's files, if `source` has any: a data set and each run keep their own copy."""
    for name, data in tokenizer_files(source).items():
        with open(os.path.join(target, name), 'wb') as f:
            f.write(data)


@contextlib.contextmanager
def rust(message=''):
    """What the library tokenizers raises becomes a Mistake. A panic of it is no Exception, and prints a backtrace to
    the standard error output, which is held back.
    """
    sys.stderr.flush()
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        yield
    except BaseException as e:
        if isinstance(e, Exception) or type(e).__name__ == 'PanicException':
            raise mistake(message, e) from None
        raise
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)


def check_growth(table):
    """A ValueError if a tokenizer.json may make a text a thousand times longer: forty steps that double it, say."""
    growth, steps = 1.0, [table]
    while steps:
        step = steps.pop()
        steps += step if type(step) is list else [step.get(key) for key in (
            'normalizer', 'normalizers', 'pre_tokenizer', 'pretokenizers', 'decoder', 'decoders')
            if type(step.get(key)) in (dict, list)]
        if type(step) is list:
            continue
        content, pattern = step.get('content') or '', step.get('pattern')
        if step.get('type') == 'Replace':  # an expression may match between any two characters
            size = len(pattern.get('String') or '')
            growth *= max(1, len(content) / size) if size else 1 + len(content)
        elif step.get('type') == 'Prepend':
            growth *= 1 + len(step.get('prepend') or '')
        elif step.get('type') == 'Precompiled':  # a table of 4 + n bytes, then texts that replace others
            texts = base64.b64decode(step.get('precompiled_charsmap') or '')
            growth *= 1 + max(map(len, texts[4 + int.from_bytes(texts[:4], 'little'):].split(b'\0')))
    if growth > 1000:
        raise ValueError('its steps may make a text more than 1,000 times longer')


def from_folder(folder, special=True):
    """The tokenizer.json of a folder, with the BOS that it puts before a text, or that tokenizer_config.json asks for.
    special: as for gpt2()

    transformers 4 heeds add_bos_token, which the released V2, V3 and R1 set; transformers 5 heeds it where
    AutoTokenizer.from_pretrained is given it, and else what tokenizer.json itself adds.
    """
    path, settings_path = (os.path.join(folder, name) for name in ('tokenizer.json', 'tokenizer_config.json'))
    settings = read_table(settings_path) if os.path.exists(settings_path) else {}
    import tokenizers
    data = read_bytes(path)
    with rust(f'{path} cannot be read: '):
        check_growth(json.loads(data))
        bpe = tokenizers.Tokenizer.from_buffer(data)
        bpe.no_truncation()
        bpe.no_padding()
        added = bpe.encode('').ids
        bpe.encode_special_tokens = not special

    def id_of(name):
        """The id of a special token, given as a string or as a table with its content."""
        token = settings.get(name)
        token = token.get('content') if isinstance(token, dict) else token
        return bpe.token_to_id(token) if isinstance(token, str) else None

    def ids(text):
        with rust():
            return bpe.encode(text, add_special_tokens=False).ids

    def knows(text):
        try:
            return ids(text) is not None
        except ValueError:
            return False

    def encode(text):
        try:
            found = ids(text)
        except ValueError as e:  # a text that it has no tokens for
            characters = sorted(set(text))
            unknown = [ch for ch in characters if not knows(ch)]
            if 0 < len(unknown) < len(characters):  # a tokenizer of words knows no character
                what = f'the characters {"".join(unknown)[:80]!r}'
            else:
                what = f'all of {text[:80]!r}'
            raise mistake(f'{path} does not know {what}: ', e) from None
        if not special and spelled & {*found}:  # its vocabulary itself holds them, as words
            raise mistake(f'{path} takes the letters {bpe.id_to_token(min(spelled & {*found}))!r} of the text for its '
                          'special token: take them out of the text')
        return found

    def decode(ids):
        with rust(f'{path} cannot spell the tokens: '):
            return bpe.decode(ids)

    begin, end = id_of('bos_token'), id_of('eos_token')
    # a single character, such as a line's end, may well be the end of a text too
    spelled = {token for token in (begin, end) if token is not None and len(bpe.id_to_token(token)) > 1}
    if added and added[-1] == end and (len(added) > 1 or begin != end):  # a template that ends texts too
        added = added[:-1]
    if not added and begin is not None and settings.get('add_bos_token'):
        added = [begin]
    return Tokenizer(path, encode, decode, bpe.get_vocab_size(), added, end, hashlib.sha256(data).hexdigest())


def check_same(folder, meta, tokens):
    """A Mistake if `tokens` (words for data or a model), by their meta.pkl, are not the folder's tokenizer.json's."""
    path = os.path.join(folder, 'tokenizer.json')
    if meta.get('stoi'):
        model = read_table(path).get('model')
        same = type(model) is dict and model.get('vocab') == meta['stoi']
    elif 'tokenizer' in meta:
        same = os.path.exists(path) and sha256_of(path) == meta['tokenizer']
    else:
        same = from_folder(folder).encode('<|endoftext|>') == [50256]  # GPT-2's
    if not same:
        raise mistake(f'{tokens} has other tokens than {path}: put the tokenizer.json of its tokens there, or prepare '
                      'the data again with --tokenizer=DIR, the folder of this one')


def check_characters(meta, folder):
    """A Mistake if stoi or itos, of the data set or checkpoint in a folder, are no tables of text and token ids."""
    stoi, itos = (meta.get(key, {}) for key in ('stoi', 'itos')) if type(meta) is dict else (None, None)
    tables = type(stoi) is type(itos) is dict and bool(stoi) == bool(itos)
    pairs = [*stoi.items(), *zip(itos.values(), itos)] if tables else []
    if not tables or not all((type(ch), type(i)) == (str, int) and 0 <= i < 2**31 for ch, i in pairs):
        raise mistake(f'{folder} is no checkpoint of this model, nor a data set: its characters are no tables')


def check_data(folder, meta):
    """A Mistake if a data set's folder holds a tokenizer.json of other tokens."""
    check_characters(meta, folder)
    known = not meta or 'tokenizer' in meta
    if known and os.path.exists(os.path.join(folder, 'tokenizer.json')):
        check_same(folder, meta, folder)


def end_of_text(settings):
    """The eos_token_id of a config.json: a token, or a list with one. Of several none is known to close a document."""
    given = settings.get('eos_token_id')
    ends = given if type(given) is list else [given]
    if len(ends) > 1 and os.environ.get('RANK', '0') == '0':
        print(f"config.json has several eos_token_id, {ends}: left out, so a text ends with the tokenizer's eos_token")
    return ends[0] if len(ends) == 1 and type(ends[0]) is int else None


def of_checkpoint(folder, meta=None, vocab_size=None):
    """The tokenizer of the checkpoint in a folder, by the meta and the vocab_size that were saved with it.

    vocab_size None: a folder in Hugging Face's format, whose config.json says it.
    """
    meta = meta or {}
    check_characters(meta, folder)
    stoi, itos = (meta.get(key, {}) for key in ('stoi', 'itos'))
    if stoi:
        return characters(stoi, itos)
    if 'tokenizer' in meta:
        check_same(folder, meta, f'the checkpoint in {folder}')
    if os.path.exists(os.path.join(folder, 'tokenizer.json')):
        return from_folder(folder)
    if vocab_size is None:
        vocab_size = read_config(folder).get('vocab_size')
    if type(vocab_size) is int and 50257 <= vocab_size <= 51200:  # GPT-2's, padded to a multiple of up to 1,024
        return gpt2()
    other = next((name for name in ('tiktoken.model', 'tokenizer.model', 'vocab.json')
                  if os.path.exists(os.path.join(folder, name))), None)
    raise mistake(f"{folder} has no tokenizer.json{f' (its {other} is not read here)' if other else ''}, and a "
                  f"vocabulary of {vocab_size} tokens is not GPT-2's: put the tokenizer.json of its model there")


# -----------------------------------------------------------------------------
# new tokenizer.json files: for a checkpoint that has none, which convert.py export writes, and trained on a text

def byte_characters():
    """GPT-2's alphabet: a printable character for each byte."""
    printable = [*range(ord('!'), ord('~') + 1), *range(ord('¡'), ord('¬') + 1), *range(ord('®'), ord('ÿ') + 1)]
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


def merge_of(token, ranks):
    """The two tokens whose merge made this one: what is left of it when only earlier merges are applied."""
    pieces = [bytes([b]) for b in token]
    while len(pieces) > 2:
        pairs = [ranks.get(a + b, math.inf) for a, b in zip(pieces, pieces[1:])]
        i = pairs.index(min(pairs))
        pieces[i:i + 2] = [pieces[i] + pieces[i + 1]]
    return pieces


def gpt2_tokenizer():
    """GPT-2's byte-level BPE, from tiktoken's table of ranks."""
    import tiktoken
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    ranks = tiktoken.get_encoding('gpt2')._mergeable_ranks
    alphabet = byte_characters()

    def text(token):
        return ''.join(alphabet[b] for b in token)

    merges = [tuple(map(text, merge_of(token, ranks))) for token in sorted(ranks, key=ranks.get) if len(token) > 1]
    tokenizer = Tokenizer(models.BPE(vocab={text(token): rank for token, rank in ranks.items()}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken('<|endoftext|>', normalized=False)])
    return tokenizer


def train_bpe(texts, size):
    """A byte-level BPE of at most `size` tokens, learned from texts: <|endoftext|>, 256 bytes, and the most frequent
    merges within the words of GPT-2's expression. -> {name: bytes} of its files
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    end = '<|endoftext|>'
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=[end], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(texts, trainer)
    settings = {'tokenizer_class': 'PreTrainedTokenizerFast', 'eos_token': end}
    return {'tokenizer.json': tokenizer.to_str(pretty=True).encode(),
            'tokenizer_config.json': json.dumps(settings, indent=2).encode() + b'\n'}


def character_tokenizer(stoi):
    """One token per character; a character that the table lacks is an error."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel(vocab=stoi, unk_token=''))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r'[\s\S]'), behavior='isolated')
    tokenizer.decoder = decoders.Fuse()
    return tokenizer
