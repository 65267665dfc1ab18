"""
Tiny Shakespeare, a token a character: 65 of them, 1,003,854 tokens for training and 111,540 for validation.

    python data/shakespeare_char/prepare.py
    python data/shakespeare_char/prepare.py --input=PATH [--glob='*.py'] [--name=NAME]    # your own text
"""

import os
import sys

here = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(here))
import dataset

args = dataset.parse(dataset.argument_parser(__doc__))
folder = dataset.data_folder(here, args, 'characters')
text = '\n'.join(dataset.read_texts(args)) if args.input else dataset.tiny_shakespeare(here)
dataset.write_characters(folder, text)
