"""
OpenWebText in GPT-2's tokens: about 9 billion for training and 4.4 million for validation, each document closed
by <|endoftext|> (50256). Or another corpus of the Hugging Face hub, or a folder of your own text files.

    python data/openwebtext/prepare.py [--num_proc=8]
    python data/openwebtext/prepare.py --hub=HuggingFaceFW/fineweb-edu --config=sample-10BT
    python data/openwebtext/prepare.py --input=FOLDER [--glob='*.py']        # each file is one document

All go to data/NAME (--name=NAME), by default as the corpus or folder is called. They take --tokenizer=DIR, a folder
with a tokenizer.json, or --vocab=N: a BPE of N tokens, trained on the first 100 million characters for training. --hub
may also be a local folder with the parquet files of a corpus.

The text is read as a stream and never lies on the disk: train.bin is all that OpenWebText takes, 17 GB. One document
in 2,000 is for validation: nanoGPT's choice (seed 2357, test_size 0.0005) where the number of documents is known
beforehand and below 50 million, else every 2,000th. They stay in the corpus's order, which nanoGPT shuffles.
"""

import collections
import functools
import itertools
import math
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import zlib
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

here = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(here))
import dataset
from dataset import mistake, need

# isort: split
import numpy as np

VOCAB_CHARACTERS = 10**8  # the text that --vocab trains on
MOST_WORKERS = 61 if os.name == 'nt' else 256  # Windows waits for no more processes at a time

load_tokenizer = functools.cache(dataset.load_tokenizer)  # once in each worker process


def said(error):
    return ' '.join(str(error).split())[:200].rstrip('.') or type(error).__name__


def start_worker(receiver, sender):
    """Signals end a worker at once. So does the end of the main process, even by kill -9: it alone keeps the sender, so
    the receiver then has nothing to wait for.
    """
    def end_with_main():
        receiver.poll(None)
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sender.close()
    threading.Thread(target=end_with_main, daemon=True).start()


def tokenize(folder, texts):
    bpe = load_tokenizer(folder)
    ids = [i for text in texts for i in dataset.document(bpe, text)]
    return np.array(ids, dtype=dataset.token_dtype(bpe.vocab_size))


def open_corpus(hub, config, split, column):
    """Lists of documents from the hub, and the number of documents, None if it is unknown."""
    import datasets
    import huggingface_hub
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what is wrong is said below
    huggingface_hub.logging.set_verbosity(huggingface_hub.logging.CRITICAL)
    try:
        try:  # first what its owner put there, which is whole
            builder = datasets.load_dataset_builder(hub, name=config)
        except RuntimeError:  # a script, which datasets 4 and later do not run: the hub's own conversion to parquet
            builder = datasets.load_dataset_builder(hub, revision='refs/convert/parquet', data_dir=config)
            folders = sorted({os.path.dirname(file) for file in builder.config.data_files[split]})
            need(not any('/partial' in folder for folder in folders),
                 "it is a script, and the hub's conversion to parquet has only the first part of it")
            names = ', '.join(map(os.path.basename, folders))
            need(len(folders) == 1, f'it has several configurations: say --config=NAME, one of {names}')
        corpus = builder.as_streaming_dataset(split=split)
        batches = corpus.iter(1000)
        first = next(batches, {})
        need(column in first, f'it has no column {column!r}, but {", ".join(first) or "no row"}: say --column=NAME')
    except Exception as e:  # datasets, huggingface_hub, fsspec and pyarrow have no common class
        raise mistake(f'--hub={hub}: {said(e)}. Other ways: --hub=HuggingFaceFW/fineweb-edu '
                      '--config=sample-10BT, --hub=FOLDER with parquet files, --input=FOLDER with text files') from None
    splits = corpus.info.splits or {}
    n = splits[split].num_examples if split in splits else None
    return read_corpus(hub, itertools.chain([first], batches), column), n


def read_corpus(hub, batches, column):
    try:
        for batch in batches:
            need(all(isinstance(text, str | None) for text in batch[column]),
                 f'its column {column!r} is no text: say --column=NAME')
            yield batch[column]
    except Exception as e:
        raise mistake(f'--hub={hub} cannot be read: {said(e)}') from None


def is_validation(n):
    """A function of a document's number: True if the document is for validation. n documents, None if unknown."""
    if n is None or n > 50_000_000:
        return lambda i: i % 2000 == 0
    return set(np.random.default_rng(2357).permutation(n)[:math.ceil(n * 0.0005)].tolist()).__contains__


def training_text(batches, n):
    """The documents for training, up to VOCAB_CHARACTERS."""
    held_out, size = is_validation(n), 0
    for i, text in enumerate(itertools.chain.from_iterable(batches)):
        if text and not held_out(i):
            yield text
            size += len(text)
        if size > VOCAB_CHARACTERS:
            break


def tokens(pool, folder, batches, n, ahead):
    """(split, token ids, bytes of text), in the documents' order, with no more than `ahead` batches under way."""
    from tqdm import tqdm
    held_out, i = is_validation(n), 0
    pending = collections.deque()
    with tqdm(total=n, unit=' documents', unit_scale=True) as bar:
        for batch in batches:
            parts = {'train': [], 'val': []}
            for text in batch:
                if text:
                    parts['val' if held_out(i) else 'train'].append(text)
                i += 1
            pending += [(split, pool.submit(tokenize, folder, part), sum(map(dataset.utf8_size, part)))
                        for split, part in parts.items() if part]
            while len(pending) > ahead:
                split, ids, size = pending.popleft()
                yield split, ids.result(), size
            bar.update(len(batch))
        for split, ids, size in pending:
            yield split, ids.result(), size


def write(folder, tokenizer, parts):
    """The data set, from tokens(). tokenizer: the folder that they are of, None for GPT-2's"""
    bpe = load_tokenizer(tokenizer)
    meta, with_it = dataset.token_meta(bpe.vocab_size, bpe.sha256), dataset.tokenizer_files(tokenizer)
    count, size, crc32 = {'train': 0, 'val': 0}, {'train': 0, 'val': 0}, {'train.bin': 0, 'val.bin': 0}
    with dataset.written(folder, ['train.bin', 'val.bin', *['meta.pkl'] * bool(meta), *with_it]) as out:
        try:
            for split, ids, bytes_of_text in parts:
                name, data = f'{split}.bin', ids.tobytes()
                out[name].write(data)
                crc32[name] = zlib.crc32(data, crc32[name])
                count[split] += len(ids)
                size[split] += bytes_of_text
        except BrokenProcessPool:
            raise mistake('a worker process died, for want of memory perhaps: try a smaller --num_proc') from None
        need(all(count.values()),
             f'too little text: {count["train"]} tokens for training, {count["val"]} for validation')
        if meta:
            pickle.dump(meta | {'bytes_per_token': size['val'] / count['val'], 'crc32': crc32}, out['meta.pkl'])
        for name, data in with_it.items():
            out[name].write(data)
    print(f'train: {count["train"]:,} tokens\nval: {count["val"]:,} tokens')
    dataset.say_where(folder, tokenizer, 'config/train_deepseek.py')


def main():
    parser = dataset.argument_parser(__doc__, tokens=True)
    parser.add_argument('--hub', metavar='NAME', help='a corpus of the hub (default: Skylion007/openwebtext)')
    parser.add_argument('--config', help='which of its configurations')
    parser.add_argument('--column', default='text', help='the column that holds the documents')
    parser.add_argument('--split', default='train', help='the split to read, from which val.bin is taken too')
    parser.add_argument('--num_proc', type=int, default=min(MOST_WORKERS, max(1, (os.cpu_count() or 2) // 2)),
                        help='worker processes')
    args = dataset.parse(parser)
    need(not (args.input and args.hub), '--input and --hub: one of the two')
    need(1 <= args.num_proc <= MOST_WORKERS, f'--num_proc={args.num_proc} must lie in 1..{MOST_WORKERS}')
    kind = dataset.BPE if args.tokenizer or args.vocab else 'GPT-2 tokens'
    folder = dataset.data_folder(here, args, kind, args.hub)
    files = dataset.text_files(args.input, args.glob) if args.input else []
    need(not args.input or len(files) > 1,
         f'--input={args.input}: two documents at least, one for training and one for validation')
    if not args.vocab:
        load_tokenizer(args.tokenizer)  # what is wrong with it is said before the corpus is opened

    def documents():
        """Lists of documents, and their number, None if it is unknown."""
        if args.input:
            return ([dataset.read_file(file)] for file in files), len(files)
        return open_corpus(args.hub or 'Skylion007/openwebtext', args.config, args.split, args.column)

    pipe = multiprocessing.Pipe(duplex=False)
    with ProcessPoolExecutor(args.num_proc, initializer=start_worker, initargs=pipe) as pool:
        pool.submit(int).result()  # starts the workers, before datasets starts threads
        if args.vocab:
            with dataset.own_tokenizer(training_text(*documents()), args.vocab) as tokenizer:
                write(folder, tokenizer, tokens(pool, tokenizer, *documents(), 4 * args.num_proc))
        else:
            write(folder, args.tokenizer, tokens(pool, args.tokenizer, *documents(), 4 * args.num_proc))


if __name__ == '__main__':
    main()
