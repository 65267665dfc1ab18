"""
Tiny Shakespeare, a token a character: 65 of them, 1,003,854 tokens for training and 111,540 for validation.

    python data/shakespeare_char/prepare.py
    python data/shakespeare_char/prepare.py --input=PATH [--glob='*.py'] [--name=NAME]    # your own text
    python data/shakespeare_char/prepare.py --vocab=1024 --name=NAME    # the tokens of a BPE trained on the text
"""

import os
import sys

here = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(here))
import dataset

args = dataset.parse(dataset.argument_parser(__doc__))
folder = dataset.data_folder(here, args, dataset.BPE if args.vocab else 'characters')
texts = dataset.read_texts(args) if args.input else [dataset.tiny_shakespeare(here)]
if args.vocab:
    dataset.write_own_tokens(folder, texts, args.vocab)
else:
    dataset.write_characters(folder, '\n'.join(texts))
