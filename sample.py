"""
Generates text from a checkpoint that train.py wrote.

    python sample.py --out_dir=out-demo --start="def " --num_samples=3 --max_new_tokens=200
    python sample.py --out_dir=out-demo --start=FILE:prompt.txt --num_samples=1 --temperature=0
    python sample.py --init_from=DIR --start="The "    # a DeepSeek checkpoint in Hugging Face's format
    python sample.py --out_dir=out-demo --interactive=True --max_new_tokens=100

The last command continues the lines that you type: each line is appended to the text so far, and an empty line lets the
model go on. Ctrl-C ends an answer, Ctrl-D (the end of the input) the program.
"""

import contextlib
import os
import signal
import sys
import time

if not os.path.isdir(os.path.join(os.path.dirname(os.path.abspath(__file__)), 'extras')):
    print("this sample.py needs the folder extras/; with model.py and train.py alone, use nanoGPT's sample.py",
          file=sys.stderr)
    sys.exit(2)

import configurator  # Ctrl-C during the slow imports is one line

configurator.answer_help(__file__)

if hasattr(signal, 'SIGPIPE'):  # Windows has none
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # a reader that leaves, as `head` does, ends it silently

import torch

from extras import guard, scripts
from extras.decode import Decoder, Speculation, for_decoding, speculation
from extras.tokenizer import of_checkpoint, speller
from model import Mistake

# -----------------------------------------------------------------------------
init_from = 'resume'  # the checkpoint in out_dir, or the path of a folder in Hugging Face's format
out_dir = 'out'
start = '\n'  # the prompt; FILE:prompt.txt reads it from a file
num_samples = 10  # generated together, as one batch
stream = False  # print the tokens as they come, one sample after another; num_samples=1 always does
interactive = False  # continue your lines, one answer for each, with the cache kept from line to line
max_new_tokens = 500
temperature = 0.8  # 0, or less than 1e-6: always the likeliest token
top_k = 200  # 0: every token may be drawn
experts = ''  # routed experts per token: a number, or 'all'; '': as in training
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
     "be 'resume' or a folder that exists, with a checkpoint of the DeepSeek family (GPT-2's weights do not "
     'fit this architecture)'),
    ('out_dir', lambda x: x != '', 'name the folder of a run'),
    ('num_samples', lambda x: x > 0, 'be positive'),
    ('max_new_tokens temperature top_k', lambda x: x >= 0, 'not be negative'),
    ('max_new_tokens', lambda x: x > 0 or not interactive, 'be positive in a conversation'),
    ('seed', lambda x: -2**63 <= x < 2**64, 'fit in 64 bits'),
    ('dtype', lambda x: x in ('', *guard.DTYPES), "be 'float32', 'bfloat16' or 'float16'"),
    ('start', lambda x: x[:5].upper() != 'FILE:' or x[:5] == 'FILE:' or x[5:6].isspace(),
     'begin with FILE: in capitals if it names a file'),
])
guard.check_device(device)
if start.startswith('FILE:'):
    start = scripts.read_text(start[5:])

if interactive:
    start, num_samples = start if start != '\n' else '', 1

# the model and the prompt; a folder's tokenizer and the prompt come before its weights, which may be large
if init_from == 'resume':
    model, checkpoint, tokenizer = scripts.load_checkpoint(out_dir, device)
else:
    checkpoint, tokenizer = {}, of_checkpoint(init_from)
prompt = tokenizer.begin + tokenizer.encode(start)
guard.need(prompt or interactive, 'start is an empty prompt: give it at least one token')
if init_from != 'resume':
    from extras import hf
    model = hf.from_pretrained(init_from).to(device)
scripts.choose_experts(model, experts)
block_size = model.config.block_size


def check_ids(ids):
    highest, size = max(ids, default=0), model.config.vocab_size
    guard.need(highest < size, f'{tokenizer.name} does not fit the model: the prompt has the token {highest}, the '
               f'vocabulary {size}')


check_ids(prompt)
guard.need(len(model.mtp) > 0 or not speculative, 'speculative=True needs MTP modules, and this model has none')
scripts.use_kernels(model.eval())
dtype = dtype or (checkpoint.get('config') or {}).get('dtype') or 'float32'
model = for_decoding(model, getattr(torch, dtype))
one_by_one = (stream or num_samples == 1) and max_new_tokens > 0
rows_at_a_time = 1 if one_by_one else num_samples
scripts.use_few_threads(model, rows_at_a_time)

# the decoder, and the memory that it needs
total = len(prompt) + max_new_tokens
context = min(total, block_size)
decoder = Decoder(model, compile or context - len(prompt) >= compile_from)
row_bytes = decoder.bytes_per_row(block_size if interactive else context, len(model.mtp) if speculative else 0)
needed = rows_at_a_time * row_bytes + 8 * num_samples * total
try:
    torch.empty(needed, dtype=torch.uint8, device=device)
except (RuntimeError, TypeError):  # TypeError: a number beyond 64 bits
    raise Mistake(f'num_samples={num_samples} of {total} tokens need {needed / 1e9:,.0f} GB of memory: lower '
                  'num_samples or max_new_tokens') from None
torch.manual_seed(seed)
stop_token = model.config.eos_token_id if model.config.eos_token_id >= 0 else tokenizer.end
# -----------------------------------------------------------------------------


def write(text):
    print(scripts.for_output(text), end='', flush=True)


def speed(made, seconds):
    return f'{made} tokens in {seconds:.2f} s: {made / seconds:.1f} tokens/s'


def drafts_of(counted):
    """Speculation -> a line about the drafts"""
    passes, tokens, drafts, accepted = (count.sum(dim=0) for count in counted)
    rates = ', '.join(f'module {k} {100 * a / max(n, 1):.0f}%'
                      for k, (a, n) in enumerate(zip(accepted.tolist(), drafts.tolist()), start=1))
    return (f'accepted drafts: {rates}; {tokens / passes:.2f} tokens per sample and pass' if passes > 0 else
            'no draft was verified: a first token, and tokens past block_size, are decoded plainly')


def follow(row, spell, stopped=(), spare=0):
    """Write the text that follows a row, token by token, and append the tokens to the row. spell: speller()'s, which
    has spelt the row. It ends after a token if `stopped` is not empty any more.
    """
    for new in decoder.stream(row[:], max_new_tokens, temperature, top_k, stop_token, speculative, spare):
        row += new
        write(spell(new[:-1] if new[-1] == stop_token else new))
        if stopped:
            break
    write(spell([], last=True))


def ask():
    """The user's next line; None at the end of the input. Only here a Ctrl-C is a KeyboardInterrupt at once."""
    at_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    while True:
        try:
            answering = signal.signal(signal.SIGINT, signal.default_int_handler)
            return input('> ' if at_terminal else '')
        except EOFError:
            if at_terminal:
                print()  # the shell's prompt gets a line of its own
            return None
        except KeyboardInterrupt:
            print('\nCtrl-D ends the conversation', file=sys.stderr)
        finally:
            signal.signal(signal.SIGINT, answering)


def with_line(row, line):
    """The row and behind it the tokens of a line, which begins a line of the text too; Mistake if it has none."""
    ended = row[-1:] == [stop_token] or tokenizer.decode(row[-16:])[-1:] in ('', '\n')
    try:
        ids = tokenizer.encode(line if ended or not line else '\n' + line)
    except Mistake:
        ids = tokenizer.encode(line)  # characters without a line's end
    check_ids(ids)
    guard.need(row + ids, 'there is no text yet that an empty line could continue: type some')
    if len(row + ids) < block_size:
        return row + ids
    # a full context would cost a whole pass for each token: forget its older half, but nothing of the line that fits
    return (row + ids)[-max(1, block_size // 2, min(len(ids), block_size - 1)):]


def converse(row):
    """Continue the user's lines until the input ends. Ctrl-C ends an answer after its next token, a second one, before
    that token comes, the program.
    """
    pressed = []

    def press(number, frame):
        if pressed:
            raise KeyboardInterrupt
        pressed.append(number)

    signal.signal(signal.SIGINT, press)
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 (input() then knows the arrow keys)
    if hasattr(sys.stdin, 'reconfigure'):
        sys.stdin.reconfigure(errors='replace')
    while (line := ask()) is not None:
        try:
            row = with_line(row, line)
        except Mistake as e:
            print(configurator.shown(str(e)), file=sys.stderr)
            continue
        spell, before = speller(tokenizer.decode), len(row)
        spell(row)
        t0, compiling = time.perf_counter(), decoder.compile_seconds
        pressed.clear()
        follow(row, spell, pressed, spare=before + max_new_tokens)
        dt = time.perf_counter() - t0 - (decoder.compile_seconds - compiling)
        print()
        drafts = '; ' + drafts_of(speculation(decoder.kept.counts)) if speculative else ''
        print(f'{speed(len(row) - before, dt)}; context {min(len(row), block_size)} of {block_size}{drafts}',
              file=sys.stderr)


if interactive:
    if sys.stdin.isatty():
        print('An empty line: go on. Ctrl-C: end an answer. Ctrl-D: leave.', file=sys.stderr)
    converse(prompt)
    sys.exit()
t0 = time.perf_counter()
if one_by_one:
    rows, counts = [], []
    for _ in range(num_samples):
        rows.append(prompt[:])
        spell = speller(tokenizer.decode)
        write(spell(prompt))
        follow(rows[-1], spell)
        print('\n---------------')
        counts.append(speculation(decoder.kept.counts.clone()))  # a compiled step keeps writing to them
    counted = Speculation(*map(torch.cat, zip(*counts)))
else:
    if total > block_size:
        print(f'{total - context} tokens of each sample lie past the context of {block_size}: each takes a pass over '
              'all of it, and nothing is printed before the end', file=sys.stderr)
    prompts = [prompt] * num_samples
    rows, counted = decoder.generate(prompts, max_new_tokens, temperature, top_k, stop_token, speculative)
dt = time.perf_counter() - t0 - decoder.compile_seconds
if not one_by_one:
    for row in rows:
        write(tokenizer.decode(row[:-1] if row[-1] == stop_token and len(row) > len(prompt) else row))
        print('\n---------------')
if decoder.compile_seconds:
    print(f'compiled in {decoder.compile_seconds:.1f} s')
made = speed(sum(map(len, rows)) - num_samples * len(prompt), dt)
print(made + f'; {out_dir}, iteration {checkpoint.get("iter_num")}' * ('iter_num' in checkpoint))
if speculative:
    print(drafts_of(counted))
