"""
OpenWebText in GPT-2's tokens: about 9 billion for training and 4.4 million for validation, each document closed
by <|endoftext|> (50256). Or another corpus of the Hugging Face hub, or a folder of your own text files.

    python data/openwebtext/prepare.py [--num_proc=8]
    python data/openwebtext/prepare.py --hub=HuggingFaceFW/fineweb-edu --config=sample-10BT
    python data/openwebtext/prepare.py --input=FOLDER [--glob='*.py']        # each file is one document

All go to data/NAME (--name=NAME), by default as the corpus or folder is called, and take --tokenizer=DIR, a folder with
a tokenizer.json. --hub may also be a local folder with the parquet files of a corpus.

The text is read as a stream and never lies on the disk: train.bin is all that OpenWebText takes, 17 GB. One document
in 2,000 is for validation: nanoGPT's choice (seed 2357, test_size 0.0005) where the number of documents is known
beforehand and below 50 million, else every 2,000th. They stay in the corpus's order, which nanoGPT shuffles.
"""

import os
import sys

here = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(here))
import dataset

# isort: split
import collections
import functools
import itertools
import math
import pickle
import signal
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import numpy as np

load_tokenizer = functools.cache(dataset.load_tokenizer)  # once in each worker process


def describe(error):
    return ' '.join((str(error) or type(error).__name__).split())[:300].rstrip('.')


def tokenize(folder, texts):
    bpe = load_tokenizer(folder)
    ids = [i for text in texts for i in dataset.document(bpe, text)]
    return np.array(ids, dtype=dataset.token_dtype(bpe.vocab_size))


def read_corpus(hub, split, column, **place):
    """Lists of documents from the hub, and how many documents there are, where that is known."""
    from datasets import load_dataset_builder
    builder = load_dataset_builder(hub, **place)
    corpus = builder.as_streaming_dataset(split=split)
    if 'revision' in place:
        folders = sorted({os.path.dirname(file) for file in builder.config.data_files[split]})
        if any('/partial' in folder for folder in folders):
            raise ValueError("it is a script, and the hub's conversion to parquet has only the first part of it")
        if len(folders) > 1:
            raise ValueError(f'one configuration: say --config=NAME, of {", ".join(map(os.path.basename, folders))}')
    batches = corpus.iter(1000)
    first = next(batches, {})
    if column not in first:
        raise ValueError(f'it has no column {column!r}, but {", ".join(first) or "no row"}: say --column=NAME')
    if not all(isinstance(text, str | None) for text in first[column]):
        raise ValueError(f'its column {column!r} is no text: say --column=NAME')

    def texts():
        try:
            for batch in itertools.chain([first], batches):
                yield batch[column]
        except Exception as e:
            dataset.stop(f'--hub={hub} broke off: {describe(e)}')

    return texts(), corpus.info.splits[split].num_examples if split in (corpus.info.splits or {}) else None


def open_corpus(hub, config, split, column):
    try:
        import datasets
        import huggingface_hub
        datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what is wrong is said below
        huggingface_hub.logging.set_verbosity(huggingface_hub.logging.CRITICAL)
        try:  # first what its owner put there, which is whole
            return read_corpus(hub, split, column, name=config)
        except RuntimeError:  # a script, which datasets 4 and later do not run: the hub's own conversion to parquet
            return read_corpus(hub, split, column, revision='refs/convert/parquet', data_dir=config)
    except ImportError:
        dataset.stop('this needs datasets: pip install datasets')
    except Exception as e:  # datasets, huggingface_hub, fsspec and pyarrow have no common class
        dataset.stop(f'--hub={hub}: {describe(e)}. Other ways: --hub=HuggingFaceFW/fineweb-edu --config=sample-10BT, '
                    '--hub=FOLDER with parquet files, --input=FOLDER with text files')


def is_validation(n):
    """Whether the document number i is for validation, of n documents (None: nobody knows how many)."""
    if n is None or n > 50_000_000:
        return lambda i: i % 2000 == 0
    return set(np.random.default_rng(2357).permutation(n)[:math.ceil(n * 0.0005)].tolist()).__contains__


def tokens(pool, folder, batches, n, ahead):
    """Pairs of a split and token ids, in the documents' order, with no more than `ahead` batches under way."""
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
            pending += [(split, pool.submit(tokenize, folder, part)) for split, part in parts.items() if part]
            while len(pending) > ahead:
                split, ids = pending.popleft()
                yield split, ids.result()
            bar.update(len(batch))
        for split, ids in pending:
            yield split, ids.result()


def main():
    parser = dataset.argument_parser(__doc__, tokens=True)
    parser.add_argument('--hub', metavar='NAME', help='a corpus of the hub (default: Skylion007/openwebtext)')
    parser.add_argument('--config', help='which of its configurations')
    parser.add_argument('--column', default='text', help='the column that holds the documents')
    parser.add_argument('--split', default='train', help='the split to read, from which val.bin is taken too')
    parser.add_argument('--num_proc', type=int, default=max(1, (os.cpu_count() or 2) // 2), help='worker processes')
    args = dataset.parse(parser)
    if args.input and args.hub:
        dataset.stop('--input and --hub: one of the two')
    if not 1 <= args.num_proc <= 256:
        dataset.stop(f'--num_proc={args.num_proc} must lie in 1..256')
    kind = "a tokenizer.json's tokens" if args.tokenizer else 'GPT-2 tokens'
    folder = dataset.data_folder(here, args, kind, args.hub)
    files = dataset.text_files(args.input, args.glob) if args.input else []
    if args.input and len(files) < 2:
        dataset.stop(f'--input={args.input}: two documents at least, one for training and one for validation')
    bpe = load_tokenizer(args.tokenizer)
    meta = dataset.token_meta(bpe.vocab_size, bpe.sha256)

    with ProcessPoolExecutor(args.num_proc) as pool:
        pool.submit(int).result()  # starts the workers, before datasets starts threads
        for number in (signal.SIGINT, signal.SIGTERM):  # the workers end at once; here the unfinished files go first
            signal.signal(number, lambda number, _: sys.exit(128 + number))
        if args.input:
            batches, n = ([dataset.read_file(file)] for file in files), len(files)
        else:
            batches, n = open_corpus(args.hub or 'Skylion007/openwebtext', args.config, args.split, args.column)

        count = {'train': 0, 'val': 0}
        with dataset.written(folder, ['train.bin', 'val.bin'] + ['meta.pkl'] * bool(meta)) as out:
            try:
                for split, ids in tokens(pool, args.tokenizer, batches, n, 4 * args.num_proc):
                    out[f'{split}.bin'].write(ids.tobytes())
                    count[split] += len(ids)
            except (ValueError, TypeError) as e:  # a text without tokens, a row without text
                dataset.stop(e)
            except BrokenProcessPool:
                dataset.stop('a worker process died, for want of memory perhaps: try a smaller --num_proc')
            if not all(count.values()):
                dataset.stop(f'too little text: {count["train"]} tokens for training, {count["val"]} for validation')
            if meta:
                pickle.dump(meta, out['meta.pkl'])
    print(f'train: {count["train"]:,} tokens\nval: {count["val"]:,} tokens')
    dataset.say_where(folder, args.tokenizer)


if __name__ == '__main__':
    main()
