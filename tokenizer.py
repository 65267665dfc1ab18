"""
The tokenizers that a checkpoint can speak: the characters of its data, GPT-2's BPE, or the tokenizer.json that came
with it from Hugging Face. Every function here raises a ValueError, in one line, where there is no such tokenizer.
"""

import hashlib
import json
import os
from collections.abc import Callable
from typing import NamedTuple


class Tokenizer(NamedTuple):
    name: str             # in words
    encode: Callable      # text -> token ids, without `begin`; ValueError for a text that it has no tokens for
    decode: Callable      # token ids -> text
    vocab_size: int
    begin: list           # ids that stand before every document and prompt: the BOS, or nothing
    end: int | None       # the id that ends a document
    sha256: str = ''      # of a tokenizer.json, by which data and checkpoints know each other


def characters(stoi, itos):
    """One token per character."""
    def encode(text):
        unknown = sorted(set(text) - set(stoi))
        if unknown:
            raise ValueError(f'this model does not know the characters {"".join(unknown)!r}')
        return [stoi[ch] for ch in text]

    def decode(ids):
        return ''.join(itos.get(i, '') for i in ids)  # a vocabulary may be larger than its characters

    return Tokenizer(f'{len(stoi)} characters', encode, decode, len(stoi), [], None)


def gpt2():
    """GPT-2's byte-level BPE. tiktoken downloads its two tables once, into TIKTOKEN_CACHE_DIR where that is set."""
    try:
        import tiktoken
        bpe = tiktoken.get_encoding('gpt2')
    except ImportError:
        raise ValueError('GPT-2 tokens need tiktoken: pip install tiktoken') from None
    except Exception as e:  # requests has errors of its own
        raise ValueError(f'tiktoken could not load the GPT-2 tokenizer ({type(e).__name__}): it downloads it once. By '
                         'hand: run it where there is a network, with TIKTOKEN_CACHE_DIR=DIR, and copy DIR') from None

    def encode(text):
        return bpe.encode(text, allowed_special={'<|endoftext|>'})

    def decode(ids):
        return bpe.decode([i for i in ids if i < bpe.n_vocab])  # a vocabulary may be padded beyond GPT-2's

    return Tokenizer("GPT-2's byte-level BPE", encode, decode, bpe.n_vocab, [], bpe.eot_token)


def from_folder(folder):
    """The tokenizer.json of a folder, with the BOS that its tokenizer_config.json asks for."""
    path = os.path.join(folder, 'tokenizer.json')
    try:
        import tokenizers
    except ImportError:
        raise ValueError(f'{path} needs tokenizers: pip install tokenizers') from None
    try:
        with open(path, 'rb') as f:
            sha256 = hashlib.sha256(f.read()).hexdigest()
        bpe = tokenizers.Tokenizer.from_file(path)
        settings = {}
        if os.path.exists(os.path.join(folder, 'tokenizer_config.json')):
            with open(os.path.join(folder, 'tokenizer_config.json'), encoding='utf-8') as f:
                settings = json.load(f)
    except Exception as e:  # tokenizers raises plain Exceptions
        raise ValueError(f'{path} cannot be read: {" ".join(str(e).split())[:200]}') from None

    def special(name):
        """The id of a special token, given as a string or as a table with its content."""
        token = settings.get(name)
        return bpe.token_to_id(token.get('content', '') if isinstance(token, dict) else token or '')

    def encode(text):
        try:
            return bpe.encode(text, add_special_tokens=False).ids
        except Exception as e:  # a text that it has no tokens for
            raise ValueError(f'{path} does not know all of {text[:80]!r}: {" ".join(str(e).split())[:200]}') from None

    begin = [special('bos_token')] if settings.get('add_bos_token') and special('bos_token') is not None else []
    return Tokenizer(path, encode, bpe.decode, bpe.get_vocab_size(), begin, special('eos_token'), sha256)


def of_checkpoint(folder, meta, vocab_size):
    """The tokenizer of the checkpoint in a folder, given the meta that it was saved with."""
    if 'stoi' in meta:
        return characters(meta['stoi'], meta['itos'])
    if os.path.exists(os.path.join(folder, 'tokenizer.json')):
        return from_folder(folder)
    if 50257 <= vocab_size <= 50304:  # GPT-2's, padded to a multiple of 64
        return gpt2()
    raise ValueError(f'{folder} has no tokenizer.json, and the vocabulary of {vocab_size} tokens is not GPT-2\'s: put '
                     'the tokenizer.json of its model there')
