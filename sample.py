"""
Generates text from a checkpoint that train.py wrote.

    python sample.py --out_dir=out-demo --start="def " --num_samples=3 --max_new_tokens=200
    python sample.py --out_dir=out-demo --start=FILE:prompt.txt --num_samples=1 --temperature=0
    python sample.py --init_from=DIR --start="The "    # a DeepSeek checkpoint in Hugging Face's format
"""

import os
import signal
import sys
import time

if not os.path.isdir(os.path.join(os.path.dirname(os.path.abspath(__file__)), 'extras')):
    print("this sample.py needs the folder extras/; with model.py and train.py alone, use nanoGPT's sample.py",
          file=sys.stderr)
    sys.exit(2)

import configurator  # noqa: F401 (Ctrl-C during the slow imports is one line)

if hasattr(signal, 'SIGPIPE'):  # Windows has none
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # a reader that leaves, as `head` does, ends it silently

import torch

from extras import guard, scripts
from extras.decode import Decoder, for_decoding
from extras.tokenizer import of_checkpoint
from model import Mistake

# -----------------------------------------------------------------------------
init_from = 'resume'  # the checkpoint in out_dir, or the path of a folder in Hugging Face's format
out_dir = 'out'
start = '\n'  # the prompt; FILE:prompt.txt reads it from a file
num_samples = 10  # generated together, as one batch
max_new_tokens = 500
temperature = 0.8  # 0, or less than 1e-6: always the likeliest token
top_k = 200  # 0: every token may be drawn
speculative = False  # the MTP modules draft and the main stack verifies
seed = 1337
device = scripts.default_device()
dtype = ''  # 'float32', 'bfloat16' or 'float16'; '': that of the training run
compile = False  # torch.compile the decoding step, which takes half a minute
compile_from = 3000  # ... as is done anyway for so many steps
exec(open(os.path.join(os.path.dirname(__file__), 'configurator.py')).read())
# -----------------------------------------------------------------------------
guard.check_ranges(globals(), [
    ('init_from', lambda x: x == 'resume' or os.path.isdir(x),
     "be 'resume' or a folder that exists, with a checkpoint of the DeepSeek-V2 or V3 family (GPT-2's weights do not "
     'fit this architecture)'),
    ('out_dir', lambda x: x != '', 'name the folder of a run'),
    ('num_samples', lambda x: x > 0, 'be positive'),
    ('max_new_tokens temperature top_k', lambda x: x >= 0, 'not be negative'),
    ('seed', lambda x: -2**63 <= x < 2**64, 'fit in 64 bits'),
    ('dtype', lambda x: x in ('', *guard.DTYPES), "be 'float32', 'bfloat16' or 'float16'"),
    ('start', lambda x: x[:5].upper() != 'FILE:' or x[:5] == 'FILE:' or x[5:6].isspace(),
     'begin with FILE: in capitals if it names a file'),
])
guard.check_device(device)
if start.startswith('FILE:'):
    start = scripts.read_text(start[5:])

# the model and the prompt; a folder's tokenizer and the prompt come before its weights, which may be large
if init_from == 'resume':
    model, checkpoint, tokenizer = scripts.load_checkpoint(out_dir, device)
else:
    checkpoint, tokenizer = {}, of_checkpoint(init_from)
prompt = tokenizer.begin + tokenizer.encode(start)
guard.need(prompt, 'start is an empty prompt: give it at least one token')
if init_from != 'resume':
    from extras import hf
    model = hf.from_pretrained(init_from).to(device)
guard.need(max(prompt) < model.config.vocab_size, f'{tokenizer.name} does not fit the model: the prompt has the token '
           f'{max(prompt)}, the vocabulary {model.config.vocab_size}')
guard.need(len(model.mtp) > 0 or not speculative, 'speculative=True needs MTP modules, and this model has none')
scripts.use_kernels(model.eval())
dtype = dtype or (checkpoint.get('config') or {}).get('dtype') or 'float32'
model = for_decoding(model, getattr(torch, dtype))
scripts.use_few_threads(model, num_samples)

# generate
total = len(prompt) + max_new_tokens
context = min(total, model.config.block_size)
decoder = Decoder(model, compile or context - len(prompt) >= compile_from)
needed = num_samples * (decoder.bytes_per_row(context, len(model.mtp) if speculative else 0) + 8 * total)
try:
    torch.empty(needed, dtype=torch.uint8, device=device)
except (RuntimeError, TypeError):  # TypeError: a number beyond 64 bits
    raise Mistake(f'num_samples={num_samples} of {total} tokens need {needed / 1e9:,.0f} GB of memory: lower '
                  'num_samples or max_new_tokens') from None
torch.manual_seed(seed)
stop_token = model.config.eos_token_id if model.config.eos_token_id >= 0 else tokenizer.end
t0 = time.perf_counter()
prompts = [prompt] * num_samples
rows, speculation = decoder.generate(prompts, max_new_tokens, temperature, top_k, stop_token, speculative)
dt = time.perf_counter() - t0 - decoder.compile_seconds

# print
for row in rows:
    text = tokenizer.decode(row[:-1] if row[-1] == stop_token and len(row) > len(prompt) else row)
    print(scripts.for_output(text))
    print('---------------')
made = sum(map(len, rows)) - num_samples * len(prompt)
if decoder.compile_seconds:
    print(f'compiled in {decoder.compile_seconds:.1f} s')
print(f'{made} tokens in {dt:.2f} s: {made / dt:.1f} tokens/s')
if speculative:
    passes, tokens, drafts, accepted = (count.sum(dim=0) for count in speculation)
    rates = ', '.join(f'module {k} {100 * a / max(n, 1):.0f}%'
                      for k, (a, n) in enumerate(zip(accepted.tolist(), drafts.tolist()), start=1))
    print(f'accepted drafts: {rates}; {tokens / passes:.2f} tokens per sample and pass' if passes > 0 else
          'no draft was verified: a first token, and tokens past block_size, are decoded plainly')
