"""
Tiny Shakespeare in GPT-2's tokens: 301,966 for training and 36,059 for validation.

    python data/shakespeare/prepare.py
    python data/shakespeare/prepare.py --input=PATH [--glob='*.py'] [--name=NAME]    # your own text
    python data/shakespeare/prepare.py --input=PATH --tokenizer=DIR    # in the tokens of a folder with a tokenizer.json

The files of a folder become one running text. With --tokenizer each stands between the tokens that begin and end a
document.
"""

import os
import sys

here = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(here))
import dataset

args = dataset.parse(dataset.argument_parser(__doc__, tokens=True))
folder = dataset.data_folder(here, args, "a tokenizer.json's tokens" if args.tokenizer else 'GPT-2 tokens')
bpe = dataset.load_tokenizer(args.tokenizer)
texts = dataset.read_texts(args) if args.input else [dataset.tiny_shakespeare(here)]
if args.tokenizer:
    train, val = dataset.split_text([i for text in texts for i in dataset.document(bpe, text)])
else:
    train, val = (bpe.encode(part) for part in dataset.split_text('\n'.join(texts)))
meta = dataset.token_meta(bpe.vocab_size, bpe.sha256)
dataset.write_splits(folder, train, val, bpe.vocab_size, meta, tokenizer=args.tokenizer)
dataset.say_where(folder, args.tokenizer)
