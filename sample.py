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

if __name__ == '__main__':  # Ctrl-C, and a reader that leaves as `head` does, end it without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if hasattr(signal, 'SIGPIPE'):  # Windows has none
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    if hasattr(sys.stdout, 'reconfigure'):  # a terminal may lack some of the characters
        sys.stdout.reconfigure(errors='replace')

import torch

from common import DTYPES, default_device, device_type_of, load_checkpoint, stop, use_kernels
from extras.decode import Decoder, for_decoding
from model import first_line
from tokenizer import of_checkpoint

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
device = default_device()
dtype = ''  # 'float32', 'bfloat16' or 'float16'; '': that of the training run
compile = False  # torch.compile the decoding step, which takes half a minute
compile_from = 3000  # ... as is done anyway for so many steps
exec(open(os.path.join(os.path.dirname(__file__), 'configurator.py')).read())
# -----------------------------------------------------------------------------

# what can be wrong without a model
if init_from != 'resume' and not os.path.isdir(init_from):
    stop(f"init_from={init_from!r} must be 'resume' or a folder with a DeepSeek-V2 or V3 family "
         "checkpoint: GPT-2's weights do not fit this architecture")
if not out_dir:
    stop('out_dir is empty: name the folder of ckpt.pt')
if num_samples <= 0 or min(max_new_tokens, temperature, top_k) < 0:
    stop('num_samples must be positive; max_new_tokens, temperature and top_k must not be negative')
if not -2 ** 63 <= seed < 2 ** 64:
    stop(f'seed={seed} must fit in 64 bits')
device_type_of(device)
if dtype not in ('', *DTYPES):
    stop(f"dtype={dtype!r} must be 'float32', 'bfloat16' or 'float16'")
if start.startswith('FILE:'):
    try:
        with open(start[5:], encoding='utf-8') as f:
            start = f.read()
    except (OSError, UnicodeDecodeError) as e:
        stop(f'{start}: {first_line(e)}')
elif start[:5].upper() == 'FILE:' and not start[5:6].isspace():
    stop(f'start={start!r}: write FILE:{start[5:]} to read the prompt from a file')

# the tokenizer and the prompt; those of a folder come before its weights, which may be large
try:
    if init_from == 'resume':
        model, checkpoint, tokenizer = load_checkpoint(out_dir, device)
        config = checkpoint.get('config') or {}
    else:
        import convert
        tokenizer, config = of_checkpoint(init_from), {}
    try:
        prompt = tokenizer.begin + tokenizer.encode(start)
    except ValueError as e:
        stop(f'start: {e}')
    if not prompt:
        stop('start: an empty prompt; there must be at least one token')
    if init_from != 'resume':
        model = convert.load_folder(init_from).to(device)
    use_kernels(model.eval())
except ValueError as e:
    stop(str(e))
except RuntimeError as e:
    stop(f'the model cannot be loaded: {first_line(e)}')
if max(prompt) >= model.config.vocab_size:
    stop(f'{tokenizer.name} does not fit the model: the prompt has the token {max(prompt)}, the vocabulary '
         f'{model.config.vocab_size}')
if speculative and len(model.mtp) == 0:
    stop('speculative=True needs MTP modules, and this model has none')

dtype = dtype or config.get('dtype') or 'float32'
total = len(prompt) + max_new_tokens
context = min(total, model.config.block_size)
compile = compile or context - len(prompt) >= compile_from
decoder = Decoder(for_decoding(model, getattr(torch, dtype)), compile)

needed = num_samples * (decoder.bytes_per_row(context, len(model.mtp) if speculative else 0) + 8 * total)
try:
    torch.empty(needed, dtype=torch.uint8, device=device)
except (RuntimeError, TypeError):  # TypeError: a number beyond 64 bits
    stop(f'num_samples={num_samples} of {total} tokens need {needed / 1e9:,.0f} GB of memory: lower num_samples or '
         'max_new_tokens')
torch.manual_seed(seed)
stop_token = model.config.eos_token_id if model.config.eos_token_id >= 0 else tokenizer.end
t0 = time.perf_counter()
temperature = temperature if temperature >= 1e-6 else 0.0
prompts = [prompt] * num_samples
rows, speculation = decoder.generate(prompts, max_new_tokens, temperature, top_k, stop_token, speculative)
dt = time.perf_counter() - t0 - decoder.compile_seconds
for row in rows:
    print(tokenizer.decode(row[:-1] if row[-1] == stop_token and len(row) > len(prompt) else row))
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
