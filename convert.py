"""
Checkpoints out to Hugging Face transformers and in from it: the DeepSeek-V2 and V3 family, logit for logit.

    python convert.py export --out_dir=out-x --hf_dir=DIR    # ckpt.pt -> weights, tokenizer, model card
                                                             # --fp8: weights as V3's are released
    python convert.py import --hf_dir=DIR --out_dir=out-y    # a local Hugging Face folder -> ckpt.pt

Both write beside and rename, so that a mistake or a kill leaves nothing half-written.
"""

import argparse
import contextlib
import dataclasses
import json
import math
import os
import re
import shutil
import signal
import sys

if __name__ == '__main__':  # Ctrl-C while torch is imported ends it without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from extras.folder import TOKENIZER_FILES, copy_tokenizer, elsewhere
from model import GPT, GPTConfig, Mistake, first_line, save_checkpoint
from tokenizer import from_folder, of_checkpoint, read_table

# -----------------------------------------------------------------------------
# the settings: GPTConfig's fields and config.json's

RENAMED = {'block_size': 'max_position_embeddings', 'n_layer': 'num_hidden_layers', 'n_head': 'num_attention_heads',
           'n_embd': 'hidden_size', 'bias': 'attention_bias'}
SAME = ('vocab_size', 'tie_word_embeddings', 'rms_norm_eps', 'initializer_range', 'kv_lora_rank', 'qk_nope_head_dim',
        'qk_rope_head_dim', 'v_head_dim', 'rope_theta', 'n_routed_experts', 'n_shared_experts', 'num_experts_per_tok',
        'moe_intermediate_size', 'intermediate_size', 'first_k_dense_replace', 'n_group', 'topk_group',
        'norm_topk_prob', 'routed_scaling_factor')
NAMES = RENAMED | {name: name for name in SAME}
YARN = ('factor', 'original_max_position_embeddings', 'beta_fast', 'beta_slow', 'mscale', 'mscale_all_dim')
# what a config.json may leave out, or give as null
DEFAULTS = {'attention_bias': False, 'tie_word_embeddings': False, 'rms_norm_eps': 1e-6, 'initializer_range': 0.02,
            'rope_theta': 10000.0, 'n_routed_experts': 0, 'n_shared_experts': 0, 'n_group': 1, 'topk_group': 1,
            'first_k_dense_replace': 0}


def settings_out(config, dtype, eos_token_id):
    """GPTConfig -> config.json, and a line for each part that cannot be expressed there."""
    left_out = []
    v2 = config.scoring_func == 'softmax'
    if v2 and config.norm_topk_prob:
        raise Mistake('softmax scores with norm_topk_prob=True have no counterpart in transformers: it normalises '
                      "V3's sigmoid scores and takes V2's softmax scores as they are")
    if config.n_routed_experts == 1:
        raise Mistake('a single routed expert has no counterpart in transformers: its router ranks groups by their '
                      'best two')
    modules = config.num_nextn_predict_layers
    if modules > 0 and (v2 or config.mtp_n_layer > 1 or config.n_routed_experts == 0):
        reason = 'softmax scores' if v2 else 'dense blocks' if config.n_routed_experts == 0 else \
            f'{config.mtp_n_layer} blocks each'
        left_out.append(f'left out: the {modules} MTP modules, because the format has no modules with {reason}')
        modules = 0
    settings = {'architectures': ['DeepseekV2ForCausalLM' if v2 else 'DeepseekV3ForCausalLM'],
                'model_type': 'deepseek_v2' if v2 else 'deepseek_v3'}
    settings |= {theirs: getattr(config, ours) for ours, theirs in NAMES.items()}
    settings |= {'num_key_value_heads': config.n_head, 'q_lora_rank': config.q_lora_rank or None,
                 'num_nextn_predict_layers': modules, 'scoring_func': config.scoring_func,
                 'hidden_act': 'silu', 'attention_dropout': 0.0, 'moe_layer_freq': 1,
                 'bos_token_id': None, 'eos_token_id': eos_token_id, 'pad_token_id': None, 'torch_dtype': dtype}
    if config.n_group == config.n_routed_experts:  # groups of one: the best groups are the best experts
        settings |= {'n_group': 1, 'topk_group': 1}
    settings['topk_method'] = 'noaux_tc' if not v2 else 'greedy' if settings['n_group'] == 1 else 'group_limited_greedy'
    if config.num_experts_per_tok == 1:
        settings['norm_topk_prob'] = False  # a single gate is never normalised here
    if config.n_routed_experts == 0:
        settings['first_k_dense_replace'] = config.n_layer
    if config.rope_factor > 1:
        settings['rope_scaling'] = {'type': 'yarn'} | {name: getattr(config, f'rope_{name}') for name in YARN}
    return settings, left_out


def settings_in(settings):
    """config.json -> the keywords of GPTConfig."""
    architecture = (settings.get('architectures') or ['nothing'])[0]
    if architecture not in ('DeepseekV2ForCausalLM', 'DeepseekV3ForCausalLM'):
        raise Mistake(f'its architecture is {architecture}; DeepseekV2ForCausalLM and DeepseekV3ForCausalLM fit')
    v2 = architecture == 'DeepseekV2ForCausalLM'
    grouped = v2 and settings.get('topk_method') == 'group_limited_greedy'
    fixed = {'hidden_act': ['silu'], 'mlp_bias': [False], 'moe_layer_freq': [1], 'rope_interleave': [True],
             'num_key_value_heads': [settings.get('num_attention_heads')],
             'scoring_func': ['softmax' if v2 else 'sigmoid'],
             'topk_method': ['greedy', 'group_limited_greedy'] if v2 else ['noaux_tc']}
    for name, allowed in fixed.items():
        if settings.get(name) is not None and settings[name] not in allowed:
            raise Mistake(f'{name}={settings[name]!r} is not supported; {" or ".join(map(repr, allowed))} is')
    quantised = settings.get('quantization_config') or {}
    if quantised and quantised.get('quant_method') != 'fp8':
        raise Mistake(f"weights quantised by {quantised.get('quant_method')!r} are not supported; V3's block-wise "
                      "'fp8' is")
    if quantised.get('weight_block_size', [128, 128]) != [128, 128]:
        raise Mistake(f"FP8 blocks of {quantised['weight_block_size']} are not supported; [128, 128] are")

    # transformers 5 writes rope_parameters, the released files have rope_theta and rope_scaling
    rope = settings.get('rope_parameters') or settings.get('rope_scaling') or {}
    settings = settings | {'rope_theta': rope.get('rope_theta') or settings.get('rope_theta')}
    args = {}
    for ours, theirs in NAMES.items():
        value = settings.get(theirs)
        if value is None:
            value = DEFAULTS.get(theirs)
        if value is None:
            raise Mistake(f'config.json lacks {theirs}')
        args[ours] = value
    args |= {'q_lora_rank': settings.get('q_lora_rank') or 0, 'scoring_func': 'softmax' if v2 else 'sigmoid',
             'mtp_n_layer': 1,
             'num_nextn_predict_layers': 0 if v2 else settings.get('num_nextn_predict_layers') or 0}
    args['first_k_dense_replace'] = min(args['first_k_dense_replace'], args['n_layer'])
    if v2:
        if args['norm_topk_prob']:
            raise Mistake('norm_topk_prob=True with softmax scores is not supported: no released model has it')
        if not grouped:
            args |= {'n_group': 1, 'topk_group': 1}
    elif args['num_experts_per_tok'] == 1 and args['norm_topk_prob']:
        raise Mistake('num_experts_per_tok=1 with norm_topk_prob=True is not supported: its gates would be constant')
    if type(settings.get('eos_token_id')) is int:
        args['eos_token_id'] = settings['eos_token_id']

    kind = rope.get('rope_type') or rope.get('type') or 'default'
    if kind not in ('default', 'yarn'):
        raise Mistake(f"RoPE of type {kind!r} is not supported; 'default' and 'yarn' are")
    if kind == 'yarn':
        if rope.get('attention_factor') is not None or rope.get('truncate') is False:
            raise Mistake('YaRN with an attention_factor or truncate=False is not supported')
        given = {name: rope[name] for name in YARN if rope.get(name) is not None}
        original = given.setdefault('original_max_position_embeddings', args['block_size'])
        given.setdefault('factor', args['block_size'] / original)
        given = {'mscale': 0.0, 'mscale_all_dim': 0.0} | given  # not the defaults of GPTConfig
        args |= {f'rope_{name}': value for name, value in given.items()}
    return args


# -----------------------------------------------------------------------------
# the weights: one table for both directions

def parts(config, name, tensor):
    """The released names of the tensor `name` of our state dict, each with its view of that tensor."""
    outside = {'transformer.wte.weight': 'model.embed_tokens.weight', 'transformer.ln_f.weight': 'model.norm.weight'}
    if name in outside:
        return [(outside[name], tensor)]
    if name == 'lm_head.weight':
        return [] if config.tie_word_embeddings else [(name, tensor)]
    place, i, inner = re.fullmatch(r'(transformer\.h|mtp)\.(\d+)\.(.+)', name).groups()
    layer = f'model.layers.{int(i) + (config.n_layer if place == "mtp" else 0)}.'
    if place == 'mtp' and inner == 'norm.weight':
        return [(layer + 'shared_head.norm.weight', tensor)]
    inner = re.sub(r'^h\.0\.', '', inner)  # an MTP module's one block
    inner = re.sub(r'^attn\.', 'self_attn.', inner)
    if inner == 'mlp.e_score_correction_bias':
        return [(layer + 'mlp.gate.e_score_correction_bias', tensor)] if config.scoring_func == 'sigmoid' else []
    if inner == 'mlp.experts_gate_up':
        return [(f'{layer}mlp.experts.{e}.{half}_proj.weight', w)                          # (h, C) each
                for e, both in enumerate(tensor) for half, w in zip(('gate', 'up'), both.chunk(2))]
    if inner == 'mlp.experts_down':
        return [(f'{layer}mlp.experts.{e}.down_proj.weight', w) for e, w in enumerate(tensor)]  # (C, h) each
    if inner.endswith('gate_up_proj.weight'):
        return [(layer + inner.replace('gate_up', half), w) for half, w in zip(('gate', 'up'), tensor.chunk(2))]
    return [(layer + inner, tensor)]


def shared_copies(config):
    """The embedding and the head under the names that each MTP module repeats them by, and the tensors they repeat."""
    head = 'model.embed_tokens.weight' if config.tie_word_embeddings else 'lm_head.weight'
    return {f'model.layers.{config.n_layer + k}.{copy}.weight': source for k in range(config.num_nextn_predict_layers)
            for copy, source in (('embed_tokens', 'model.embed_tokens.weight'), ('shared_head.head', head))}


def skeleton(config):
    """The state dict's names and shapes, without memory for the numbers."""
    try:
        with torch.device('meta'):
            return GPT(config).state_dict()
    except (RuntimeError, TypeError) as e:  # TypeError: a number beyond 64 bits
        raise Mistake(f'config.json asks for sizes that no model has: {first_line(e)}') from None


def open_folder(hf_dir):
    """A Hugging Face folder -> the keywords of its GPTConfig, and {released name: the open file that holds it}.

    Names and shapes are checked against the model before any number is read. ValueError where they do not fit.
    """
    try:
        args = settings_in(read_table(os.path.join(hf_dir, 'config.json')))
        config = GPTConfig(**args)
        index = os.path.join(hf_dir, 'model.safetensors.index.json')
        files = ['model.safetensors']
        if os.path.exists(index):
            files = sorted(set(read_table(index)['weight_map'].values()))
    except Exception as e:  # a table of something else fails in many ways
        raise Mistake(f'{hf_dir} cannot be read: {first_line(e)}') from None
    tensors = {}
    for name in files:
        try:
            file = safe_open(os.path.join(hf_dir, name), framework='pt')  # mapped: a tensor is read when asked for
            tensors |= dict.fromkeys(file.keys(), file)
        except Exception as e:  # safetensors has errors of its own
            raise Mistake(f'{hf_dir}/{name} is damaged or missing: {first_line(e)}') from None
    modules = f'model.layers.{args["n_layer"]}.'
    if args['num_nextn_predict_layers'] and not any(name.startswith(modules) for name in tensors):
        print('config.json names MTP modules and the weights have none: going on without them')
        args['num_nextn_predict_layers'] = 0
        config = GPTConfig(**args)
    check_tensors(hf_dir, tensors, config)
    return args, tensors


def check_tensors(hf_dir, tensors, config):
    wanted = {part: list(view.shape) for name, tensor in skeleton(config).items()
              for part, view in parts(config, name, tensor)}
    copies = shared_copies(config)
    if config.tie_word_embeddings:
        copies['lm_head.weight'] = 'model.embed_tokens.weight'
    missing = [name for name in wanted if name not in tensors]
    known = {*wanted, *copies, *(f'{name}_scale_inv' for name in wanted)}
    extra = [name for name in tensors if name not in known and not name.endswith('rotary_emb.inv_freq')
             and 0 not in tensors[name].get_slice(name).get_shape()]
    for names, fault in ((missing, 'missing'), (extra, 'unknown to this model')):
        if names:
            raise Mistake(f'{hf_dir}: {len(names)} tensors are {fault}, the first is {names[0]}')
    for name, shape in wanted.items():
        found, code = shape_and_dtype(tensors, name)
        if found != shape:
            raise Mistake(f'{hf_dir}: {name} has the shape {found}, config.json asks for {shape}')
        if code not in ('F64', 'F32', 'F16', 'BF16', 'F8_E4M3'):
            raise Mistake(f"{hf_dir}: {name} is in {code}; F32, F16, BF16 and V3's F8_E4M3 are read")
        if code == 'F8_E4M3':
            scale, blocks = f'{name}_scale_inv', [-(-side // 128) for side in shape]
            if scale not in tensors:
                raise Mistake(f'{hf_dir}: {name} is in FP8 and its {scale} is missing')
            found, code = shape_and_dtype(tensors, scale)
            if found != blocks or code not in ('F32', 'F16', 'BF16', 'F8_E8M0'):
                raise Mistake(f'{hf_dir}: {scale} is {code} of the shape {found}; a factor for each block of '
                              f'128 x 128 is {blocks}, in F32, BF16 or F8_E8M0')
    for name, source in copies.items():
        if name in tensors and not torch.equal(read(tensors, name), read(tensors, source)):
            raise Mistake(f'{hf_dir}: {name} differs from {source}; this model shares one')


def shape_and_dtype(tensors, name):
    view = tensors[name].get_slice(name)
    return view.get_shape(), view.get_dtype()


def read(tensors, name):
    """One tensor. V3's FP8 weights come with a factor for each block of 128 x 128, and leave as bf16.

    The factors are fp32, or powers of two in one byte (E8M0; scale_fmt "ue8m0").
    """
    tensor = tensors[name].get_tensor(name)
    if tensor.dtype != torch.float8_e4m3fn:
        return tensor
    scale = tensors[f'{name}_scale_inv'].get_tensor(f'{name}_scale_inv').float()           # (out / 128, in / 128)
    rows, cols = tensor.shape
    scale = scale.repeat_interleave(128, dim=0)[:rows].repeat_interleave(128, dim=1)[:, :cols]  # (out, in)
    return (tensor.float() * scale).bfloat16()


def read_weights(tensors, config, state):
    """Fill the tensors of a state dict in place, one released tensor at a time."""
    for name, tensor in state.items():
        for part, view in parts(config, name, tensor):
            view.copy_(read(tensors, part))


def open_model(hf_dir, overrides=None, device='cpu'):
    """A folder of the DeepSeek-V2 or V3 family -> a new model of its shape, and the tensors to fill it from.

    overrides: keywords of GPTConfig.
    """
    args, tensors = open_folder(hf_dir)
    with torch.device(device):
        return GPT(GPTConfig(**(args | (overrides or {})))), tensors


def load_folder(hf_dir, overrides=None):
    """The model of a folder, in fp32."""
    model, tensors = open_model(hf_dir, overrides)
    read_weights(tensors, model.config, model.state_dict())
    return model


def dtype_here(tensors, name):
    """The dtype that a released tensor has after read()."""
    code = tensors[name].get_slice(name).get_dtype()
    return {'F64': torch.float32, 'F32': torch.float32, 'F16': torch.float16}.get(code, torch.bfloat16)


def empty_state(tensors, config):
    """A state dict to be filled: each tensor in its released dtype, the balance bias in fp32."""
    state = {}
    for name, tensor in skeleton(config).items():
        released = parts(config, name, tensor)
        keep = released and not name.endswith('e_score_correction_bias')
        dtype = dtype_here(tensors, released[0][0]) if keep else torch.float32
        state[name] = torch.zeros(tensor.shape, dtype=dtype)
    if config.tie_word_embeddings:
        state['lm_head.weight'] = state['transformer.wte.weight']
    return state


# -----------------------------------------------------------------------------
# the tokenizer

def byte_characters():
    """GPT-2's alphabet: a printable character for each byte."""
    printable = [*range(ord('!'), ord('~') + 1), *range(ord('¡'), ord('¬') + 1), *range(ord('®'), ord('ÿ') + 1)]
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


def merge_of(token, ranks):
    """The two tokens whose merge made this one: what is left of it when only earlier merges are applied."""
    pieces = [bytes([b]) for b in token]
    while len(pieces) > 2:
        pairs = [ranks.get(a + b, math.inf) for a, b in zip(pieces, pieces[1:])]
        i = pairs.index(min(pairs))
        pieces[i:i + 2] = [pieces[i] + pieces[i + 1]]
    return pieces


def gpt2_tokenizer():
    """GPT-2's byte-level BPE, from tiktoken's table of ranks."""
    import tiktoken
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    ranks = tiktoken.get_encoding('gpt2')._mergeable_ranks
    alphabet = byte_characters()

    def text(token):
        return ''.join(alphabet[b] for b in token)

    merges = [tuple(map(text, merge_of(token, ranks))) for token in sorted(ranks, key=ranks.get) if len(token) > 1]
    tokenizer = Tokenizer(models.BPE(vocab={text(token): rank for token, rank in ranks.items()}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken('<|endoftext|>', normalized=False)])
    return tokenizer


def character_tokenizer(stoi):
    """One token per character; a character that the table lacks is an error."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel(vocab=stoi, unk_token=''))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r'[\s\S]'), behavior='isolated')
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def write_tokenizer(out_dir, folder, meta, vocab_size):
    """The tokenizer into the folder -> the id of its end-of-text token, or None; and what it is, in words."""
    if not meta and vocab_size < 50257 and not os.path.exists(os.path.join(out_dir, 'tokenizer.json')):
        print('left out: the tokenizer, because the checkpoint has no table of characters and too few tokens for GPT-2')
        return None, 'not known'
    speaks = of_checkpoint(out_dir, meta, vocab_size)
    if speaks.sha256:
        copy_tokenizer(out_dir, folder)
        return speaks.end, 'the one that came with the checkpoint'
    tokenizer = character_tokenizer(meta['stoi']) if meta.get('stoi') else gpt2_tokenizer()
    tokenizer.save(os.path.join(folder, 'tokenizer.json'))
    settings = {'tokenizer_class': 'PreTrainedTokenizerFast', 'clean_up_tokenization_spaces': False}
    if speaks.end is not None:
        settings['eos_token'] = '<|endoftext|>'
    write_json(folder, 'tokenizer_config.json', settings)
    return speaks.end, speaks.name


def check_vocabulary(folder, meta, data_dir):
    """ValueError where a data set, by its meta.pkl, has other tokens than the tokenizer.json of a folder."""
    path = os.path.join(folder, 'tokenizer.json')
    if not os.path.exists(path):
        if os.environ.get('RANK', '0') == '0':
            print(f'note: {folder} has no tokenizer.json: nothing tells whether the tokens of {data_dir} are its own')
        return
    if 'stoi' in meta:
        same = read_table(path).get('model', {}).get('vocab') == meta['stoi']
    elif 'tokenizer' in meta:
        same = from_folder(folder).sha256 == meta['tokenizer']
    else:
        same = from_folder(folder).encode('<|endoftext|>') == [50256]  # GPT-2's
    if not same:
        raise Mistake(f'{data_dir} has other tokens than {path}: prepare the data with --tokenizer={folder}')


# -----------------------------------------------------------------------------
# export

def write_json(folder, name, settings):
    with open(os.path.join(folder, name), 'w', encoding='utf-8') as f:
        json.dump(settings, f, indent=2)
        f.write('\n')


def mtp_lines(settings):
    """What transformers 5.23 must be told before it loads: its own pattern names V3's layer 61 alone."""
    first = settings['num_hidden_layers']
    layers = range(first, first + settings['num_nextn_predict_layers'])
    patterns = ', '.join(f"r'model\\.layers\\.{layer}\\.'" for layer in layers)
    return f'DeepseekV3ForCausalLM._keys_to_ignore_on_load_unexpected = [{patterns}]'


def model_card(model, checkpoint, settings, tokenizer, left_out, out_dir):
    config, train = model.config, checkpoint.get('config') or {}
    lines = ['# A small DeepSeek model', '', 'Trained with nanoGPT with DeepSeek inside, exported by its convert.py.',
             '', '| | |', '|---|---|',
             f'| architecture | {settings["architectures"][0]} |',
             f'| parameters | {model.get_num_params(non_embedding=False) / 1e6:.2f}M; without embedding and head '
             f'{model.get_num_params() / 1e6:.2f}M, of which a token uses {model.get_num_active_params() / 1e6:.2f}M |',
             f'| blocks, width, heads | {config.n_layer}, {config.n_embd}, {config.n_head} |',
             f'| experts | {config.n_shared_experts} shared + {config.n_routed_experts} routed of width '
             f'{config.moe_intermediate_size}, {config.num_experts_per_tok} per token |',
             f'| MTP modules in this folder | {settings["num_nextn_predict_layers"]} |',
             f'| context | {config.block_size} tokens |',
             f'| tokenizer | {tokenizer} |',
             f'| data | {train.get("dataset", "not known")} |']
    if math.isfinite(checkpoint.get('best_val_loss', math.inf)):
        lines.append(f'| loss | best validation loss {checkpoint["best_val_loss"]:.4f}, '
                     f'after {checkpoint.get("iter_num", 0)} iterations |')
    command = training_command(os.path.join(out_dir, 'log.jsonl'))
    if command:
        lines.append(f'| command | `python {command}` |')
    install = 'transformers accelerate' if 'quantization_config' in settings else 'transformers'
    lines += ['', *left_out, *([''] if left_out else []), f'`pip install {install}`, then', '', '```python',
              f'from transformers import AutoTokenizer, {settings["architectures"][0]}', '']
    if settings['num_nextn_predict_layers']:
        lines += ['# which layers are the MTP modules, for use_mtp=True', mtp_lines(settings)]
    lines += [f"model = {settings['architectures'][0]}.from_pretrained('.')",
              "tokenizer = AutoTokenizer.from_pretrained('.')",
              "ids = tokenizer('The ', return_tensors='pt').input_ids",
              'print(tokenizer.decode(model.generate(ids, max_new_tokens=100'
              + (', use_mtp=True' if settings['num_nextn_predict_layers'] else '') + ')[0]))', '```', '']
    return '\n'.join(lines)


def training_command(log):
    """The command of the last run that a log.jsonl tells of."""
    command = None
    if os.path.exists(log):
        with open(log, encoding='utf-8') as f:
            for line in f:
                if line.startswith('{"command"'):
                    command = json.loads(line)['command']
    return command


def quantise_weights(tensors, n_layer):
    """V3's released form: the weights of the linear layers in E4M3, each with a factor for each block of 128 x 128.

    Embedding, head, norms and routers stay as they are. So do the MTP modules, because transformers reads their weights
    without their factors, and a weight that ends within a block: transformers divides a side by its number of blocks.
    Returns config.json's quantization_config.
    """
    from extras.fp8 import quantise
    left = set()
    for name, tensor in list(tensors.items()):
        module, layer = '.'.join(name.split('.')[:3]), name.split('.')[-2]  # model.layers.4, o_proj
        if tensor.dim() < 2 or tensor.numel() == 0 or layer in ('embed_tokens', 'lm_head', 'head', 'gate'):
            continue
        if module.startswith('model.layers.') and int(module.split('.')[2]) >= n_layer:
            left.add(module)
        elif any(side > 128 and side % 128 for side in tensor.shape):
            left.add(layer)
        else:
            tensors[name], tensors[f'{name}_scale_inv'], _ = quantise(tensor, (128, 128))
    settings = {'activation_scheme': 'dynamic', 'fmt': 'e4m3', 'quant_method': 'fp8', 'weight_block_size': [128, 128]}
    # a list replaces the one that transformers makes itself, of the head alone
    return settings | ({'modules_to_not_convert': ['lm_head', *sorted(left)]} if left else {})


def export_folder(out_dir, hf_dir, fp8=False):
    hf_dir = os.path.normpath(hf_dir)
    if os.path.exists(hf_dir) and (not os.path.isdir(hf_dir) or os.listdir(hf_dir)):
        raise Mistake(f'{hf_dir} exists already: remove it, or name another')
    path = os.path.join(out_dir, 'ckpt.pt')
    if not os.path.exists(path):
        raise Mistake(f'{path} is missing: train a model first, or name the out_dir it is in{elsewhere(path)}')
    with torch.device('meta'):  # its parameters are the checkpoint's tensors
        model, checkpoint = GPT.from_checkpoint(path, assign=True)
    config, state = model.config, model.state_dict()
    if type(checkpoint.get('config') or {}) is not dict or type(checkpoint.get('best_val_loss', 0.0)) is not float:
        raise Mistake(f'{path} is no checkpoint of this model: its config or best_val_loss has a wrong type')
    biases = [state[name] for name in state if name.endswith('e_score_correction_bias')]
    if config.scoring_func == 'softmax' and any(bias.any() for bias in biases):
        raise Mistake('the balance bias of a model with softmax scores is not zero, and V2 has none: '
                      'train it with --bias_update_speed=0')
    dtype = str(state['transformer.wte.weight'].dtype).removeprefix('torch.')
    eos = config.eos_token_id if config.eos_token_id >= 0 else None
    settings, left_out = settings_out(config, dtype, eos)
    with_mtp = settings['num_nextn_predict_layers'] > 0

    temporary = f'{hf_dir}.tmp'
    shutil.rmtree(temporary, ignore_errors=True)
    os.makedirs(temporary)
    try:
        # clones: safetensors takes no two tensors that share memory
        tensors = {part: view.clone(memory_format=torch.contiguous_format) for name, tensor in state.items()
                   if with_mtp or not name.startswith('mtp.') for part, view in parts(config, name, tensor)}
        if config.n_shared_experts == 0:  # transformers looks for them even so
            C = config.n_embd
            sizes = {'gate_proj': (0, C), 'up_proj': (0, C), 'down_proj': (C, 0)}
            for layer in [name.removesuffix('gate.weight') for name in tensors if name.endswith('mlp.gate.weight')]:
                tensors |= {f'{layer}shared_experts.{name}.weight': torch.empty(size) for name, size in sizes.items()}
        if with_mtp:
            tensors |= {copy: tensors[source].clone() for copy, source in shared_copies(config).items()}
        if fp8:
            settings['quantization_config'] = quantise_weights(tensors, config.n_layer)
        save_file(tensors, os.path.join(temporary, 'model.safetensors'), metadata={'format': 'pt'})
        end_of_text, words = write_tokenizer(out_dir, temporary, checkpoint.get('meta') or {}, config.vocab_size)
        if eos is None:
            settings['eos_token_id'] = end_of_text
        write_json(temporary, 'config.json', settings)
        write_json(temporary, 'generation_config.json', {name: settings[name] for name in
                                                         ('bos_token_id', 'eos_token_id', 'pad_token_id')})
        with open(os.path.join(temporary, 'README.md'), 'w', encoding='utf-8') as f:
            f.write(model_card(model, checkpoint, settings, words, left_out, out_dir))
        if os.path.isdir(hf_dir):
            os.rmdir(hf_dir)
        os.rename(temporary, hf_dir)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for line in left_out:
        print(line)
    print(f'wrote {hf_dir}: {len(tensors)} tensors, {sum(t.nbytes for t in tensors.values()) / 1e6:,.1f} MB in '
          f'{"FP8 and " if fp8 else ""}{dtype}')


# -----------------------------------------------------------------------------
# import

def memory_estimate(config, bytes_per_weight):
    with torch.device('meta'):
        n = GPT(config).get_num_params(non_embedding=False)
    here, sample, train = (f'{n * size / 1e9:.3g} GB' for size in (bytes_per_weight, 4 + bytes_per_weight, 16))
    return (f'{n / 1e9:.4g}B parameters. Memory for this import, and disk for its ckpt.pt: {here} each; memory for '
            f'sampling: {sample}, for training with AdamW: {train} and more')


def import_folder(hf_dir, out_dir):
    for name in ('ckpt.pt', *TOKENIZER_FILES):
        if os.path.exists(os.path.join(out_dir, name)):
            raise Mistake(f'{os.path.join(out_dir, name)} exists already: remove it, or name another out_dir')
    args, tensors = open_folder(hf_dir)
    config = GPTConfig(**args)
    try:
        of_checkpoint(hf_dir, vocab_size=config.vocab_size)
    except ValueError as e:
        if os.path.exists(os.path.join(hf_dir, 'tokenizer.json')):
            raise
        print(f'left out: the tokenizer, because {e}')
    dtype = dtype_here(tensors, 'model.embed_tokens.weight')
    print(memory_estimate(config, dtype.itemsize), flush=True)
    state = empty_state(tensors, config)
    read_weights(tensors, config, state)
    checkpoint = {'model': state, 'optimizer': None, 'scaler': {}, 'model_args': dataclasses.asdict(config),
                  'iter_num': 0, 'best_val_loss': math.inf, 'config': {'dtype': str(dtype).removeprefix('torch.')},
                  'meta': {}}
    path = os.path.join(out_dir, 'ckpt.pt')
    os.makedirs(out_dir, exist_ok=True)
    try:
        copy_tokenizer(hf_dir, out_dir)
        save_checkpoint(checkpoint, path)
    except BaseException:  # Ctrl-C too
        for name in ('ckpt.pt.tmp', *TOKENIZER_FILES):
            with contextlib.suppress(FileNotFoundError):
                os.remove(os.path.join(out_dir, name))
        raise
    print(f'wrote {path}')


def main():
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS,  # the docstring has it
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('direction', choices=('export', 'import'))
    parser.add_argument('--out_dir', required=True, help='the folder of ckpt.pt')
    parser.add_argument('--hf_dir', required=True, help='the folder in Hugging Face format')
    parser.add_argument('--fp8', action='store_true', help="export: weights in FP8, as V3's are released")
    args = parser.parse_args()
    for name in ('out_dir', 'hf_dir'):
        if not getattr(args, name):
            parser.error(f'--{name} is empty: name a folder')
    if args.fp8 and args.direction == 'import':
        parser.error('--fp8 belongs to export: import reads FP8 without it')
    signal.signal(signal.SIGINT, signal.default_int_handler)  # from here on, what is half-written is removed
    try:
        if args.direction == 'export':
            export_folder(args.out_dir, args.hf_dir, args.fp8)
        else:
            import_folder(args.hf_dir, args.out_dir)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except (ValueError, OSError, ImportError, RuntimeError) as e:  # RuntimeError: torch found no memory
        print(f'convert.py: {first_line(e)}', file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == '__main__':
    main()
