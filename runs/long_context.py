"""
What a decoding step costs after 1k, 4k and 16k tokens: milliseconds, and bytes of cache.

    python runs/long_context.py [config/train_deepseek.py ...] [--lengths=1024,4096,16384] [--dtype=float32]

Each config's model has random weights and random caches: a step's time does not depend on their values. The models take
turns, and each time is the median of --steps steps of one row.
"""

import argparse
import os
import runpy
import statistics
import sys
import time
from dataclasses import fields

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import configurator  # noqa: F401 (a mistake is one line and exit code 2)

# isort: split
import torch
from torch.utils._pytree import tree_leaves

from extras import architecture
from extras.decode import Decoder, for_decoding
from extras.guard import need

CONFIGS = [f'config/train_{name}.py' for name in ('deepseek', 'v32', 'v4')]


def build(path, length, dtype):
    """The model of a config file, without MTP modules, for a context of `length` tokens and some more"""
    settings = runpy.run_path(path)
    GPT, GPTConfig = architecture.named(settings.get('architecture', 'model'))
    own = {field.name: settings[field.name] for field in fields(GPTConfig) if field.name in settings}
    return for_decoding(GPT(GPTConfig(**own | {'block_size': length, 'num_nextn_predict_layers': 0})), dtype)


def state_after(decoder, length, more):
    """A State whose row knows `length` tokens, and has room for `more`. Its caches hold noise."""
    s = decoder.state(1, length + more, 0)
    for cache in tree_leaves(s.caches):
        if cache.is_floating_point():
            cache.normal_()
    s.tokens.random_(decoder.model.config.vocab_size)
    s.known.fill_(length)
    s.end.fill_(length + more)
    s.stop.fill_(-1)
    return s


def main():
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS,  # the docstring has it
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('configs', nargs='*', default=CONFIGS)
    parser.add_argument('--lengths', default='1024,4096,16384')
    parser.add_argument('--dtype', default='float32', choices=('float32', 'bfloat16'))
    parser.add_argument('--steps', type=int, default=20)
    args = parser.parse_args()
    need(all(n.isdecimal() and 0 < int(n) < 2**24 for n in args.lengths.split(',')),
         f'--lengths={args.lengths} must be numbers of tokens with commas')
    need(args.steps > 0, f'--steps={args.steps} must be positive')
    lengths = sorted(map(int, args.lengths.split(',')))
    more = args.steps + 3
    decoders = {}
    for path in args.configs:
        need(path.endswith('.py') and os.path.isfile(path), f'{path} is no config file, such as {CONFIGS[0]}')
        decoders[path] = Decoder(build(path, lengths[-1] + more, getattr(torch, args.dtype)))
    print(f'{"tokens":>8}' + ''.join(f'{os.path.basename(path):>28}' for path in decoders))
    for length in lengths:
        states = {path: state_after(decoder, length, more) for path, decoder in decoders.items()}
        times = {path: [] for path in decoders}
        for _ in range(3 + args.steps):
            for path, decoder in decoders.items():
                start = time.perf_counter()
                decoder.take_step(states[path], 0, False, None)
                times[path].append((time.perf_counter() - start) * 1000)
        row = ''
        for path, decoder in decoders.items():
            size = sum(x.nbytes for x in tree_leaves(decoder.model.make_cache(1, length)))
            row += f'{f"{statistics.median(times[path][3:]):.1f} ms, {size:,} bytes":>28}'
        print(f'{length:>8,}{row}', flush=True)


if __name__ == '__main__':
    main()
