"""
Exports checkpoints to Hugging Face transformers and imports them: DeepSeek V2, V3, V3.2 and V4, logit for logit.

    python convert.py export --out_dir=out-x --hf_dir=DIR    # a run -> weights, tokenizer, model card
                                                             # --fp8: weights as V3's are released
    python convert.py import --hf_dir=DIR --out_dir=out-y    # a local Hugging Face folder -> ckpt.pt

Both write a new folder under another name and rename it at the end: it is whole, or not there.
"""

import argparse
import contextlib
import dataclasses
import json
import math
import os
import re
import shutil

import configurator  # noqa: F401 (a mistake is one line and exit code 2)

# isort: split
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from extras import architecture
from extras.compare import check_export
from extras.hf import dtype_here, empty_state, open_folder, parts, read_weights, settings_out, shared_copies
from extras.integrity import check_finite
from extras.output import unfinished_folder
from extras.scripts import open_checkpoint
from extras.tokenizer import character_tokenizer, copy_tokenizer, gpt2_tokenizer, of_checkpoint, rust, tokenizer_files
from model import Mistake, first_line, save_checkpoint

# -----------------------------------------------------------------------------
# the tokenizer

def write(folder, name, text):
    with open(os.path.join(folder, name), 'w', encoding='utf-8', errors='replace') as f:
        f.write(text)


def write_tokenizer(out_dir, folder, meta, vocab_size):
    """The tokenizer into the folder -> the id of its end-of-text token, or None; and what it is, in words."""
    if not meta and vocab_size < 50257 and not os.path.exists(os.path.join(out_dir, 'tokenizer.json')):
        print('left out: the tokenizer, because the checkpoint has no table of characters and too few tokens for GPT-2')
        return None, 'not known'
    speaks = of_checkpoint(out_dir, meta, vocab_size)
    if speaks.sha256:
        copy_tokenizer(out_dir, folder)
        return speaks.end, f'a tokenizer.json of its own, {speaks.vocab_size:,} tokens'
    with rust('its tokenizer.json cannot be made: '):
        tokenizer = character_tokenizer(meta['stoi']) if meta.get('stoi') else gpt2_tokenizer()
        text = tokenizer.to_str(pretty=True)
    write(folder, 'tokenizer.json', text)
    settings = {'tokenizer_class': 'PreTrainedTokenizerFast', 'clean_up_tokenization_spaces': False}
    if speaks.end is not None:
        settings['eos_token'] = '<|endoftext|>'
    write(folder, 'tokenizer_config.json', json.dumps(settings, indent=2) + '\n')
    return speaks.end, speaks.name


@contextlib.contextmanager
def new_folder(path):
    """A folder to write to, closed to other users. At the end it becomes `path`, whole: a kill leaves no `path`."""
    target = os.path.realpath(path)  # if the path is a link to an empty folder, the link stays
    parent, name = os.path.split(target)
    try:
        os.makedirs(parent, exist_ok=True)
        with unfinished_folder(target) as temporary:
            folder = os.path.join(temporary, name)
            os.mkdir(folder)
            yield folder
            if os.path.isdir(target):
                os.rmdir(target)  # an empty one
            os.rename(folder, target)
    except (OSError, SafetensorError) as e:
        raise Mistake(f'{path} cannot be written: {first_line(e)}') from None


def check_new(path):
    """-> the path, normalised; a Mistake if it is more than an empty folder"""
    if os.path.exists(path) and not (os.path.isdir(path) and os.listdir(path) == []):
        raise Mistake(f'{path} exists already: remove it, or name another')
    if os.path.ismount(path) or os.path.realpath(path) == os.getcwd():
        raise Mistake(f'{path} is a mount or the working directory, which is not replaced: name a folder in it')
    return os.path.normpath(path)


# -----------------------------------------------------------------------------
# export

def mtp_lines(settings):
    """What transformers 5.23 must be told before it loads: its own pattern names layer 61 alone."""
    first = settings['num_hidden_layers']
    layers = range(first, first + settings['num_nextn_predict_layers'])
    patterns = ', '.join(f"r'model\\.layers\\.{layer}\\.'" for layer in layers)
    return f'{settings["architectures"][0]}._keys_to_ignore_on_load_unexpected = [{patterns}]'


def model_card(model, checkpoint, settings, tokenizer, left_out, out_dir):
    config, sizes = model.config, {p.data_ptr(): p.numel() for p in model.parameters()}  # a tied head counts once
    data = re.match(r'[\w./ -]+$', str((checkpoint.get('config') or {}).get('dataset', '')))  # no Markdown
    lines = ['# A small DeepSeek model', '', 'Trained with nanoGPT with DeepSeek inside, exported by its convert.py.',
             '', '| | |', '|---|---|',
             f'| architecture | {settings["architectures"][0]} |',
             f'| parameters | {sum(sizes.values()) / 1e6:.2f}M; without embedding and head '
             f'{model.get_num_params() / 1e6:.2f}M; used per token {model.get_num_active_params() / 1e6:.2f}M |',
             f'| blocks, width, heads | {config.n_layer}, {config.n_embd}, {config.n_head} |',
             f'| experts | {config.n_shared_experts} shared + {config.n_routed_experts} routed of width '
             f'{config.moe_intermediate_size}, {config.num_experts_per_tok} per token |',
             f'| MTP modules in this folder | {settings["num_nextn_predict_layers"]} |',
             f'| context | {config.block_size} tokens |',
             f'| tokenizer | {tokenizer} |',
             f'| data | {data[0] if data else "not known"} |']
    loss, iterations = (checkpoint.get(key) for key in ('val_loss', 'iter_num'))
    if iterations and type(iterations) is int:
        known = f', validation loss {loss:.4f}' if type(loss) is float else ''  # else these weights were not evaluated
        size = (checkpoint.get('meta') or {}).get('bytes_per_token')
        if known and type(size) is float and size > 0:
            known += f', {loss / math.log(2) / size:.4f} bits per byte'
        lines.append(f'| iterations | {iterations}{known} |')
    command = training_command(os.path.join(out_dir, 'log.jsonl'))
    if command:
        lines.append(f'| command | `python {command}` |')
    install = 'transformers accelerate' if 'quantization_config' in settings else 'transformers'
    lines += ['', *left_out, *([''] if left_out else []), f'`pip install {install}`, then', '', '```python',
              f'from transformers import AutoTokenizer, {settings["architectures"][0]}', '']
    use = ', use_mtp=True' if settings['model_type'] == 'deepseek_v3' and settings['num_nextn_predict_layers'] else ''
    if settings['num_nextn_predict_layers']:
        lines += ['# which layers are the MTP modules' + (', for use_mtp=True' if use else ''), mtp_lines(settings)]
    return '\n'.join([*lines, f"model = {settings['architectures'][0]}.from_pretrained('.')",
                      "tokenizer = AutoTokenizer.from_pretrained('.')",
                      "ids = tokenizer('The ', return_tensors='pt').input_ids",
                      f'out = model.generate(ids, max_new_tokens={min(100, config.block_size // 2)}{use})',
                      'print(tokenizer.decode(out[0]))', '```', ''])


def training_command(log):
    """The command of the last run that a log.jsonl tells of and that trained."""
    command = None
    if os.path.isfile(log):
        with open(log, encoding='utf-8', errors='replace') as f:
            for line in f:
                if line.startswith('{"command"'):
                    # a run that was killed may have left half a line
                    with contextlib.suppress(ValueError, AttributeError, KeyError, RecursionError):
                        header = json.loads(line)
                        command = command if header.get('config', {}).get('eval_only') else header['command']
    return command if type(command) is str and command.isprintable() else None


def quantise_weights(tensors, n_layer):
    """V3's released form: the weights of the linear layers in E4M3, each with a factor for each block of 128 x 128.

    Embedding, head, norms, routers and weights_proj stay as they are. So do the MTP modules, because transformers reads
    their weights without the factors, and a weight that ends within a block: transformers divides a side by its number
    of blocks.
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
        elif layer == 'weights_proj' or any(side > 128 and side % 128 for side in tensor.shape):
            left.add(layer)
        else:
            tensors[name], tensors[f'{name}_scale_inv'], _ = quantise(tensor, (128, 128))
    settings = {'activation_scheme': 'dynamic', 'fmt': 'e4m3', 'quant_method': 'fp8', 'weight_block_size': [128, 128]}
    # a list replaces the one that transformers makes itself, of the head alone
    return settings | ({'modules_to_not_convert': ['lm_head', *sorted(left)]} if left else {})


def released_tensors(config, state, with_mtp):
    """A state dict -> {released name: tensor}, each in memory of its own, as safetensors asks."""
    tensors = {part: view.clone(memory_format=torch.contiguous_format) for name, tensor in state.items()
               if with_mtp or not name.startswith('mtp.') for part, view in parts(config, name, tensor)}
    if config.n_shared_experts == 0:  # transformers looks for them even so
        C = config.n_embd
        sizes = {'gate_proj': (0, C), 'up_proj': (0, C), 'down_proj': (C, 0)}
        for layer in [name.removesuffix('gate.weight') for name in tensors if name.endswith('mlp.gate.weight')]:
            tensors |= {f'{layer}shared_experts.{name}.weight': torch.empty(size) for name, size in sizes.items()}
    if with_mtp:
        tensors |= {copy: tensors[source].clone() for copy, source in shared_copies(config).items()}
    return tensors


def export_folder(out_dir, hf_dir, fp8=False):
    hf_dir = check_new(hf_dir)
    path, model, checkpoint = open_checkpoint(out_dir, assign=True)  # its parameters are the checkpoint's tensors
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
    if fp8 and settings['model_type'] == 'deepseek_v4':
        raise Mistake("--fp8 writes V3's format, and V4's FP8 is another: export it without")
    tensors = released_tensors(config, state, settings['num_nextn_predict_layers'] > 0)
    check_export(model, settings, tensors)
    with new_folder(hf_dir) as folder:
        end_of_text, words = write_tokenizer(out_dir, folder, checkpoint.get('meta') or {}, config.vocab_size)
        if eos is None:
            settings['eos_token_id'] = end_of_text
        if fp8:
            settings['quantization_config'] = quantise_weights(tensors, config.n_layer)
        save_file(tensors, os.path.join(folder, 'model.safetensors'), metadata={'format': 'pt'})
        ids = {name: settings[name] for name in ('bos_token_id', 'eos_token_id', 'pad_token_id')}
        write(folder, 'config.json', json.dumps(settings, indent=2) + '\n')
        write(folder, 'generation_config.json', json.dumps(ids, indent=2) + '\n')
        write(folder, 'README.md', model_card(model, checkpoint, settings, words, left_out, out_dir))
        # safetensors closes its file to other users
        shutil.copymode(os.path.join(folder, 'config.json'), os.path.join(folder, 'model.safetensors'))
    for line in left_out:
        print(line)
    print(f'wrote {hf_dir}: {len(tensors)} tensors, {sum(t.nbytes for t in tensors.values()) / 1e6:,.1f} MB in '
          f'{"FP8 and " if fp8 else ""}{dtype}')


# -----------------------------------------------------------------------------
# import

def memory_estimate(config, bytes_per_weight):
    with torch.device('meta'):
        n = architecture.of_config(config)(config).get_num_params(non_embedding=False)
    scale, letter, unit = (1e9, 'B', 'GB') if n >= 1e8 else (1e6, 'M', 'MB')
    here, sample, train = (f'{n * size / scale:.3g} {unit}' for size in (bytes_per_weight, 4 + bytes_per_weight, 16))
    return (f'{n / scale:.4g}{letter} parameters. Memory for this import, and disk for its ckpt.pt: {here} each; '
            f'memory for sampling: {sample}, for training with AdamW: {train} and more')


def import_folder(hf_dir, out_dir):
    out_dir = check_new(out_dir)
    config, tensors = open_folder(hf_dir)
    tokenizer_files(hf_dir)  # what is wrong with them is said before the weights are read
    try:
        of_checkpoint(hf_dir, vocab_size=config.vocab_size)
    except Mistake as e:
        if os.path.exists(os.path.join(hf_dir, 'tokenizer.json')):
            raise
        print(f'left out: the tokenizer, because {e}')
    dtype = dtype_here(tensors, parts(config, 'transformer.wte.weight', None)[0][0])
    print(memory_estimate(config, dtype.itemsize), flush=True)
    state = empty_state(tensors, config)
    read_weights(tensors, config, state)
    check_finite(hf_dir, state)
    checkpoint = {'model': state, 'optimizer': None, 'scaler': {}, 'model_args': dataclasses.asdict(config), 'meta': {},
                  'iter_num': 0, 'best_val_loss': math.inf, 'config': {'dtype': str(dtype).removeprefix('torch.')}}
    with new_folder(out_dir) as folder:
        copy_tokenizer(hf_dir, folder)
        save_checkpoint(checkpoint, os.path.join(folder, 'ckpt.pt'))
    print(f'wrote {out_dir}/ckpt.pt')


def main():
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS,  # the docstring has it
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('direction', choices=('export', 'import'))
    parser.add_argument('--out_dir', required=True, help='the folder of the checkpoint')
    parser.add_argument('--hf_dir', required=True, help='the folder in Hugging Face format')
    parser.add_argument('--fp8', action='store_true', help="export: weights in FP8, as V3's are released")
    args = parser.parse_args()
    if not (args.out_dir and args.hf_dir):
        parser.error(f'--{"hf_dir" if args.out_dir else "out_dir"} is empty: name a folder')
    if args.fp8 and args.direction == 'import':
        parser.error('--fp8 belongs to export: import reads FP8 without it')
    if args.direction == 'export':
        export_folder(args.out_dir, args.hf_dir, args.fp8)
    else:
        import_folder(args.hf_dir, args.out_dir)


if __name__ == '__main__':
    main()
