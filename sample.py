"""
Generates text from a checkpoint that train.py wrote.

    python sample.py --out_dir=out-demo --start="def " --num_samples=3 --max_new_tokens=200
    python sample.py --out_dir=out-demo --start=FILE:prompt.txt --temperature=0
    python sample.py --init_from=DIR --start="The "    # a DeepSeek checkpoint in Hugging Face's format
"""

import contextlib
import os
import sys
import time

import torch

from model import GPT, MoE, first_line


def stop(message):
    """A mistake of the user's: one line, and exit code 2."""
    print(message, file=sys.stderr)
    raise SystemExit(2)


# -----------------------------------------------------------------------------
init_from = 'resume'  # the checkpoint in out_dir, or the path of a folder in Hugging Face's format
out_dir = 'out'
start = '\n'  # the prompt; FILE:prompt.txt reads it from a file
num_samples = 10  # generated together, as one batch
max_new_tokens = 500
temperature = 0.8  # 0: always the likeliest token
top_k = 200  # 0: every token may be drawn
speculative = False  # the MTP modules draft and the main stack verifies
seed = 1337
device = 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu'
dtype = ''  # 'float32', 'bfloat16' or 'float16'; '': that of the training run
compile = False
exec(open(os.path.join(os.path.dirname(__file__), 'configurator.py')).read())
# -----------------------------------------------------------------------------

ckpt_path = os.path.join(out_dir, 'ckpt.pt')
if init_from != 'resume' and not os.path.isdir(init_from):
    stop(f"init_from={init_from!r} must be 'resume' or a folder with a DeepSeek-V2 or V3 family "
         "checkpoint: GPT-2's weights do not fit this architecture")
if num_samples <= 0 or min(max_new_tokens, temperature, top_k) < 0:
    stop('num_samples must be positive; max_new_tokens, temperature and top_k must not be negative')
try:
    device_type = torch.zeros(1, device=device).device.type
except Exception as e:  # torch raises RuntimeError, AssertionError and others
    stop(f'device={device!r} cannot be used here: {first_line(e)}')
try:
    if init_from == 'resume':
        model, checkpoint = GPT.from_checkpoint(ckpt_path, device)
    else:
        model, checkpoint = GPT.from_pretrained(init_from), {'config': {}}
except ValueError as e:
    stop(str(e))
model.eval().to(device)

config, meta = checkpoint.get('config') or {}, checkpoint.get('meta') or {}
plain = type(config) is dict and type(meta) is dict
if not plain or not type(meta.get('stoi', {})) is type(meta.get('itos', {})) is dict:
    stop(f'{ckpt_path} is no checkpoint of this model: its config or its characters are no tables')
dtype = dtype or config.get('dtype') or 'float32'
if dtype not in ('float32', 'bfloat16', 'float16'):
    stop(f"dtype={dtype!r} must be 'float32', 'bfloat16' or 'float16'")
ptdtype = getattr(torch, dtype)
ctx = contextlib.nullcontext() if dtype == 'float32' else torch.amp.autocast(device_type, dtype=ptdtype)
for module in model.modules():  # once, rather than at every token; autocast sees to the rest
    if isinstance(module, MoE):
        module.experts_gate_up.data = module.experts_gate_up.data.to(ptdtype)
        module.experts_down.data = module.experts_down.data.to(ptdtype)
if compile:
    model.compile()
    try:
        with torch.no_grad(), ctx:
            model.generate(torch.zeros(1, 2, dtype=torch.long, device=device), 2)
    except Exception as e:
        model.uncompile()
        print(f'going on without torch.compile: {type(e).__name__}: {first_line(e)}')

# the tokenizer: the characters that the checkpoint was trained on, the one that travels with it, or GPT-2's
stop_token = model.config.eos_token_id if model.config.eos_token_id >= 0 else None
tokenizer_path = os.path.join(out_dir if init_from == 'resume' else init_from, 'tokenizer.json')
if 'stoi' in meta:
    stoi, itos = meta['stoi'], meta['itos']

    def encode(text):
        unknown = sorted(set(text) - set(stoi))
        if unknown:
            stop(f'start: this model does not know the characters {"".join(unknown)!r}')
        return [stoi[ch] for ch in text]

    def decode(ids):
        return ''.join(itos.get(i, '') for i in ids)  # a vocabulary may be larger than its characters
elif os.path.exists(tokenizer_path):
    try:
        from tokenizers import Tokenizer
    except ImportError:
        stop(f'{tokenizer_path} needs tokenizers: pip install tokenizers')
    try:
        tokenizer = Tokenizer.from_file(tokenizer_path)
    except Exception as e:  # tokenizers raises plain Exceptions
        stop(f'{tokenizer_path} cannot be read: {first_line(e)}')

    def encode(text):
        try:
            return tokenizer.encode(text).ids
        except Exception as e:  # a text that it has no tokens for
            stop(f'start: this model does not know all of {text!r}: {first_line(e)}')

    def decode(ids):
        return tokenizer.decode(ids)
else:
    try:
        import tiktoken
    except ImportError:
        stop('this checkpoint speaks GPT-2 tokens: pip install tiktoken')
    try:
        enc = tiktoken.get_encoding('gpt2')
    except Exception as e:
        stop(f'tiktoken could not load the GPT-2 tokenizer: {type(e).__name__}: {first_line(e)}')
    stop_token = enc.eot_token

    def encode(text):
        return enc.encode(text, allowed_special={'<|endoftext|>'})

    def decode(ids):
        return enc.decode([i for i in ids if i < enc.n_vocab])  # the vocabulary is padded beyond GPT-2's

if start.startswith('FILE:'):
    try:
        with open(start[5:], encoding='utf-8') as f:
            start = f.read()
    except (OSError, UnicodeDecodeError) as e:
        stop(f'{start}: {first_line(e)}')
prompt = encode(start)
if not prompt:
    stop('start: an empty prompt; there must be at least one token')

torch.manual_seed(seed)
x = torch.tensor(prompt, device=device).repeat(num_samples, 1)  # (num_samples, T)
t0 = time.time()
with torch.no_grad(), ctx:
    y = model.generate(x, max_new_tokens, temperature=temperature, top_k=top_k, stop_token=stop_token,
                       speculative=speculative)
rows = y.tolist()
dt = time.time() - t0
made = 0
for row in rows:
    new = row[len(prompt):]
    if stop_token in new:
        new = new[:new.index(stop_token)]
        made += 1  # the end-of-text token
    made += len(new)
    print(decode(prompt + new))
    print('---------------')
print(f'{made} tokens in {dt:.2f} s: {made / dt:.1f} tokens/s')
if speculative:
    drafts, accepted = (model.speculation[key].tolist() for key in ('drafts', 'accepted'))
    rates = ', '.join(f'module {k} {100 * made / max(drafted, 1):.0f}%'
                      for k, (made, drafted) in enumerate(zip(accepted, drafts), start=1))
    passes, tokens = model.speculation['passes'], model.speculation['tokens']
    print(f'accepted drafts: {rates}; {tokens / max(passes, 1):.2f} tokens per sample in each of {passes} passes')
