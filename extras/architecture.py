"""Which file defines a run's GPT and GPTConfig: model.py, or a model_*.py beside it."""

import importlib
import os
import re

import torch

from model import Mistake


def named(name):
    """The file's name without .py -> its GPT and GPTConfig"""
    here = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    files = sorted(file.removesuffix('.py') for file in os.listdir(here) if re.fullmatch(r'model(_\w+)?\.py', file))
    if name not in files:
        raise Mistake(f'architecture={name!r} must be one of the files {", ".join(files)}')
    module = importlib.import_module(name)
    return module.GPT, module.GPTConfig


def of_args(model_args):
    """A checkpoint's model_args -> GPT and GPTConfig"""
    return named(model_args.get('architecture', 'model') if isinstance(model_args, dict) else 'model')


def of_file(path):
    """A checkpoint -> GPT and GPTConfig; model.py's if it cannot be read, because its reader says what is wrong"""
    path = os.path.join(path, 'rest.pt') if os.path.isdir(path) else path
    try:
        return of_args(torch.load(path, map_location='meta', weights_only=True, mmap=True)['model_args'])
    except Exception:
        return named('model')


def of_config(config):
    """A GPTConfig -> its GPT"""
    return importlib.import_module(type(config).__module__).GPT


SWITCHES = {  # of model_v4.py: without the first, the others have no effect
    'layer_types': 'sliding_window compress_rate_csa compress_rate_hca compress_rope_theta o_groups o_lora_rank',
    'index_topk': 'index_n_heads index_head_dim', 'hc_mult': 'hc_sinkhorn_iters hc_eps', 'num_hash_layers': '',
    'engram_layers': 'engram_ngram engram_heads engram_rows engram_dim engram_conv engram_lr_scale',
}


def check_effect(config, settings):
    """For train.py, with its settings and the model's GPTConfig: says which settings have no effect. Mistake if nothing
    could learn.
    """
    if settings['init_from'] == 'scratch' and settings.get('index_warmup'):
        raise Mistake('index_warmup=True needs trained weights: --init_from=OUT_DIR of a run')
    if os.environ.get('RANK', '0') != '0':
        return
    fields = type(config).__dataclass_fields__
    for switch, names in SWITCHES.items():
        unused = [f'{name}={settings[name]}' for name in names.split()
                  if name in settings and settings[name] != fields[name].default and not getattr(config, switch)]
        if unused:
            print(f'note: {", ".join(unused)} has no effect, because {switch} is off')
    if not getattr(config, 'layer_types', ''):
        return
    if config.index_topk > 0 and 'c' not in config.layer_types:
        print(f'note: index_topk={config.index_topk} has no effect, because no block of layer_types is c')
    if config.sliding_window >= config.block_size:
        print(f'note: sliding_window={config.sliding_window} covers the whole block_size={config.block_size}: every '
              'block attends to all tokens')


def check_ignored(ignored, settings):
    """Say which settings train.py ignores, since the checkpoint decides them. Mistake if a new run asks for a part of
    model_v4.py that the checkpoint lacks.
    """
    said = ', '.join(f'{name}={settings[name]}' for name in ignored)
    if settings['init_from'] != 'resume' and {*ignored} & {*SWITCHES}:
        raise Mistake(f'{said}: {settings["init_from"]} was trained with another architecture; of what model_v4.py '
                      'adds only index_topk can be added to trained weights')
    if ignored and os.environ.get('RANK', '0') == '0':
        print(f"ignored, since the architecture is the checkpoint's: {said}")
