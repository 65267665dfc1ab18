"""
Overrides of a script's settings, in nanoGPT's syntax:

    python train.py config/train_shakespeare_char.py --batch_size=32 --out_dir=out-x

A script runs this file with exec(), so that it reads and sets the script's own globals. A config file is Python
that assigns to the script's names; --key=value sets one. They are applied in the order given, later ones winning.
A value must fit the type of the default it replaces: an int will do for a float, and anything is a str.
"""

import ast as _ast
import difflib as _difflib
import os as _os
import re as _re
import sys as _sys
import textwrap as _textwrap
import time as _time
import types as _types


def _print(text):
    if _os.environ.get('RANK', '0') == '0':  # one rank speaks for all
        print(text)


def _stop(message):
    """A mistake of the user's: one line, and exit code 2."""
    if _os.environ.get('RANK', '0') == '0':
        print(' '.join(message.split()), file=_sys.stderr, flush=True)  # a config file's errors may have many lines
    else:
        _time.sleep(10)  # torchrun ends all ranks when one has ended: the one that speaks comes first
    raise SystemExit(2)


def _settings(namespace):
    return {k: v for k, v in namespace.items() if not k.startswith('_') and isinstance(v, (bool, int, float, str))}


def _check_key(key, where):
    known = _settings(globals())
    if key not in known:
        near = _difflib.get_close_matches(key, known, n=3, cutoff=0.5)
        _stop(f'{where}: unknown key {key!r}' + (f'; did you mean {" or ".join(near)}?' if near else ''))
    return type(known[key])


def _fit(key, value, kind, where):
    """value as a `kind`, where nothing is lost by it."""
    if type(value) is kind:
        return value
    if kind is float and type(value) is int and abs(value) < 1e300:
        return float(value)
    if kind is int and type(value) is float and value.is_integer():  # 1e4
        return int(value)
    _stop(f'{where}: {key} must be {kind.__name__}, not {value!r}')


def _read_config(path):
    try:
        with open(path, encoding='utf-8') as f:
            source = f.read()
    except OSError as e:
        _stop(f'config file {path}: {e.strerror}')
    except UnicodeDecodeError:
        _stop(f'config file {path}: not UTF-8 text')
    names = dict(globals())  # a config file may read the defaults
    before = dict(names)
    try:
        exec(source, names)
    except (Exception, SystemExit) as e:
        _stop(f'{path}: {type(e).__name__}: {e}')
    found = {}
    for key, value in names.items():
        passing = key.startswith('_') or isinstance(value, (_types.ModuleType, _types.FunctionType, type))
        if not passing and not (key in before and before[key] is value):
            found[key] = _fit(key, value, _check_key(key, path), path)
    _print(_textwrap.fill(f'Overriding config with {path}: ' + ', '.join(f'{k} = {v!r}' for k, v in found.items()),
                          width=120, subsequent_indent='  ', break_long_words=False, break_on_hyphens=False))
    return found


def _help():
    """The script's docstring, and every setting with its default and the comment on the line that defines it."""
    comments, folder = {}, _os.path.dirname(_os.path.abspath(__file__))
    for path in (_os.path.join(folder, 'model.py'), __file__):  # GPTConfig's fields; the script's own settings win
        with open(path, encoding='utf-8') as f:
            source = f.read()
        comments |= _re.findall(r'^ *(\w+)(?:: \w+)? = [^#\n]+  # (.+)$', source, _re.M)
    lines = [f'  --{key}={value}' + (f'  # {comments[key]}' if key in comments else '')
             for key, value in _settings(globals()).items()]
    doc = _ast.get_docstring(_ast.parse(source)) or ''
    try:
        _print('\n'.join([doc, '', 'Settings, each with its default:', *lines]))
        _sys.stdout.flush()
    except BrokenPipeError:  # | head
        _os.dup2(_os.open(_os.devnull, _os.O_WRONLY), _sys.stdout.fileno())  # for the flush at Python's end
    raise SystemExit(0)


def _read_flag(arg):
    key, equals, text = arg[2:].partition('=')
    if not arg.startswith('--') or not equals:
        _stop(f'{arg}: settings are written --key=value')
    kind = _check_key(key, arg)
    value = text
    if kind is not str:
        try:
            value = _ast.literal_eval(text)
        except Exception:  # it has five kinds of them
            pass
    value = _fit(key, value, kind, arg)
    _print(f'Overriding: {key} = {value}')
    return key, value


if {'--help', '-h'} & set(_sys.argv[1:]):
    _help()
for _arg in _sys.argv[1:]:
    if _arg.startswith('-'):
        globals().update([_read_flag(_arg)])
    else:
        globals().update(_read_config(_arg))
