"""
Python's own documentation of the language, a token a character. It comes with the standard library, so this
needs no network: about 465,000 characters, about 100 of them different (both vary with Python's version).

    python data/pydocs_char/prepare.py
    python data/pydocs_char/prepare.py --input=PATH [--glob='*.py'] [--name=NAME]    # your own text
"""

import os
import sys

here = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(here))
from pydoc_data.topics import topics

import dataset

args = dataset.parse(dataset.argument_parser(__doc__))
folder = dataset.data_folder(here, args, 'characters')
text = '\n'.join(dataset.read_texts(args)) if args.input else '\n\n'.join(topics[name] for name in sorted(topics))
dataset.write_characters(folder, text)
