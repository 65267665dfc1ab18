"""
Packs a model into one HTML file that runs it: inside.py --live=True. extras/live.js is the model and its worker,
extras/live.html the page. This file adds the weights, the tokenizer and the settings.
"""

import base64
import copy
import dataclasses
import hashlib
import html
import json
import math
import os
import re

import torch

import model as model_file
from extras import guard, output, scripts
from extras.files import read_table
from extras.tokenizer import byte_characters, gpt2_tokenizer

MOST = 12_000_000      # numbers that a page holds: 16 MB in int8
MOST_FP16 = 8_000_000  # bytes; above, the matrices are int8
CONTEXT = 1024         # tokens: the page keeps the attention of each, for each head
# the weights that live.js knows, each block's as it ends
KNOWN = re.compile(r'lm_head\.weight|transformer\.(wte|ln_f)\.weight|mtp\.\d+\.(enorm|hnorm|eh_proj|norm)\.weight|'
                   r'(transformer|mtp\.\d+)\.h\.\d+\.((input|post_attention)_layernorm\.weight|'
                   r'attn\.(q_a_proj|q_b_proj|q_proj|kv_a_proj_with_mqa|kv_b_proj|o_proj)\.(weight|bias)|'
                   r'attn\.(q_a|kv_a)_layernorm\.weight|mlp\.(shared_experts\.)?(gate_up|down)_proj\.weight|'
                   r'mlp\.(gate\.weight|experts_gate_up|experts_down|e_score_correction_bias))')


def check(model, config):
    """Mistake if the page cannot run the model. config: the settings of its run"""
    numbers = sum(p.numel() for p in model.parameters())
    guard.need(type(model) is model_file.GPT, f'a live page runs models of model.py, and this is one of '
               f'{type(model).__module__}.py')
    guard.need(numbers <= MOST, f'a live page holds up to {MOST:,} parameters, and this model has {numbers:,}')
    guard.need(model.config.block_size > 1, 'a live page needs a context of 2 tokens at least')
    guard.need(not config.get('fp8'), 'a live page does not multiply in FP8, as this model was trained')
    unknown = [name for name in model.state_dict() if not KNOWN.fullmatch(name)]
    guard.need(not unknown and model_file.MLA.absorb, 'a live page does not know this architecture: change '
               f'extras/live.js with model.py{" (there is " + unknown[0] + ")" if unknown else ""}')


# -----------------------------------------------------------------------------
# the weights

def rounded(model):
    """-> a copy of the model with the weights that the page holds, these as parts, and their bytes.

    Norms, biases, b and the routers are float32. Other matrices are float16, or, if this takes more than MOST_FP16
    bytes, int8 with a scale for each row.
    """
    model, parts, content = copy.deepcopy(model), [], bytearray()
    small = 2 * sum(p.numel() for p in model.parameters()) <= MOST_FP16
    state = model.state_dict()
    if model.config.tie_word_embeddings:
        del state['transformer.wte.weight']  # the head's
    for name, x in state.items():
        part = {'name': name, 'start': len(content), 'size': x.numel()}
        if x.dim() < 2 or name.endswith('.gate.weight'):
            part |= {'kind': 'float32'}
            content += x.numpy().astype('<f4').tobytes()
        elif small:
            half = x.half()
            guard.need(half.isfinite().all(), f'{name} holds weights beyond 65,504, the largest float16')
            part |= {'kind': 'float16'}
            content += half.numpy().astype('<f2').tobytes()
            x.copy_(half)
        else:
            scale = (x.abs().amax(dim=-1, keepdim=True) / 127).clamp(min=1e-30)
            steps = (x / scale).round()
            part |= {'kind': 'int8', 'rows': scale.numel()}
            content += scale.numpy().astype('<f4').tobytes() + steps.numpy().astype('i1').tobytes()
            x.copy_(steps * scale)
        content += bytes(-len(content) % 4)
        parts.append(part)
    return model, parts, bytes(content)


@torch.no_grad()
def cost_of_rounding(model, copied, tokenizer, text, start):
    """-> the loss of the model and of its rounded copy, on how many tokens, and whether these are the text's. Without a
    text the model writes them itself, 32 times from `start` on.
    """
    T = min(128, model.config.block_size)
    if text:
        ids = torch.tensor(tokenizer.encode(text))
        guard.need(len(ids) > 1, 'the text must have 2 tokens at least')
        windows = ids[:len(ids) // T * T][:128 * T].view(-1, T) if len(ids) >= T else ids[None]
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            windows = model.generate(torch.tensor([start[:T // 2]] * 32), T - len(start[:T // 2]))
    x, y = windows[:, :-1], windows[:, 1:].contiguous()
    losses = [sum(m(*pair)[1].item() * pair[0].numel() for pair in zip(x.split(16), y.split(16))) / x.numel()
              for m in (model, copied)]
    return {'losses': losses, 'tokens': y.numel(), 'of_text': text != ''}


# -----------------------------------------------------------------------------
# the tokenizer

def tokenizer_table(tokenizer, meta):
    """What the page needs to speak the tokenizer: characters, or a byte-level BPE."""
    if meta.get('stoi'):
        return {'kind': 'characters', 'stoi': meta['stoi'], 'itos': meta['itos']}
    table = read_table(tokenizer.name) if tokenizer.sha256 else json.loads(gpt2_tokenizer().to_str())
    bpe, before = table.get('model') or {}, table.get('pre_tokenizer') or {}
    alphabet = [byte_characters()[b] for b in range(256)]
    kinds = [part.get('type') for part in (bpe, before, table.get('decoder') or {})]
    odd = [bpe.get(key) for key in ('dropout', 'continuing_subword_prefix', 'end_of_word_suffix', 'ignore_merges')]
    odd += [table.get('normalizer'), before.get('add_prefix_space'), not before.get('use_regex', True)]
    odd += [token.get(key) for token in table.get('added_tokens') or [] for key in ('lstrip', 'rstrip', 'single_word')]
    known = kinds == ['BPE', 'ByteLevel', 'ByteLevel'] and not any(odd) and not set(alphabet) - set(bpe['vocab'])
    guard.need(known, f"{tokenizer.name} is no byte-level BPE with GPT-2's expression for words, the only kind of "
               'tokenizer.json that a live page knows')
    merges = [pair if isinstance(pair, str) else ' '.join(pair) for pair in bpe['merges']]
    added = {token['content']: token['id'] for token in table.get('added_tokens') or []}
    return {'kind': 'bytes', 'vocab': bpe['vocab'], 'merges': merges, 'added': added, 'alphabet': alphabet}


def first_prompt(tokenizer, text, block_size):
    """What stands in the page's prompt when it opens: the beginning of the text, or something that has tokens."""
    n = block_size // 2
    at_word_end = re.match(r'.*\S(?=\s)', text[:n + 1], re.S) if len(text) > n else None
    for prompt in (at_word_end[0] if at_word_end else text[:n], 'The ', *map(chr, range(ord('A'), ord('z'))), '\n'):
        try:
            if prompt and tokenizer.encode(prompt):
                return prompt
        except model_file.Mistake:  # not in its alphabet
            pass
    return tokenizer.decode([0])


# -----------------------------------------------------------------------------
# the page

def read_template(name):
    with open(os.path.join(os.path.dirname(os.path.abspath(__file__)), name), encoding='utf-8') as f:
        return f.read()


def hash_of(tag, page):
    """For the page's policy: the one script, or style, that may run."""
    content = re.search(f'<{tag}>(.*?)</{tag}>', page, re.S)[1]
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


def page(data, weights):
    """The HTML: the template with the model's source, its weights in base64, and all else as JSON without a '<'."""
    template = read_template('live.html')
    policy = f"default-src 'none'; script-src {hash_of('script', template)}; style-src {hash_of('style', template)}; " \
             "worker-src blob:; img-src data:; base-uri 'none'; form-action 'none'"
    texts = {'GENERATOR': output.MARK, 'POLICY': policy, 'TITLE': html.escape(f'DeepSeek, live: {data["model"]}'),
             'SOURCE': read_template('live.js'), 'WEIGHTS': base64.b64encode(weights).decode(),
             'DATA': json.dumps(data, allow_nan=False, separators=(',', ':')).replace('<', '\\u003c')}
    return re.sub('{{([A-Z]+)}}', lambda found: texts[found[1]], template)


def write(out_dir, text, out):
    """inside.py --live=True: the page of the checkpoint in out_dir. text: a file, or ''; out: the page, or ''"""
    path = out or os.path.join(out_dir, 'live.html')
    guard.need(out_dir != '', "out_dir='' must name the folder of a run")
    guard.need(path.endswith('.html') and os.path.isdir(os.path.dirname(path) or '.'),
               f'out={path!r} must end in .html, in a folder that is there')
    output.check(path, [text] if text else [])
    words = scripts.read_text(text) if text else ''
    model, checkpoint, tokenizer = scripts.load_checkpoint(out_dir, 'cpu')
    check(model, checkpoint.get('config') or {})
    model = model.eval().float()
    cfg, table = model.config, tokenizer_table(tokenizer, checkpoint.get('meta') or {})
    ids = [*table.get('stoi', {}).values(), *table.get('vocab', {}).values(), *table.get('added', {}).values()]
    guard.need(max(ids) < cfg.vocab_size, f'{tokenizer.name} does not fit the model: it has the token {max(ids)}, the '
               f'vocabulary {cfg.vocab_size}')
    copied, parts, weights = rounded(model)
    prompt = first_prompt(tokenizer, words, min(cfg.block_size, CONTEXT))
    rounding = cost_of_rounding(model, copied, tokenizer, words, tokenizer.begin + tokenizer.encode(prompt))
    guard.need(all(map(math.isfinite, rounding['losses'])), f"the checkpoint in {out_dir}: the model's logits are not "
               'finite')
    kinds = {part['kind'] for part in parts} - {'float32'}
    data = {'model': os.path.basename(os.path.abspath(out_dir)), 'config': dataclasses.asdict(cfg), 'parts': parts,
            'tokenizer': table, 'begin': tokenizer.begin, 'prompt': prompt, 'context': min(cfg.block_size, CONTEXT),
            'stop': cfg.eos_token_id if cfg.eos_token_id >= 0 else tokenizer.end, 'kind': kinds.pop(),
            'rounding': rounding, 'iteration': checkpoint.get('iter_num'),
            'dataset': str((checkpoint.get('config') or {}).get('dataset') or ''),
            'parameters': sum(p.numel() for p in model.parameters())}
    content = page(data, weights).encode()
    output.write(path, content, [text] if text else [])
    more = rounding['losses'][1] - rounding['losses'][0]
    print(f'wrote {path}: {data["parameters"] / 1e6:.2f}M parameters in {data["kind"]}, {len(content) / 1e6:.2f} MB; '
          f'rounding changes the loss by {more:+.5f} on {rounding["tokens"]:,} tokens '
          f'{"of the text" if words else "that the model wrote"}')
