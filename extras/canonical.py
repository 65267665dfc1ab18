"""
Canonical token ids (Engram section 2, tokenizer compression): tokens whose texts differ only in case, accents, width or
white space share one id, and with it the rows of Engram's tables. A new run takes them from its data's tokenizer; they
are saved in the checkpoint.
"""

import os
import re
import unicodedata

import torch

from extras import tokenizer


def normal_form(text):
    """The text after NFKC, NFD, without accents, in lower case, each white space one space and none at the ends."""
    text = unicodedata.normalize('NFD', unicodedata.normalize('NFKC', text))
    text = ''.join(ch.lower() for ch in text if unicodedata.category(ch)[0] != 'M')
    text = re.sub('[ \t\r\n]+', ' ', text)
    return text if text == ' ' else text.strip()


def canonical_ids(speaks):
    """Tokenizer -> for each of its tokens the first one of the same normal form. Parts of characters stay apart."""
    first, ids = {}, []
    for i in range(speaks.vocab_size):
        text = speaks.decode([i])
        form = i if '\ufffd' in text else normal_form(text) or i
        ids.append(first.setdefault(form, i))
    return ids


def begin(model, init_from, data_dir, meta):
    """For train.py: give a new model with memories the ids of its data's tokenizer. Characters keep their own ids, and
    so do tokens that no tokenizer here spells.
    """
    memories = model.memories() if init_from == 'scratch' and hasattr(model, 'memories') else []
    V = model.config.vocab_size
    known = 'tokenizer' in meta or os.path.exists(os.path.join(data_dir, 'tokenizer.json')) or 50257 <= V <= 51200
    if not memories or meta.get('stoi') or not known:
        return
    ids = canonical_ids(tokenizer.of_checkpoint(data_dir, meta, V))[:V]
    for memory in memories:
        memory.canonical[:len(ids)] = torch.tensor(ids)
    if os.environ.get('RANK', '0') == '0':
        print(f'Engram: {len(ids):,} tokens have {len(set(ids)):,} canonical ids')
