"""
Tiny Shakespeare, a token a character: 65 of them, 1,003,854 tokens for training and 111,540 for validation.

    python data/shakespeare_char/prepare.py [--input=PATH]
"""

import os
import sys

here = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(here))
import common

args = common.argument_parser(__doc__).parse_args()
text = common.read_text(args.input) if args.input else common.tiny_shakespeare(here)
common.write_characters(here, text)
