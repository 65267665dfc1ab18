"""
Fast decoding: the shapes of a step never change, so a step is compiled once, and on a GPU it is one CUDA graph.

A step runs each row's newest token through the main stack. In speculative decoding (V3 section 5.4.3) the D drafts of
the D MTP modules run with it; the step accepts the correct drafts and drafts again. Each row has its own position, so
prompts may differ in length, and each row keeps all of its correct drafts. GPT.generate does the same more slowly:
greedy tokens are equal except for rounding, and sampled tokens have the same distribution.
"""

import copy
import math
import time
from collections import Counter
from typing import NamedTuple

import torch
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map

from extras import experts
from model import GREEDY, MLA, NOT_FINITE, Mistake, MoE, draw, first_line, probabilities

# the ends of the names of norms, routers, the weights of an indexer's heads, and V4's small parameters
KEPT = ('norm.weight', 'norm.bias', '_norm', 'ln_f.weight', 'mlp.gate.weight', 'weights_proj.weight', 'sinks',
        'position_bias', 'engram.conv')


def for_decoding(model, dtype):
    """Prepare a GPT for decoding, in place: cast its weights to dtype once, and join matrices that read the same input.
    KEPT, b and mHC keep their dtypes. -> the model
    """
    for name, p in model.named_parameters():
        hyper = '_hc.' in name or '.hc_' in name  # connections and heads of model_v4.py's mHC
        if not (hyper or name.endswith(KEPT)):
            p.data = p.data.to(dtype)
    if model.config.q_lora_rank > 0:
        for block in model.blocks():
            if hasattr(block.attn, 'latents'):  # MLA
                join_latents(block.attn)
    return model.eval().requires_grad_(False)


def join_latents(attn):
    """Join q_a_proj and kv_a_proj_with_mqa into one matrix, for one product instead of two; they become its views."""
    parts = attn.q_a_proj, attn.kv_a_proj_with_mqa
    sizes = [part.out_features for part in parts]
    for name in ('weight', 'bias') if attn.config.bias else ('weight',):
        attn.register_buffer(f'a_{name}', torch.cat([getattr(part, name).data for part in parts]), persistent=False)
        for part, rows in zip(parts, getattr(attn, f'a_{name}').split(sizes)):
            getattr(part, name).data = rows
    bias = attn.a_bias if attn.config.bias else None
    attn.latents = lambda x: F.linear(x, attn.a_weight, bias).split(sizes, dim=-1)


@torch.no_grad()
def check_absorption(model):
    """Mistake if the attention decodes something else than it trains: see MLA.absorb"""
    T = min(256, model.config.block_size)
    x = torch.arange(float(T * model.config.n_embd)).sin().view(1, T, -1)
    for attn in (block.attn for block in model.blocks()):
        if not (isinstance(attn, MLA) and attn.absorb):
            continue
        attn = copy.deepcopy(attn).float().cpu().eval()
        q, latent = attn.project(x, model.rope_cos[:T].cpu(), model.rope_sin[:T].cpu())
        trained = attn.attend(q, latent)                                                      # (1, T, H*v)
        decoded = attn.attend(q, latent, torch.ones(T, T, dtype=torch.bool).tril())
        if (decoded - trained).norm() > 1e-3 * trained.norm():
            raise Mistake('MLA decodes something else than it trains: set absorb = False in it, or change '
                          'attend_absorbed')


class Speculation(NamedTuple):
    """Counts for each row."""
    passes: torch.Tensor    # (B,): passes that verified drafts
    tokens: torch.Tensor    # (B,): tokens from these passes
    drafts: torch.Tensor    # (B, D): per module, drafts reached: the drafts before them were accepted
    accepted: torch.Tensor  # (B, D): per module, drafts accepted


def speculation(counts):
    """A State's counts (B, 2 + 2 D) -> Speculation"""
    return Speculation(counts[:, 0], counts[:, 1], *counts[:, 2:].chunk(2, dim=1))


def check_scores(scores):
    """Mistake if the score of a new token is nan or infinity."""
    if not all(score < math.inf for score in scores):  # nor for nan
        raise Mistake(NOT_FINITE)


def compiled_step(model):
    # a CUDA graph or C++ saves the host's time, and so do guards that skip the model's modules; without
    # isolate_recompiles another model's Decoder would then get this model's graph
    options = {'triton.cudagraphs' if model.lm_head.weight.is_cuda else 'cpp_wrapper': True,
               'guard_filter_fn': torch.compiler.skip_guard_on_all_nn_modules_unsafe}
    return torch.compile(step, fullgraph=True, dynamic=False, options=options, recompile_limit=64,
                         isolate_recompiles=True)


class Decoder:
    """Generates from a model in eval mode. Between calls the model's weights may change, but not their dtypes or sizes.

    compile: compile the whole step (on a GPU, into a CUDA graph). This takes a while for each new combination of batch
    size, context length (rounded up to powers of two) and sampling. If it fails, one line says so, and decoding goes on
    without it.
    keep_experts, keep_support: generate() also keeps what the routers and the sampling chose, for grpo.py
    """

    def __init__(self, model, compile=False, keep_experts=False, keep_support=False):
        self.model, self.compile, self.step = model, compile, step
        self.layers = [block for block in model.transformer.h if keep_experts and isinstance(block.mlp, MoE)]
        self.keep_support = keep_support
        self.states = {}  # kept for a compiled step: a CUDA graph works only on the tensors it was recorded with
        self.kept = None  # the State of the last stream()
        self.calls = Counter()
        # set by generate(), for each row: the log-probabilities of the tokens it sampled; the experts of its tokens but
        # the last, (tokens, MoE layers, K); the tokens that could be sampled in the place of each, (tokens, V). A next
        # call may overwrite the last two
        self.log_probs, self.experts, self.support = [], [], []
        self.compile_seconds = 0.0
        # a look for stop tokens makes the host wait for the GPU
        self.steps_between_looks = 1 if model.lm_head.weight.device.type == 'cpu' else 16
        if compile:
            try:
                self.step = compiled_step(model)
            except (AttributeError, TypeError) as e:  # another torch, without these options
                self.compile = False
                print(f'going on without torch.compile: {type(e).__name__}: {first_line(e)}')

    @torch.no_grad()
    def generate(self, prompts, max_new_tokens, temperature=1.0, top_k=None, stop_token=None, speculative=False,
                 top_p=1.0):
        """prompts: lists of token ids -> these lists, each extended by at most max_new_tokens (it ends early at
        stop_token), and their Speculation. temperature below GREEDY: always the likeliest token.

        Past block_size the context is the last block_size tokens, as in nanoGPT; GPT.generate does this part, without
        top_p, and keeps nothing.
        ValueError for an empty prompt, or if speculative with a model without MTP modules; Mistake if logits are not
        finite.
        """
        model = self.model
        block_size, D = model.config.block_size, len(model.mtp) if speculative else 0
        if not all(prompts):
            raise ValueError('generate needs a prompt of at least one token')
        if speculative and D == 0:
            raise ValueError('speculative decoding needs MTP modules, and this model has none')
        rows, counts = [list(prompt) for prompt in prompts], torch.zeros(len(prompts), 2 + 2 * D, dtype=torch.long)
        self.log_probs, self.experts, self.support = [[] for _ in rows], [None] * len(rows), [None] * len(rows)
        self.kept = None
        for block in self.layers:  # blocks in training return their routing; their parts stay in eval mode
            block.training = block.mlp.training = True
        if max_new_tokens > 0 and rows:
            contexts = [row[-block_size:] for row in rows]
            length = min(max(map(len, contexts)) + max_new_tokens, block_size + 1)
            s = self.state(len(rows), length, D, sampled=temperature >= GREEDY)
            kind = D, temperature >= GREEDY, top_k, top_p
            begin(model, s, contexts, max_new_tokens, temperature, stop_token, *kind)

            def collect(s, places):
                if D > 0:
                    counts[places] = s.counts.cpu()
                ends, scores = s.known.tolist(), s.scores.tolist()
                for n, (i, row, end, of_row) in enumerate(zip(places, s.tokens.tolist(), ends, scores)):
                    new = slice(len(contexts[i]), end)
                    check_scores(of_row[new])
                    rows[i] += row[new]
                    self.log_probs[i] = of_row[new] if temperature >= GREEDY else []
                    self.experts[i], self.support[i] = s.experts[n, :end - 1], s.support[n, new]

            places = [*range(len(rows))]  # the state's row i belongs to prompt places[i]

            # the host looks at the rows when all may be done; with a stop token, which may come at any time, more often
            left = min(max_new_tokens, block_size + 1 - min(map(len, contexts))) - 1
            while left > 0:
                fewest = -(-left // (1 + D))
                for _ in range(fewest if stop_token is None else min(fewest, self.steps_between_looks)):
                    self.take_step(s, *kind)
                remaining = (s.end - s.known).masked_fill(s.done, 0).tolist()
                left = max(remaining)
                done = [i for i, n in enumerate(remaining) if n == 0]
                going = [i for i, n in enumerate(remaining) if n > 0]
                if going and len(done) >= len(going) / 3 and not self.compile:  # a compiled step has a fixed batch size
                    collect(take_rows(s, done), [places[i] for i in done])
                    s, places = take_rows(s, going), [places[i] for i in going]
            collect(s, places)
        full = [(row, left) for row, prompt in zip(rows, prompts)
                if (left := len(prompt) + max_new_tokens - len(row)) > 0 and row[-1] != stop_token]
        if full:  # rows with a full context go on together
            idx = torch.tensor([row[-block_size:] for row, _ in full], device=model.lm_head.weight.device)
            out = model.generate(idx, max(left for _, left in full), temperature, top_k, stop_token)
            for (row, left), new in zip(full, out[:, block_size:].tolist()):
                new = new[:left]
                row += new[:new.index(stop_token) + 1] if stop_token in new else new
        return rows, speculation(counts)

    @torch.no_grad()
    def stream(self, prompt, max_new_tokens, temperature=1.0, top_k=None, stop_token=None, speculative=False, spare=0):
        """One prompt, token ids -> yields lists of the tokens that follow it, as they come: the same as generate()'s.
        After each list the caller may leave.

        The caches stay, and a next call with the same weights, whose prompt begins with all tokens so far, reads only
        its own tokens. spare: positions to reserve for such calls
        Mistake, ValueError: as in generate()
        """
        model, row = self.model, list(prompt)
        block_size, D = model.config.block_size, len(model.mtp) if speculative else 0
        if not row:
            raise ValueError('stream needs a prompt of at least one token')
        if speculative and D == 0:
            raise ValueError('speculative decoding needs MTP modules, and this model has none')
        last = len(row) + max_new_tokens
        if max_new_tokens > 0:
            context, kind = row[-block_size:], (D, temperature >= GREEDY, top_k, 1.0)
            length = min(len(context) + max_new_tokens, block_size + 1)
            settings = max_new_tokens, temperature, stop_token, *kind
            if self.continues(context, length, D):
                extend(model, self.kept, context, *settings)
            else:
                self.kept = self.state(1, min(length + spare, block_size + 1), D)
                begin(model, self.kept, [context], *settings)
            known, done, s = len(context), False, self.kept
            while not done:
                if known > len(context):
                    self.take_step(s, *kind)
                new, done = slice(known, s.known.item()), s.done.item()
                check_scores(s.scores[0, new].tolist())
                tokens, known = s.tokens[0, new].tolist(), new.stop
                row += tokens
                yield tokens
        while len(row) < last and row[-1] != stop_token:  # the context is full
            idx = torch.tensor([row[-block_size:]], device=model.lm_head.weight.device)
            row += model.generate(idx, 1, temperature, top_k)[0, -1:].tolist()
            yield row[-1:]

    def continues(self, prompt, length, D):
        """True if the kept State has the beginning of this prompt, and room for `length` tokens."""
        s = self.kept
        if s is None or s.q.size(1) != D or s.tokens.size(1) < length + 1 + D:
            return False
        known = s.known.item()
        return known <= len(prompt) and s.tokens[0, :known].tolist() == prompt[:known]

    def room(self, length, D):
        """-> S, the positions for rows of up to `length` tokens and 1 + D more, where a finished row still writes. A
        compiled step should meet few sizes: S is 32 plus a power of two, which fits a whole context closely.
        """
        S = length + 1 + D
        return 32 + (1 << (max(S, 64) - 33).bit_length()) if self.compile else S

    def state(self, B, length, D, sampled=True):
        """A State for B rows of up to `length` tokens, without room for a support if tokens are not sampled."""
        S, kept = self.room(length, D), (len(self.layers), self.keep_support and sampled)
        if not self.compile:
            return empty_state(self.model, B, S, D, None, *kept)
        shape = B, S, D, *kept
        if shape in self.states:
            for cache in tree_leaves(self.states[shape].caches):  # an earlier call's nan would spread: 0 * nan is nan
                cache.zero_()
        else:
            self.states[shape] = empty_state(self.model, B, S, D, None, *kept)
            for x in tensors_of(self.states[shape]):
                torch._dynamo.mark_static_address(x)  # so that a CUDA graph may change it in place
        return self.states[shape]

    def bytes_per_row(self, length, D):
        """Memory for a row of up to `length` tokens: its part of the State, and a step's logits and probabilities."""
        s = empty_state(self.model, 1, self.room(length, D), D, 'meta', len(self.layers), self.keep_support)
        return sum(x.nbytes for x in tensors_of(s)) + 16 * (1 + D) * self.model.config.vocab_size

    def take_step(self, s, *kind):
        """One step(). The first two calls of a kind compile it and record its CUDA graph."""
        if self.compile:
            self.calls[kind, s.tokens.shape] += 1
        if not self.compile or self.calls[kind, s.tokens.shape] > 2:
            return self.step(self.model, s, *kind)
        t0 = time.time()
        try:
            with experts.compiled(self.model):
                self.step(self.model, s, *kind)
            self.compile_seconds += time.time() - t0
        except Exception as e:  # raised before the state changed
            print(f'going on without torch.compile: {type(e).__name__}: {first_line(e)}')
            self.compile, self.step = False, step
            self.step(self.model, s, *kind)


class State(NamedTuple):
    """The tensors that a step reads and changes in place. S: positions per row, from Decoder.room()."""
    tokens: torch.Tensor       # (B, S): known tokens, then drafts
    scores: torch.Tensor       # (B, S): of a new token, its log-probability if sampled, its logit if not, as float32
    known: torch.Tensor        # (B,): number of known tokens
    end: torch.Tensor          # (B,): `known` of a complete row, at most block_size + 1
    done: torch.Tensor         # (B,): True for complete rows; a step computes them too, but keeps their known tokens
    stop: torch.Tensor         # (): the token that completes a row, or -1
    temperature: torch.Tensor  # ()
    caches: list               # from make_cache(): in a joint tensor, a compiled write would copy everything
    h: torch.Tensor            # (B, S, C): states of the main stack, input of the MTP modules
    q: torch.Tensor            # (B, D, V): the probabilities that the drafts were sampled from
    counts: torch.Tensor       # (B, 2 + 2 D): the fields of Speculation
    experts: torch.Tensor      # (B, S, MoE layers, K): each position's experts; no layers unless they are kept
    support: torch.Tensor      # (B, S, V): True for tokens that a new token's sampling could draw; (B, 0, V): not kept


def empty_state(model, B, S, D, device=None, layers=0, keep_support=False):
    """-> a State of zeros, on `device` or on the model's. layers: MoE layers of the main stack with experts to keep"""
    w = model.lm_head.weight

    def zeros(*shape, dtype=torch.long):
        return torch.zeros(shape, dtype=dtype, device=device or w.device)

    blocks = len(model.blocks()) if D else model.config.n_layer
    return State(zeros(B, S), zeros(B, S, dtype=torch.float32), zeros(B), zeros(B),
                 zeros(B, dtype=torch.bool), zeros(), zeros(dtype=torch.float32),
                 model.make_cache(B, S, blocks, device),
                 zeros(B, S if D else 0, model.config.n_embd, dtype=w.dtype),
                 zeros(B, D, model.config.vocab_size, dtype=torch.float32), zeros(B, 2 + 2 * D),
                 zeros(B, S, layers, model.config.num_experts_per_tok, dtype=torch.int16),
                 zeros(B, S if keep_support else 0, model.config.vocab_size, dtype=torch.bool))


def tensors_of(s):
    return tree_leaves(s)


def take_rows(s, rows):
    """-> a copy of the State, with the given rows alone"""
    rows = torch.tensor(rows).to(s.known.device)
    return s._replace(caches=tree_map(lambda cache: cache[rows], s.caches),
                      **{name: x[rows] for name, x in s._asdict().items() if name != 'caches' and x.dim() > 0})


def begin(model, s, prompts, max_new_tokens, temperature, stop_token, D, sampled, top_k, top_p=1.0):
    """Fill s from the prompts, padded on the right, and add each row's first new token and its drafts.

    U different prompts are computed in the caches' first U rows; then each row copies the row of its prompt.
    """
    longest = max(map(len, prompts))
    number = {prompt: u for u, prompt in enumerate(sorted(dict.fromkeys(map(tuple, prompts)), key=len))}
    U, source = len(number), [number[tuple(prompt)] for prompt in prompts]
    firsts = [source.index(u) for u in range(U)]                              # the first row with each prompt
    moved = source != [*range(len(source))]
    numbers = torch.tensor([[len(prompt) for prompt in prompts], source, firsts + [0] * (len(source) - U)])
    known, source, firsts = numbers.to(s.known.device)                                        # (B,) each
    write_prompts(model, s, prompts, known, max_new_tokens, temperature, stop_token)
    tokens = s.tokens[firsts[:U], :longest]                                                   # (U, longest)
    lengths = [longest] * U
    # a ring, unlike a cache with a row for each position, would keep the padding: each length by itself
    if any(cache.size(1) != s.tokens.size(1) for cache in tree_leaves(s.caches)):
        lengths = [*map(len, number)]
    h = torch.cat([read(model, s, tokens, slice(lengths.index(n), lengths.index(n) + lengths.count(n)), n, D)
                   for n in dict.fromkeys(lengths)])                                          # (U, longest, C)
    if moved:
        for cache in (*tree_leaves(s.caches), s.experts):
            cache[:, :longest] = cache[source, :longest]
    advance(model, s, h[source.unsqueeze(1), known.unsqueeze(1) - 1], 0, sampled, top_k, top_p)
    if D > 0:
        s.h[:, :longest] = h[source]
        draft(model, s, sampled, top_k)


def write_prompts(model, s, prompts, known, max_new_tokens, temperature, stop_token):
    """The part of a State that needs no model: the prompts' tokens, padded, their lengths `known` (B,), and what is
    asked for.
    """
    longest = max(map(len, prompts))
    s.known.copy_(known)
    s.end.copy_((s.known + max_new_tokens).clamp(max=model.config.block_size + 1))
    s.tokens[:, :longest] = torch.tensor([prompt + [0] * (longest - len(prompt)) for prompt in prompts])
    s.done.fill_(False)
    s.stop.fill_(-1 if stop_token is None else stop_token)
    s.temperature.fill_(min(temperature, 1e30))  # fits in float32
    s.counts.zero_()


def extend(model, s, prompt, max_new_tokens, temperature, stop_token, D, sampled, top_k, top_p=1.0):
    """begin() for a State of one row that knows the beginning of its prompt: only the rest is read.

    The caches lack the row of the newest known token. Module k made its k - 1 rows before that from drafts.
    """
    first, end = s.known.item() - 1, len(prompt)
    write_prompts(model, s, [prompt], torch.tensor([end]), max_new_tokens, temperature, stop_token)
    h, _ = model.main_stack(s.tokens[:, first:end], s.caches, first)                          # (1, end - first, C)
    advance(model, s, h[:, -1:], 0, sampled, top_k, top_p)
    if D > 0:
        s.h[:, first:end] = h
        first = max(0, first - D + 1)
        h = s.h[:, first:end]
        for k, module, blocks in mtp_modules(model, s.caches):  # draft() recomputes the last rows
            h, _ = model.mtp_module(module, s.tokens[:, first + k:end + k], h, blocks, first)
        draft(model, s, sampled, top_k)


def read(model, s, tokens, rows, length, D):
    """Fill the given rows of the caches from tokens (U, longest), up to `length` -> main states (rows, longest, C)"""
    caches, tokens, padding = tree_map(lambda cache: cache[rows], s.caches), tokens[rows], tokens.size(1) - length
    states, routing = model.main_stack(tokens[:, :length], caches)
    if s.experts.size(2):
        s.experts[rows, :length] = experts_of(routing)
    h = states
    for k, module, blocks in mtp_modules(model, caches) if D > 0 else ():  # draft() recomputes the last rows
        h, _ = model.mtp_module(module, F.pad(tokens[:, k:length], (0, min(k, length))), h, blocks)
    return F.pad(states, (0, 0, 0, padding))


def experts_of(routing):
    """main_stack()'s routing -> the experts of its MoE layers (B, T, layers, K)"""
    return torch.stack([experts for _, experts in routing], dim=2).to(torch.int16)


def mtp_modules(model, caches):
    """Yields for each MTP module its number k, from 1, the module, and the caches of its blocks."""
    for k, module in enumerate(model.mtp, start=1):
        first = model.config.n_layer + (k - 1) * len(module.h)
        yield k, module, caches[first:first + len(module.h)]


def rows_of(x):
    """-> the row numbers (B, 1), to index x (B, S, ...) together with positions (B, T)"""
    return torch.arange(len(x), device=x.device).unsqueeze(1)


def step(model, s, D, sampled, top_k, top_p=1.0):
    """Run each row's newest token and D drafts through the main stack, add its new tokens, and draft again.
    sampled: draw tokens with s.temperature, top_k and top_p; False: take the likeliest. These and D select a compiled
    step.
    """
    positions = s.known.unsqueeze(1) - 1 + torch.arange(1 + D, device=s.known.device)         # (B, 1+D)
    h, routing = model.main_stack(s.tokens.gather(1, positions), s.caches, positions)         # (B, 1+D, C)
    if s.experts.size(2):
        s.experts[rows_of(s.experts), positions] = experts_of(routing)
    advance(model, s, h, D, sampled, top_k, top_p)
    if D > 0:
        s.h[rows_of(h), positions] = h
        draft(model, s, sampled, top_k)


def advance(model, s, h, drafted, sampled, top_k, top_p=1.0):
    """Add 1 to 1 + drafted tokens to each row. h (B, 1 + drafted, C): main states at its newest token and drafts."""
    n = torch.arange(1 + drafted, device=h.device)
    places = s.known.unsqueeze(1) + n                                                         # (B, 1+drafted)
    drafts = s.tokens.gather(1, places[:, :drafted])
    logits = model.lm_head(h)                                                                 # (B, 1+drafted, V)
    if sampled:
        p = likeliest(probabilities(logits.float() / s.temperature, 1.0, top_k), top_p)
        if s.support.size(1):
            s.support[rows_of(s.support), places] = p > 0
        new, accepted = verify(drafts, s.q[:, :drafted], p)
        scores = p.gather(-1, new.unsqueeze(-1)).squeeze(-1).log()                            # (B, 1+drafted)
    else:
        scores, new = logits.max(dim=-1)
        accepted = count_leading(new[:, :drafted] == drafts)                                  # (B,)
    alive, run = ~s.done.unsqueeze(1), n <= accepted.unsqueeze(1)                             # (B, 1), (B, 1+drafted)
    stops = new == s.stop
    after_stop = stops.cumsum(dim=1) > stops.long()
    kept = run & alive & ~after_stop & (places < s.end.unsqueeze(1))
    if drafted:
        at_draft = kept[:, :-1]
        s.counts.add_(torch.cat((alive, kept.sum(dim=1, keepdim=True), at_draft, at_draft & run[:, 1:]), dim=1))
    s.tokens.scatter_(1, places, new)
    s.scores.scatter_(1, places, scores.float())
    s.known.add_(kept.sum(dim=1))
    s.done.logical_or_((kept & stops).any(dim=1) | (s.known >= s.end))


def likeliest(p, top_p):
    """Nucleus sampling (arXiv 1904.09751): keep of p (..., V) the likeliest tokens, as few as reach a sum of top_p."""
    if top_p >= 1:
        return p
    best, order = p.sort(dim=-1, descending=True)                                             # (..., V)
    best = best.masked_fill(best.cumsum(dim=-1) - best >= top_p, 0.0)  # the likelier ones reach it without this one
    return torch.zeros_like(p).scatter(-1, order, best / best.sum(dim=-1, keepdim=True))


def count_leading(right):
    """(B, D), bool -> (B,): the number of True values before the first False"""
    return right.long().cumprod(dim=1).sum(dim=1)


def verify(drafts, q, p):
    """Speculative sampling (arXiv 2211.17192): the drafts were drawn from q, the new tokens are distributed as p.

    drafts (B, D); q (B, D, V); p (B, 1 + D, V) -> new tokens (B, 1 + D) and a (B,), the number of drafts that each row
    accepts. A row uses its first 1 + a tokens: the accepted drafts and one more.
    """
    at_draft = [x.gather(-1, drafts.unsqueeze(-1)).squeeze(-1) for x in (p[:, :-1], q)]       # (B, D) each
    accept = torch.rand_like(at_draft[1]) * at_draft[1] < at_draft[0]                         # with probability p / q
    a = count_leading(accept).unsqueeze(1)                                                    # (B, 1)
    q = torch.cat((q, torch.zeros_like(p[:, :1])), dim=1)                                     # 0 if all are accepted
    p_a, q_a = (x[rows_of(a), a].squeeze(1) for x in (p, q))                                  # (B, V)
    rest = (p_a - q_a).clamp(min=0)                                           # after a rejection: max(p - q, 0)
    rest = torch.where(rest.sum(dim=-1, keepdim=True) > 0, rest, p_a)
    new = torch.cat((drafts, torch.zeros_like(a)), dim=1).scatter(1, a, draw(rest))
    return new, a.squeeze(1)


def draft(model, s, sampled, top_k):
    """Write the D drafts of the MTP modules after the known tokens.

    Each module computes the last 1 + D positions: up to 1 + D tokens are new, and module k made its last k rows from
    drafts, which may have been rejected.
    """
    D = len(model.mtp)
    window = (s.known.unsqueeze(1) - 2 + torch.arange(-D, 1, device=s.known.device)).clamp(min=0)  # (B, 1+D)
    h = s.h[rows_of(s.h), window]                                                             # (B, 1+D, C)
    for k, module, caches in mtp_modules(model, s.caches):
        h, _ = model.mtp_module(module, s.tokens.gather(1, window + k), h, caches, window)
        logits = model.lm_head(h[:, -1])                                                      # (B, V)
        if sampled:
            q = probabilities(logits.float() / s.temperature, 1.0, top_k)
            s.q[:, k - 1] = q
            token = draw(q)
        else:
            token = logits.argmax(dim=-1, keepdim=True)
        s.tokens.scatter_(1, s.known.unsqueeze(1) - 1 + k, token)
