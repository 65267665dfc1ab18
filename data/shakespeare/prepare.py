"""
Tiny Shakespeare in GPT-2's tokens: 301,966 for training and 36,059 for validation.

    python data/shakespeare/prepare.py [--input=PATH]
"""

import os
import sys

here = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(here))
import common

args = common.argument_parser(__doc__).parse_args()
text = common.read_text(args.input) if args.input else common.tiny_shakespeare(here)
enc = common.gpt2_encoding()
train, val = (enc.encode_ordinary(part) for part in common.split_text(text))
common.write_splits(here, train, val, enc.n_vocab)
