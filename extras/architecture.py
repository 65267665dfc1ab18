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
