"""
OpenWebText in GPT-2's tokens: about 9 billion for training and 4.4 million for validation, each document closed
by <|endoftext|> (50256). The download takes about 54 GB of disk, train.bin 17 GB.

    python data/openwebtext/prepare.py [--input=PATH] [--num_proc=8]

With --input, each text file is one document.
"""

import functools
import os
import sys

import numpy as np

here = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(here))
import common

encoding = functools.cache(common.gpt2_encoding)  # once in each of datasets' worker processes


def tokenize(batch):
    enc = encoding()
    ids = [tokens + [enc.eot_token] for tokens in enc.encode_ordinary_batch(batch['text'], num_threads=1)]
    return {'ids': ids, 'len': [len(tokens) for tokens in ids]}


if __name__ == '__main__':
    from datasets import load_dataset
    from tqdm import tqdm

    parser = common.argument_parser(__doc__)
    parser.add_argument('--num_proc', type=int, default=max(1, (os.cpu_count() or 2) // 2), help='worker processes')
    args = parser.parse_args()
    enc = encoding()

    if args.input:
        files = common.text_files(args.input)
        if len(files) < 2:
            common.stop(f'--input={args.input}: two documents at least, one for training and one for validation')
        documents = load_dataset('text', data_files=files, sample_by='document', split='train')
    else:
        try:
            documents = load_dataset('Skylion007/openwebtext', split='train', num_proc=args.num_proc)
        except Exception as e:  # the hub's errors have no common class
            common.stop(f'download failed ({type(e).__name__}: {str(e)[:200]}). By hand: fetch '
                        'Skylion007/openwebtext from the Hugging Face hub, unpack its text files into a folder, '
                        'and run this script again with --input=FOLDER')

    splits = documents.train_test_split(test_size=0.0005, seed=2357, shuffle=True)
    splits['val'] = splits.pop('test')
    splits = splits.map(tokenize, batched=True, remove_columns=['text'], num_proc=args.num_proc, desc='tokenizing')

    dtype = common.token_dtype(enc.n_vocab)
    for split, data in splits.items():
        path = os.path.join(here, f'{split}.bin')
        out = np.memmap(path + '.tmp', dtype=dtype, mode='w+', shape=(int(np.sum(data['len'], dtype=np.int64)),))
        end = 0
        for batch in tqdm(data.with_format('numpy', columns=['ids']).iter(1024), total=-(-len(data) // 1024),
                          desc=f'writing {path}'):
            ids = np.concatenate(list(batch['ids']))
            out[end:end + len(ids)] = ids
            end += len(ids)
        out.flush()
        os.replace(path + '.tmp', path)
        print(f'{split}: {end:,} tokens')
