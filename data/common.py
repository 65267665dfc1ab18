"""What the prepare.py scripts share: reading text, GPT-2's tokenizer, and writing the files that train.py reads."""

import argparse
import os
import pickle
import sys
import urllib.request

import numpy as np

TINY_SHAKESPEARE = 'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt'


def stop(message):
    """A mistake of the user's: one line, and exit code 2."""
    print(message, file=sys.stderr)
    raise SystemExit(2)


def argument_parser(doc):
    parser = argparse.ArgumentParser(description=doc, usage=argparse.SUPPRESS,  # the docstring has it
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--input', metavar='PATH', help='a local text file, or a folder of .txt and .md files, instead')
    return parser


def text_files(path):
    """The text files that --input names, sorted."""
    if os.path.isfile(path):
        return [path]
    files = sorted(os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names
                   if name.endswith(('.txt', '.md')))
    if not files:
        stop(f'--input={path}: no such text file, and no folder with .txt or .md files in it')
    return files


def read_text(path):
    parts = []
    for name in text_files(path):
        try:
            with open(name, encoding='utf-8') as f:
                parts.append(f.read())
        except (OSError, UnicodeDecodeError) as e:
            stop(f'{name} cannot be read as UTF-8 text: {e}')
    text = '\n'.join(parts)
    if len(text) < 20:
        stop(f'--input={path}: {len(text)} characters are too few to split into train and val')
    return text


def tiny_shakespeare(folder):
    """The text of tiny Shakespeare, downloaded to folder/input.txt the first time."""
    path = os.path.join(folder, 'input.txt')
    if not os.path.exists(path):
        try:
            urllib.request.urlretrieve(TINY_SHAKESPEARE, path + '.tmp')
        except OSError as e:
            stop(f'download failed ({e}). By hand: fetch {TINY_SHAKESPEARE}, and run this script again '
                 f'with --input=FILE')
        os.replace(path + '.tmp', path)
    return read_text(path)


def gpt2_encoding():
    """tiktoken's GPT-2 BPE. It downloads its two tables once, into TIKTOKEN_CACHE_DIR where that is set."""
    try:
        import tiktoken
    except ImportError:
        stop('this needs tiktoken: pip install tiktoken')
    try:
        return tiktoken.get_encoding('gpt2')
    except (OSError, ValueError) as e:
        stop(f'tiktoken could not load the GPT-2 tokenizer ({type(e).__name__}): it downloads it once. By '
             'hand: run it where there is a network, with TIKTOKEN_CACHE_DIR=DIR, and copy DIR')


def token_dtype(vocab_size):
    return np.uint16 if vocab_size <= 2**16 else np.uint32


def write_files(folder, files):
    """{name: bytes}, all written beside, then all renamed: an interrupted run leaves no half-written file."""
    for name, data in files.items():
        with open(os.path.join(folder, name + '.tmp'), 'wb') as f:
            f.write(data)
    for name in files:
        os.replace(os.path.join(folder, name + '.tmp'), os.path.join(folder, name))


def write_splits(folder, train, val, vocab_size, meta=None, masks=None):
    """train.bin and val.bin from lists of token ids, and meta.pkl where train.py or sample.py needs one.

    masks: {'train': list of 0 and 1, 'val': ...}, as long as the tokens: 0 where a token is no target.
    """
    dtype = token_dtype(vocab_size)
    if dtype != np.uint16:
        meta = (meta or {}) | {'vocab_size': vocab_size, 'dtype': np.dtype(dtype).name}
    files = {'train.bin': np.asarray(train, dtype=dtype).tobytes(), 'val.bin': np.asarray(val, dtype=dtype).tobytes()}
    if meta:
        files['meta.pkl'] = pickle.dumps(meta)
    for split, mask in (masks or {}).items():
        files[f'{split}_mask.bin'] = np.asarray(mask, dtype=np.uint8).tobytes()
    write_files(folder, files)
    print(f'train: {len(train):,} tokens\nval: {len(val):,} tokens')


def split_text(text):
    """The first 90% of the characters for training, the rest for validation."""
    n = int(len(text) * 0.9)
    return text[:n], text[n:]


def write_characters(folder, text):
    """A character-level data set."""
    itos = dict(enumerate(sorted(set(text))))
    stoi = {ch: i for i, ch in itos.items()}
    print(f'{len(text):,} characters, {len(itos)} of them different')
    train, val = ([stoi[ch] for ch in part] for part in split_text(text))
    write_splits(folder, train, val, len(itos), {'vocab_size': len(itos), 'itos': itos, 'stoi': stoi})


def rows(examples, stoi, length):
    """The tokens and the mask, for write_splits(), of a data set that has one example a row: a prompt and its response.

    examples: (prompt, response) pairs, a token a character. A response ends with the stop token, character 0, which is
        --eos_token_id=0 in training; grpo.py samples until it comes. The rest of a row is filled up with it.
    length: tokens in a row. meta.pkl has it as 'row_length', so that train.py begins each sequence where a row begins;
        --block_size equals it, so that a sequence is one row. It must hold a prompt and grpo.py's max_new_tokens.

    The mask is 1 where a token is a target: in the response with its stop token, not in the prompt, not in the filling.
    train.py reads one token beyond a row, for the target of the row's last one, so that after the last row comes one
    token more.
    """
    stop_token = next(ch for ch, i in stoi.items() if i == 0)
    tokens, mask = [], []
    for prompt, response in examples:
        line = prompt + response
        if len(line) > length or not response.endswith(stop_token) or not set(line) <= set(stoi):
            stop(f'{line!r} is no row: it must end with {stop_token!r}, with at most {length} characters, all of stoi')
        tokens += [stoi[ch] for ch in line.ljust(length, stop_token)]
        mask += [0] * len(prompt) + [1] * len(response) + [0] * (length - len(line))
    return tokens + [0], mask + [0]
