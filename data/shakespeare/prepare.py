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
import common

args = common.parse(common.argument_parser(__doc__, tokens=True))
folder = common.data_folder(here, args, "a tokenizer.json's tokens" if args.tokenizer else 'GPT-2 tokens')
bpe = common.load_tokenizer(args.tokenizer)
texts = common.read_texts(args) if args.input else [common.tiny_shakespeare(here)]
try:
    if args.tokenizer:
        train, val = common.split_text([i for text in texts for i in common.document(bpe, text)])
    else:
        train, val = (bpe.encode(part) for part in common.split_text('\n'.join(texts)))
except ValueError as e:
    common.stop(e)
common.write_splits(folder, train, val, bpe.vocab_size, common.token_meta(bpe.vocab_size, bpe.sha256))
common.say_where(folder, args.tokenizer)
