"""What the prepare.py scripts share: arguments, reading text, tokens, and writing the files that train.py reads."""

import argparse
import contextlib
import fnmatch
import http.client
import os
import pickle
import re
import signal
import sys
import tempfile
import urllib.request
import zlib

sys.path.insert(1, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # the repository's root
from configurator import mistake, need  # whose import makes a mistake one line and exit code 2
from extras import output

# isort: split
import numpy as np

TINY_SHAKESPEARE = 'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt'


def argument_parser(doc, tokens=False):
    parser = argparse.ArgumentParser(description=doc, usage=argparse.SUPPRESS,  # the docstring has it
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--input', metavar='PATH', help='your own text: a file, or a folder of .txt and .md files')
    parser.add_argument('--glob', metavar='PATTERN', help="which files of that folder instead, such as '*.py'")
    parser.add_argument('--name', help='write the data set to data/NAME; else your own text gives it its name')
    parser.add_argument('--vocab', type=int, metavar='N',
                        help='train a byte-level BPE of N tokens on the training text, and write it beside the data')
    if tokens:
        parser.add_argument('--tokenizer', metavar='DIR', help="a folder with a tokenizer.json, instead of GPT-2's")
    return parser


def parse(parser):
    args = parser.parse_args()
    for flag, value in vars(args).items():
        need(value != '', f'--{flag}= is empty: give it a value, or leave it out')
    need(not args.glob or args.input and os.path.isdir(args.input),
         f'--glob={args.glob} needs a folder: --input=FOLDER')
    if args.vocab is not None:
        need(257 <= args.vocab <= 2**20, f'--vocab={args.vocab} must lie in 257..2**20: 256 bytes and an end of text')
        need(not getattr(args, 'tokenizer', None), '--vocab and --tokenizer: one of the two')
        need(args.name or args.input or getattr(args, 'hub', None), f'--vocab={args.vocab} needs a --name=NAME: the '
             'folder of this script is for its own tokens')
    return args


BPE = "a tokenizer.json's tokens"  # a kind of data set


def kind_of(folder):
    """What the data set in a folder is made of; None if there is none"""
    if not os.path.exists(os.path.join(folder, 'train.bin')):
        return None
    if os.path.exists(os.path.join(folder, 'train_mask.bin')):
        return 'rows with masks'
    try:
        with open(os.path.join(folder, 'meta.pkl'), 'rb') as f:
            meta = f.read()  # never unpickled here: its keys are plain to see
    except FileNotFoundError:
        return 'GPT-2 tokens'
    return 'characters' if b'stoi' in meta else BPE if b'tokenizer' in meta else 'GPT-2 tokens'


def data_folder(here, args, kind, source=None):
    """data/NAME: the script's own folder, or by --name, or as the source is called, which --input is unless given."""
    source = source or args.input
    name = args.name
    if source and not name:
        name = os.path.basename(os.path.abspath(source))
        name = os.path.splitext(name)[0] if os.path.isfile(source) else name
    folder = os.path.join(os.path.dirname(here), name) if name is not None else here
    need(name is None or re.fullmatch(r'[\w.-]+', name) and name[0] not in '.-',
         f'{name!r} cannot name a data set: say --name=NAME, in letters, digits, _, - and . alone')
    need(not os.path.exists(os.path.join(folder, 'prepare.py')) or folder == here and not source,
         f'data/{name} is the folder of a data set that comes with this repository: say another --name=NAME')
    need(os.path.isdir(folder) or not os.path.exists(folder), f'data/{name} is no folder: say another --name=NAME')
    need(kind_of(folder) in (None, kind), f'{os.path.relpath(folder)} holds {kind_of(folder)}, and these are {kind}: '
         'say another --name=NAME, or remove its .bin files and meta.pkl first')
    return folder


def text_files(path, pattern=None):
    """The text files that --input names, sorted: the file, or a folder's by --glob, without hidden folders."""
    def unreadable(error):
        raise error

    if os.path.isfile(path):
        return [path]
    need(os.path.isdir(path), f'--input={path}: no such text file or folder')
    files = []
    for folder, folders, names in os.walk(path, onerror=unreadable):
        folders[:] = [name for name in folders if not name.startswith('.')]
        for file in (os.path.join(folder, name) for name in names):
            tried = os.path.basename(file), os.path.relpath(file, path)
            if any(fnmatch.fnmatch(t, p) for t in tried for p in ([pattern] if pattern else ['*.txt', '*.md'])):
                files.append(file)
    need(files, f'--input={path}: no {pattern or ".txt or .md"} files in this folder'
         + ('' if pattern else ": --glob='*.py' would take others"))
    return sorted(files)


def read_file(path):
    try:
        with open(path, encoding='utf-8-sig') as f:  # without the mark that Windows puts first
            return f.read()
    except UnicodeDecodeError as e:
        raise mistake(f'{path} is no UTF-8 text: {e}; convert it to UTF-8, as iconv does') from None


def read_texts(args):
    """The text of each file that --input names."""
    texts = [read_file(name) for name in text_files(args.input, args.glob)]
    n = sum(map(len, texts))
    need(n >= 20, f'--input={args.input}: {n} characters are too few to split into train and val')
    return texts


def tiny_shakespeare(folder):
    """The text of tiny Shakespeare, downloaded to folder/input.txt the first time."""
    path = os.path.join(folder, 'input.txt')
    if not os.path.exists(path):
        try:
            text = urllib.request.urlopen(TINY_SHAKESPEARE).read()
        except (OSError, http.client.HTTPException) as e:
            raise mistake(f'download failed ({e}). By hand: fetch {TINY_SHAKESPEARE} to {os.path.relpath(path)}, and '
                          'run this script again') from None
        write_files(folder, {'input.txt': text})
    return read_file(path)


def load_tokenizer(folder):
    """The tokenizer of the folder that --tokenizer names, or GPT-2's."""
    from extras import tokenizer  # a slow import
    return tokenizer.from_folder(folder, special=False) if folder else tokenizer.gpt2(special=False)


@contextlib.contextmanager
def own_tokenizer(texts, vocab):
    """A folder, as --tokenizer names one, with a BPE of `vocab` tokens that is trained on the texts."""
    from extras import tokenizer
    with tempfile.TemporaryDirectory() as folder:
        for name, data in tokenizer.train_bpe(texts, vocab).items():
            with open(os.path.join(folder, name), 'wb') as f:
                f.write(data)
        size = load_tokenizer(folder).vocab_size
        print(f'a tokenizer of {size:,} tokens' + f': the text has no more merges, --vocab={vocab}' * (size < vocab))
        yield folder


def document(bpe, text):
    """A document's token ids, between those that begin and end one."""
    return bpe.begin + bpe.encode(text) + ([] if bpe.end is None else [bpe.end])


def token_dtype(vocab_size):
    return np.uint16 if vocab_size <= 2**16 else np.uint32


def token_meta(vocab_size, sha256=''):
    """meta.pkl for tokens: none for GPT-2's, as in nanoGPT."""
    meta = {'vocab_size': vocab_size, 'tokenizer': sha256} if sha256 else {}
    if token_dtype(vocab_size) != np.uint16:
        meta |= {'vocab_size': vocab_size, 'dtype': np.dtype(token_dtype(vocab_size)).name}
    return meta


def tokenizer_files(folder):
    """{name: bytes} of the folder that --tokenizer names, if any. They go with the data, and train.py copies them to
    the checkpoint.
    """
    from extras import tokenizer
    return tokenizer.tokenizer_files(folder) if folder else {}


def remove(folder, names):
    for name in names:
        with contextlib.suppress(FileNotFoundError):
            os.remove(os.path.join(folder, name))


def put_in_place(folder, names, others, descriptor):
    """Rename the finished files to their names, and remove the others, which an earlier data set in the folder has.

    An earlier train.bin goes first, and the new one comes last: without it there is no data set. So neither kill -9 nor
    a power failure can leave the files of two data sets side by side.
    """
    def reach_the_disk():
        if descriptor is not None:
            os.fsync(descriptor)

    if 'train.bin' in names:
        remove(folder, ['train.bin'])
        reach_the_disk()
        remove(folder, others)
    for name in sorted(names, key=lambda name: name == 'train.bin'):
        if name == 'train.bin':
            reach_the_disk()
        os.replace(os.path.join(folder, name + '.tmp'), os.path.join(folder, name))
    reach_the_disk()


@contextlib.contextmanager
def written(folder, names):
    """Files to write to, NAME.tmp each; they get their names when all are whole. A failure, Ctrl-C or SIGTERM leaves
    none of them. What kill -9 leaves, the next run removes.
    """
    from extras.tokenizer import TOKENIZER_FILES
    others = {'val.bin', 'meta.pkl', 'train_mask.bin', 'val_mask.bin', *TOKENIZER_FILES} - set(names)
    descriptor, files = None, {}
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def set_signals(*values):
        for number, handler in zip(handlers, values):
            signal.signal(number, handler)

    set_signals(handlers[signal.SIGINT], lambda *_: sys.exit(143))
    try:
        os.makedirs(folder, exist_ok=True)
        for path in (os.path.join(folder, name) for name in names):
            need(not os.path.isdir(path), f'{os.path.relpath(path)} is a folder: remove it')
        descriptor = output.lock(folder)
        remove(folder, [name + '.tmp' for name in {*names, *others}])
        for name in names:
            files[name] = open(os.path.join(folder, name + '.tmp'), 'wb')
        yield files
        for file in files.values():
            file.flush()
            os.fsync(file.fileno())
            file.close()
        set_signals(signal.SIG_IGN, signal.SIG_IGN)  # the rest takes a moment
        put_in_place(folder, names, others, descriptor)
    except BlockingIOError:
        raise mistake(f'another prepare.py is writing to {os.path.relpath(folder)}: wait for its end') from None
    except OSError as e:
        raise mistake(f'{os.path.relpath(folder)} cannot be written: {e}') from None
    finally:
        set_signals(signal.SIG_IGN, signal.SIG_IGN)
        for file in files.values():
            with contextlib.suppress(OSError):
                file.close()
        remove(folder, [name + '.tmp' for name in files])
        if descriptor is not None:
            os.close(descriptor)
        set_signals(*handlers.values())


def write_files(folder, files):
    """{name: bytes}: all written under other names, then renamed."""
    with written(folder, files) as out:
        for name, data in files.items():
            out[name].write(data)


def write_splits(folder, train, val, vocab_size, meta=None, masks=None, tokenizer=None, more=None, val_bytes=0):
    """train.bin and val.bin from lists of token ids, and meta.pkl where train.py or sample.py needs one.

    val_bytes: of the validation text in UTF-8. meta.pkl keeps the ratio, by which train.py shows bits per byte.
    tokenizer: the folder whose tokenizer.json made the tokens, if one did.
    masks: {'train': list of 0 and 1, 'val': ...}, as long as the tokens: 0 where a token is no target.
    more: {name: bytes} of other files that belong to them, such as grpo.py's prompts.
    """
    dtype = token_dtype(vocab_size)
    meta = (meta or {}) | token_meta(vocab_size)
    files = {'train.bin': np.asarray(train, dtype=dtype).tobytes(), 'val.bin': np.asarray(val, dtype=dtype).tobytes()}
    files |= tokenizer_files(tokenizer) | (more or {})
    for split, mask in (masks or {}).items():
        files[f'{split}_mask.bin'] = np.asarray(mask, dtype=np.uint8).tobytes()
    if meta and val_bytes:
        meta['bytes_per_token'] = val_bytes / len(val)
    if meta:  # with checksums, so that train.py notices a file that was cut, changed or mixed up
        meta['crc32'] = {name: zlib.crc32(data) for name, data in files.items() if name.endswith('.bin')}
        files['meta.pkl'] = pickle.dumps(meta)
    write_files(folder, files)
    print(f'train: {len(train):,} tokens\nval: {len(val):,} tokens')


def say_where(folder, tokenizer_folder=None, config='config/demo.py'):
    """The last line of a prepare script: the run that it names is small unless the corpus is large."""
    has_model = tokenizer_folder and os.path.exists(os.path.join(tokenizer_folder, 'config.json'))
    start = f'--init_from={tokenizer_folder}' if has_model else config
    name = os.path.basename(folder)
    print(f'into {os.path.relpath(folder)}. To train on it: python train.py {start} --dataset={name} '
          f'--out_dir=out-{name}')


def split_text(text):
    """The first 90% for training, the rest for validation."""
    n = int(len(text) * 0.9)
    return text[:n], text[n:]


def utf8_size(text):
    return len(text.encode('utf-8', errors='surrogatepass'))


def write_characters(folder, text):
    """A character-level data set."""
    itos = dict(enumerate(sorted(set(text))))
    stoi = {ch: i for i, ch in itos.items()}
    print(f'{len(text):,} characters, {len(itos)} of them different')
    train, val = split_text(text)
    meta = {'vocab_size': len(itos), 'itos': itos, 'stoi': stoi}
    write_splits(folder, *([stoi[ch] for ch in part] for part in (train, val)), len(itos), meta,
                 val_bytes=utf8_size(val))
    say_where(folder)


def cut(texts):
    """-> the parts of the texts in the first 90% of all characters, and the parts behind: an empty one if none is"""
    left, train, val = int(0.9 * sum(map(len, texts))), [], []
    for text in texts:
        train.append(text[:left])
        val.append(text[left:])
        left = max(0, left - len(text))
    return train, val


def write_documents(folder, texts, tokenizer):
    """A data set in the tokens of the folder `tokenizer`. Each text is a document; one that the border of the splits
    cuts begins in the one and ends in the other.
    """
    bpe, train, val, (before, behind) = load_tokenizer(tokenizer), [], [], cut(texts)
    for first, rest in zip(before, behind):
        if first and rest:
            train += bpe.begin + bpe.encode(first)
            val += bpe.encode(rest) + ([] if bpe.end is None else [bpe.end])
        elif first or rest:  # an empty text is no document
            split = train if first else val
            split += document(bpe, first or rest)
    write_splits(folder, train, val, bpe.vocab_size, token_meta(bpe.vocab_size, bpe.sha256), tokenizer=tokenizer,
                 val_bytes=sum(map(utf8_size, behind)))
    say_where(folder, tokenizer)


def write_own_tokens(folder, texts, vocab):
    """A data set in the tokens of a BPE that is trained on its training text."""
    with own_tokenizer(filter(None, cut(texts)[0]), vocab) as tokenizer:
        if os.path.exists(os.path.join(folder, 'tokenizer.json')):
            there, new = (load_tokenizer(x).vocab_size for x in (folder, tokenizer))
            need(there == new, f'{os.path.relpath(folder)} is in {there:,} other tokens, which a run may need: say '
                 f'another --name=NAME, or remove its tokenizer.json first')
        write_documents(folder, texts, tokenizer)


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
        need(len(line) <= length and response.endswith(stop_token) and set(line) <= set(stoi), f'{line!r} is no row: '
             f'it must end with {stop_token!r}, with at most {length} characters, all of stoi')
        tokens += [stoi[ch] for ch in line.ljust(length, stop_token)]
        mask += [0] * len(prompt) + [1] * len(response) + [0] * (length - len(line))
    return tokens + [0], mask + [0]


def write_lines(folder, lines, answers, chars, length=None):
    """A data set of rows, of one line each, and grpo.py's prompts: for the tasks that are made by rule.

    lines: {'train': lines 'PROMPT=RESPONSE' with their newline, 'val': ...}; answers: {split: (prompt, answer) pairs}
    chars: all characters, the newline first. length: tokens in a row; None: what the longest line needs
    """
    longest = max(map(len, lines['train'] + lines['val']))
    length = -(-longest // 8) * 8 if length is None else length
    need(longest <= length <= 4096, f'--length={length} must lie in {longest}..4096')
    itos = dict(enumerate(chars))
    stoi = {ch: i for i, ch in itos.items()}

    def rows_of(split):
        ends = [(line, line.index('=') + 1) for line in lines[split]]
        return rows([(line[:end], line[end:]) for line, end in ends], stoi, length)

    (train, train_mask), (val, val_mask) = map(rows_of, ('train', 'val'))
    prompts = {f'{split}_prompts.txt': ''.join(f'{prompt}\t{answer}\n' for prompt, answer in pairs).encode()
               for split, pairs in answers.items()}
    meta = {'vocab_size': len(chars), 'itos': itos, 'stoi': stoi, 'row_length': length}
    write_splits(folder, train, val, len(chars), meta, {'train': train_mask, 'val': val_mask}, more=prompts)
    print(f'{len(lines["train"]):,} lines in rows of {length} tokens (--block_size={length}), such as\n'
          f'{lines["train"][0]}into {folder}')
