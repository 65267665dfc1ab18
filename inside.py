"""
Writes one HTML page that shows a trained model while it reads a text: experts, drafts, attention, caches.

    python inside.py --out_dir=out-demo --text=FILE    # your own text, in UTF-8; writes out-demo/inside.html
    python inside.py --out_dir=out-demo --live=True    # a page in which the model itself runs: out-demo/live.html

The page is one file that needs no network. extras/inside.html is its template. The numbers, as JSON, come from this
file, extras/attention_maps.py, extras/probes.py and, for a model of model_v4.py, extras/inside_v4.py.
"""

import html
import json
import math
import os
import unicodedata

import configurator  # Ctrl-C during the slow imports is one line

# isort: split
if __name__ == '__main__':
    configurator.answer_help(__file__)

import torch
from torch.nn import functional as F

from extras import decode, guard, inside_v4, output, probes, scripts
from extras import live as live_page
from extras.attention_maps import attention_of, pack, rounded, score_parts
from model import MoE
from plot import read_log

# -----------------------------------------------------------------------------
out_dir = 'out'  # the folder of the checkpoint
text = ''  # the file to read; its first block_size tokens are on the page
out = ''  # the page; '': inside.html in out_dir, or live.html
live = False  # True: the page holds the model and runs it; of the other settings, out_dir, text and out count
count_tokens = 16384  # tokens of the file that are counted for the experts' load and typical tokens
experts = ''  # routed experts per token: a number, or 'all'; '': as in training
knockouts = ''  # the loss with each part of the model off, a pass for each: 'True' or 'False'; '': if that is fast
device = scripts.default_device()
map_bytes = 600_000  # of all attention maps together; where one cell per token takes more, a cell is several tokens
if __name__ == '__main__':
    exec(open(os.path.join(os.path.dirname(os.path.abspath(__file__)), 'configurator.py')).read())
# -----------------------------------------------------------------------------


# the tokens as text

def visible(text):
    """Control and format characters, which a page would obey or hide, as their code points. Line ends and tabs stay."""
    def shown(ch):
        hidden = unicodedata.category(ch)[0] == 'C' or unicodedata.category(ch) in ('Zl', 'Zp')
        return f'U+{ord(ch):04X}' if hidden and ch not in '\n\t' else ch

    return ''.join(map(shown, text))


def pieces_of(tokenizer, ids):
    """The text of each token of a sequence. Characters that several tokens hold together stand at the first of them, ''
    at the others; a token without a text, or of bytes that are no UTF-8, is its number.
    """
    pieces, before, cut = [], [], False
    while len(pieces) < len(ids):
        start = len(pieces)
        already = tokenizer.decode(before)  # a decoder may drop a space that no token stands before
        already = already.rstrip('\ufffd') if cut else already
        cut = False
        for end in range(start + 1, min(start + 64, len(ids)) + 1):
            group = ids[start:end]
            piece = tokenizer.decode(before + group).removeprefix(already)
            whole = piece.rstrip('\ufffd')
            # up to three bytes of a character of four may lack the rest, which the next token may hold
            if not 1 <= len(piece) - len(whole) <= 3 or '\ufffd' in whole:
                break
        else:  # a long chain is cut, because each token reads its text anew
            cut = end < len(ids) and whole != ''
            piece = whole if cut else piece
        if not piece or '\ufffd' in piece:
            group, piece = group[:1], f'#{ids[start]}'
        pieces += [visible(piece)] + [''] * (len(group) - 1)
        before = group
    return pieces


# what the model does

def watch(model, idx, caches=None):
    """The model reads idx (B, T); module k reads t_{i+k} at row i, and its last k rows, which have none, are not kept.

    -> the states from which the main model and each module predict (B, T - k, C), and what went into each block's
    attention and into its FFN, (B, T - k, C) each.
    """
    seen = {}
    hooks = [part.register_forward_pre_hook(lambda part, args: seen.update({part: args[0]}))
             for block in model.blocks() for part in (block.attn, block.mlp)]
    h, _ = model.main_stack(idx, caches)
    states, blocks = [h], [(block, 0) for block in model.transformer.h]
    for k, module in enumerate(model.mtp, start=1):
        first = len(blocks)
        token = F.pad(idx[:, k:], (0, k))
        h, _ = model.mtp_module(module, token, h, None if caches is None else caches[first:first + len(module.h)])
        states.append(h[:, :-k])
        blocks += [(block, k) for block in module.h]
    for hook in hooks:
        hook.remove()
    into = [[seen[part][:, :idx.size(1) - k] for part in (block.attn, block.mlp)] for block, k in blocks]
    return states, [x for x, _ in into], [x for _, x in into]


def speculate(model, ids, h, caches):
    """Greedy speculative decoding from every place of the text, by extras/decode.py: for the known tokens t_0 .. t_p
    the D drafts for t_{p+1} .. t_{p+D}, the main model's choices given them, and how many of them it accepts.

    ids (T,), h (1, T, C), caches: of each block (1, S, c + r). -> drafts (T, D), choices (T, D), accepted (T,), with
    -1 at p = 0, where there is no row to draft from.
    """
    T, D = len(ids), len(model.mtp)
    steps = torch.arange(1 + D, device=ids.device)
    drafts, choices = (torch.full((T, D), -1, device=ids.device) for _ in range(2))
    accepted = torch.full((T,), -1, device=ids.device)
    for places in torch.arange(1, T, device=ids.device).split(16):
        s = decode.empty_state(model, len(places), T + 1 + D, D)
        s.tokens[:, :T], s.h[:, :T] = ids, h
        s.known.copy_(places + 1)  # what the rows hold beyond, is not looked at, or written first
        if inside_v4.has_rings(model):
            inside_v4.read_prefixes(model, s, places)
        else:
            for cache, of_text in zip(s.caches, caches):
                cache[:, :T] = of_text[:, :T]
        decode.draft(model, s, sampled=False, top_k=None)
        positions = places.unsqueeze(1) + steps                                        # (B, 1+D)
        tokens = s.tokens.gather(1, positions)
        read, _ = model.main_stack(tokens, s.caches, positions)                        # (B, 1+D, C)
        choice = model.lm_head(read).argmax(dim=-1)                                    # (B, 1+D)
        drafts[places], choices[places] = tokens[:, 1:], choice[:, :-1]
        accepted[places] = decode.count_leading(tokens[:, 1:] == choice[:, :-1])
    return drafts, choices, accepted


def count_experts(model, windows):
    """windows (n, T) -> the different tokens in them (U,), and for each MoE layer how often each token met each expert
    (U, E), and how often it occurred (U,). Row i of module k counts for t_{i+k}, the newest token that it has read.
    """
    tokens, index = windows.unique(return_inverse=True)
    E, layers = model.config.n_routed_experts, model.moe_layers()
    met = [torch.zeros(len(tokens), E, device=windows.device) for _ in layers]
    there = [torch.zeros(len(tokens), device=windows.device) for _ in layers]
    for part, at in zip(windows.split(16), index.split(16)):
        _, _, into = watch(model, part)
        moe_inputs = [(block.mlp, x) for block, x in zip(model.blocks(), into) if isinstance(block.mlp, MoE)]
        for i, (moe, x) in enumerate(moe_inputs):
            newest = at.size(1) - x.size(1)
            _, _, experts = inside_v4.route(moe, x.flatten(0, 1), part[:, newest:].flatten())          # (N, K)
            token = at[:, newest:].flatten()                                           # (N,)
            met[i].index_put_((token.unsqueeze(1).expand_as(experts), experts), torch.ones(()).to(met[i]), True)
            there[i].index_add_(0, token, torch.ones_like(token, dtype=torch.float))
    return tokens, met, there


def typical_tokens(met, there, most=8):
    """For each expert, the tokens that meet it more often than by chance: [(index of the token, lift, meetings)].

    Chance: the share of all tokens that meet the expert. Lift: the token's own share / chance. A token must be three
    standard deviations above chance; the tokens furthest above it come first.
    """
    out = []
    for e in range(met.size(1)):
        chance = met[:, e].sum() / there.sum()
        share = met[:, e] / there.clamp(min=1)
        sure = (share - chance) * there.sqrt() / (chance * (1 - chance)).sqrt().clamp(min=1e-9)
        best = [i for i in sure.argsort(descending=True)[:most].tolist() if sure[i] > 3]
        out.append([(i, round((share[i] / chance).item(), 2), int(met[i, e])) for i in best])
    return out


def moved_by_bias(moe, x, experts, tokens):
    """The share of tokens that would meet other experts than these (N, K) without the bias b. x (N, C), ids: (N,)"""
    bias = moe.e_score_correction_bias.clone()
    moe.e_score_correction_bias.zero_()
    _, _, plain = inside_v4.route(moe, x, tokens)
    moe.e_score_correction_bias.copy_(bias)
    return (plain.sort(dim=1).values != experts.sort(dim=1).values).any(dim=1).float().mean().item()


# the page's numbers

def heads_of(model, states, ids):
    """For the main model and each module: the likeliest next tokens after each row, and the probability and rank of the
    token that came.
    """
    heads = []
    for k, h in enumerate(states):
        logits = model.lm_head(h[0]).float()                                           # (T-k, V)
        guard.need(logits.isfinite().all(), f"the checkpoint in {out_dir}: the model's logits are not finite")
        p = logits.softmax(dim=-1)
        likeliest = p.topk(min(5, p.size(1)), dim=-1)
        came = p[:-1].gather(1, ids[k + 1:].unsqueeze(1))                              # (T-k-1, 1)
        rank = (p[:-1] > came).sum(dim=1)
        heads.append({'name': f'MTP {k}' if k else 'main', 'start': k, 'ids': likeliest.indices.tolist(),
                      'p': rounded(likeliest.values), 'came': rounded(came.squeeze(1)), 'rank': (rank + 1).tolist(),
                      'loss': F.cross_entropy(logits[:-1], ids[k + 1:]).item(),
                      'right': (rank == 0).float().mean().item()})
    return heads


def experts_of(moe, number, x, tokens, counts):
    """x (N, C) into an MoE layer, the MoE layer's number, its tokens (N,), and count_experts() of all MoE layers"""
    scores, gates, experts = inside_v4.route(moe, x, tokens)                           # (N, E), (N, K) twice
    order = gates.argsort(dim=1, descending=True)
    _, met, there = counts
    load = met[number].sum(dim=0)
    shown = {'number': number, 'scores': pack(scores), 'gates': pack(gates.gather(1, order)),
             'chosen': pack(experts.gather(1, order), 16), 'bias': rounded(moe.e_score_correction_bias, 6),
             'load': load.long().tolist(), 'max_vio': (load.max() / load.mean() - 1).item(),
             'moved': moved_by_bias(moe, x, experts, tokens),
             'typical': typical_tokens(met[number], there[number])}
    return shown | ({'hashed': True} if hasattr(moe, 'tid2eid') else {})


def layers_of(model, ids, attn_inputs, mlp_inputs, counts, found):
    """For each block, main stack first: its attention, its experts if it has any, and what model_v4.py adds, from
    inside_v4.recorded().
    """
    names = [(str(i), 0) for i in range(model.config.n_layer)]  # as in the code: transformer.h.0
    for k, module in enumerate(model.mtp, start=1):
        names += [(f'MTP {k}' + (f'.{i}' if len(module.h) > 1 else ''), k) for i in range(len(module.h))]
    T = attn_inputs[0].size(1)
    side = (math.isqrt(1 + 8 * (map_bytes // (3 * len(names) * model.config.n_head))) - 1) // 2
    cell = -(-T // max(side, 1))
    layers, moe_layer = [], 0
    for block, (name, start), x, y in zip(model.blocks(), names, attn_inputs, mlp_inputs):
        rows = T - start
        if block.attn in found:
            attention = inside_v4.window_attention_of(block.attn, found[block.attn], rows, cell)
        elif hasattr(block.attn, 'indexer'):
            attention = inside_v4.sparse_attention_of(model, block.attn, x, cell)
        else:
            attention = attention_of(*score_parts(model, block.attn, x), cell)
        layer = {'name': name, 'start': start, 'attention': attention}
        if isinstance(block.mlp, MoE):
            layer['experts'] = experts_of(block.mlp, moe_layer, y.flatten(0, 1), ids[start:], counts)
            moe_layer += 1
        streams = inside_v4.mixing(block, found, rows)
        if streams:
            few = model.config.hc_mult <= 8  # else the numbers of each token would be too many
            layer['streams'] = [{'mean': rounded(x.mean(dim=0)), **({'at': pack(x)} if few else {})} for x in streams]
        gate = inside_v4.memory_gate(block, found, rows)
        if gate is not None:
            layer['gate'] = pack(gate)
        layers.append(layer)
    return layers


def training_of(path, n_moe_layers, n_experts, most=100):
    """log.jsonl -> steps, loads and biases of at most `most` records; None if it has none for this model"""
    if not os.path.exists(path):
        return None

    def is_table(x):
        return type(x) is list and len(x) == n_moe_layers and all(
            type(row) is list and len(row) == n_experts and all(type(n) in (int, float) for n in row) for row in x)

    records = [r for r in read_log(path)[1] if is_table(r.get('load')) and is_table(r.get('bias'))]
    if not records:
        return None
    every = -(-len(records) // most)
    records = records[::-1][::every][::-1]  # the last one is among them
    return {'steps': [r['step'] for r in records],
            'load': [[[round(n / max(sum(row), 1), 4) for n in row] for row in r['load']] for r in records],
            'bias': [[[round(b, 4) for b in row] for row in r['bias']] for r in records]}


def cache_of(model, dtype, T):
    """Bytes per token in the main stack's blocks: of the latent cache, and of keys and values of all heads. V4's cache
    does not grow evenly: its bytes after each of T tokens.
    """
    cfg, size = model.config, getattr(torch, dtype).itemsize
    heads = cfg.n_head * (cfg.qk_nope_head_dim + cfg.qk_rope_head_dim + cfg.v_head_dim)
    if inside_v4.has_rings(model):
        heads = 2 * cfg.n_head * (cfg.qk_nope_head_dim + cfg.qk_rope_head_dim)
        return {'bytes': inside_v4.cache_bytes(model, T, size), 'mha': cfg.n_layer * heads * size, 'dtype': dtype,
                'layers': cfg.n_layer}
    return {'latent': cfg.n_layer * cfg.cache_width * size, 'mha': cfg.n_layer * heads * size, 'dtype': dtype,
            'layers': cfg.n_layer, 'latent_numbers': cfg.cache_width, 'mha_numbers': heads}


def knockouts_of(model, ids, calls, wanted):
    """wanted: 'True', 'False', or '', if they take seconds: below 1e12 FLOPs, counted as for so many training passes"""
    parts = probes.parts_of(model)
    cost = len(parts) * len(ids) * model.flops_per_token()
    if wanted == 'False' or not wanted and cost > 1e12:
        return {'passes': len(parts)}
    return {'passes': len(parts), 'parts': probes.knock_outs(model, ids, calls)}


@torch.no_grad()
def look(model, tokenizer, ids, count_tokens, dtype='float32', log_path='', knockouts='False'):
    """All that the page shows of the model reading ids, as a table that JSON can hold."""
    cfg, D = model.config, len(model.mtp)
    ids = torch.tensor(ids, device=model.lm_head.weight.device)
    T = min(len(ids), cfg.block_size)
    caches = decode.empty_state(model, 1, T, D).caches
    with inside_v4.recorded(model) as found:
        states, attn_inputs, mlp_inputs = watch(model, ids[None, :T], caches)
    heads = heads_of(model, states, ids[:T])
    drafts = None
    if D > 0:
        drafted, choices, accepted = speculate(model, ids[:T], states[0], caches)
        drafts = {'ids': drafted.tolist(), 'choices': choices.tolist(), 'accepted': accepted.tolist()}

    windows = ids[:max(1, min(len(ids), count_tokens) // T) * T].view(-1, T)
    counts = count_experts(model, windows) if cfg.n_routed_experts > 0 else None
    layers = layers_of(model, ids[:T], attn_inputs, mlp_inputs, counts, found)
    calls = probes.calls_of(model, ids[:T])
    lens = probes.lens_of(model, ids[:T], calls)
    named = {i for head in heads for row in head['ids'] for i in row} | {i for block in lens for i in block['ids']}
    named |= {i for row in (drafts['ids'] + drafts['choices'] if drafts else []) for i in row if i >= 0}
    for layer in layers:
        for tokens in layer.get('experts', {}).get('typical', []):
            tokens[:] = [(counts[0][i].item(), lift, times) for i, lift, times in tokens]
            named |= {i for i, _, _ in tokens}
    E = cfg.n_routed_experts
    return {'pieces': pieces_of(tokenizer, ids[:T].tolist()), 'ids': ids[:T].tolist(),
            'words': {i: pieces_of(tokenizer, [i])[0] for i in sorted(named)}, 'heads': heads, 'drafts': drafts,
            'layers': layers, 'tokens': len(ids), 'counted': windows.numel(), 'block_size': cfg.block_size,
            'lens': lens, 'knockouts': knockouts_of(model, ids[:T], calls, knockouts),
            'E': E, 'K': cfg.num_experts_per_tok, 'scoring': cfg.scoring_func,
            'gates_sum': cfg.routed_scaling_factor if cfg.norm_topk_prob and cfg.num_experts_per_tok > 1 else None,
            'groups': [cfg.n_group, cfg.topk_group], 'cache': cache_of(model, dtype, T),
            'training': training_of(log_path, len(model.moe_layers()), E) if E > 0 else None}


def page(data, title):
    """The HTML. Whatever the tokens hold, the JSON is ASCII without a '<', and the script shows it as text alone."""
    here = os.path.dirname(os.path.abspath(__file__))
    with open(os.path.join(here, 'extras', 'inside.html'), encoding='utf-8') as f:
        template = f.read()
    data = json.dumps(data, allow_nan=False, separators=(',', ':')).replace('<', '\\u003c')
    template = template.replace('GENERATOR', output.MARK).replace('TITLE', html.escape(visible(title)))
    return template.replace('"DATA"', data)


def main():
    if live:
        guard.need(not experts and not knockouts, 'leave out experts and knockouts with live: its page has a slider '
                   'for the experts and switches for the parts')
        return live_page.write(out_dir, text, out)
    path = out or os.path.join(out_dir, 'inside.html')
    guard.check_ranges(globals(), [
        ('out_dir', lambda x: x != '', 'name the folder of a run'),
        ('text', lambda x: x != '', 'name the file to read'),
        ('count_tokens map_bytes', lambda x: x > 0, 'be positive'),
        ('knockouts', lambda x: x in ('', 'True', 'False'), "be 'True', 'False' or ''"),
    ])
    guard.need(os.path.isdir(out_dir), f'{out_dir} is missing: name the folder of a run')
    guard.need(path.endswith('.html') and os.path.isdir(os.path.dirname(path) or '.'),
               f'out={path!r} must end in .html, in a folder that is there')
    output.check(path, [text])
    guard.check_device(device)
    words = scripts.read_text(text)
    model, checkpoint, tokenizer = scripts.load_checkpoint(out_dir, device)
    scripts.choose_experts(model, experts)
    dtype = (checkpoint.get('config') or {}).get('dtype') or 'float32'
    ids = tokenizer.begin + tokenizer.encode(words)
    least, context = 2 + len(model.mtp), model.config.block_size
    guard.need(min(len(ids), context) >= least, f'{text} has {len(ids)} tokens, the context {context}: both must have '
               f'{least} at least')
    guard.need(max(ids) < model.config.vocab_size, f'{tokenizer.name} does not fit the model: the text has the token '
               f'{max(ids)}, the vocabulary {model.config.vocab_size}')
    model = model.eval().float()
    data = look(model, tokenizer, ids, count_tokens, dtype, os.path.join(out_dir, 'log.jsonl'), knockouts)
    data |= {'model': os.path.basename(os.path.abspath(out_dir)), 'text': os.path.basename(text),
             'iteration': checkpoint.get('iter_num'), 'parameters': model.get_num_params(),
             'active': model.get_num_active_params(), 'tokenizer': tokenizer.name}
    content = page(data, f'Inside {data["model"]}: {data["text"]}')
    output.write(path, content.encode(), [text])
    T = len(data['ids'])
    rest = f'; the file has {len(ids)}, the context holds {T}' if len(ids) > T else ''
    print(f'wrote {path}: {T} tokens{rest}; {len(content) / 1e6:.2f} MB; loss {data["heads"][0]["loss"]:.4f}')


if __name__ == '__main__':
    main()
