"""
Python's own documentation of the language, a token a character. It comes with the standard library, so this
needs no network: about 465,000 characters, about 100 of them different (both vary with Python's version).

    python data/pydocs_char/prepare.py [--input=PATH]
"""

import os
import sys
from pydoc_data.topics import topics

here = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(here))
import common

args = common.argument_parser(__doc__).parse_args()
text = common.read_text(args.input) if args.input else '\n\n'.join(topics[name] for name in sorted(topics))
common.write_characters(here, text)
