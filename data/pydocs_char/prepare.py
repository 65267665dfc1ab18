"""
Python's own documentation of the language, a token a character. It comes with the standard library, so this
needs no network: about 465,000 characters, about 100 of them different (both vary with Python's version).

    python data/pydocs_char/prepare.py
    python data/pydocs_char/prepare.py --input=PATH [--glob='*.py'] [--name=NAME]    # your own text
    python data/pydocs_char/prepare.py --vocab=1024 --name=NAME    # the tokens of a BPE trained on the text
"""

import os
import sys

here = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(here))
from pydoc_data.topics import topics

import dataset

args = dataset.parse(dataset.argument_parser(__doc__))
folder = dataset.data_folder(here, args, dataset.BPE if args.vocab else 'characters')
texts = dataset.read_texts(args) if args.input else ['\n\n'.join(topics[name] for name in sorted(topics))]
if args.vocab:
    dataset.write_own_tokens(folder, texts, args.vocab)
else:
    dataset.write_characters(folder, '\n'.join(texts))
