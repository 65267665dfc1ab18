"""
Tiny Shakespeare in GPT-2's tokens: 301,966 for training and 36,059 for validation.

    python data/shakespeare/prepare.py
    python data/shakespeare/prepare.py --input=PATH [--glob='*.py'] [--name=NAME]    # your own text
    python data/shakespeare/prepare.py --input=PATH --tokenizer=DIR    # in the tokens of a folder with a tokenizer.json
    python data/shakespeare/prepare.py --input=PATH --vocab=2048    # ... of a BPE trained on the training text

The files of a folder become one running text. With --tokenizer and --vocab each stands between the tokens that begin
and end a document.
"""

import os
import sys

here = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(here))
import dataset

args = dataset.parse(dataset.argument_parser(__doc__, tokens=True))
folder = dataset.data_folder(here, args, dataset.BPE if args.tokenizer or args.vocab else 'GPT-2 tokens')
bpe = dataset.load_tokenizer(args.tokenizer) if not args.vocab else None
texts = dataset.read_texts(args) if args.input else [dataset.tiny_shakespeare(here)]
if args.vocab:
    dataset.write_own_tokens(folder, texts, args.vocab)
elif args.tokenizer:
    dataset.write_documents(folder, texts, args.tokenizer)
else:
    train, val = (bpe.encode(part) for part in dataset.split_text('\n'.join(texts)))
    dataset.write_splits(folder, train, val, bpe.vocab_size)
    dataset.say_where(folder)
