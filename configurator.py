"""
Overrides of a script's settings, in nanoGPT's syntax:

    python train.py config/train_shakespeare_char.py --batch_size=32 --out_dir=out-x

A script runs this file with exec(), so that it reads and sets the script's own globals. A config file is Python
that assigns to the script's names; --key=value sets one. They apply in the order given, and a later one wins.
A value must have the type of the default it replaces; an int also fits a float, and any text fits a str.
train.py has a dial too: --depth=8 reads config/depth.py last; that file sets what no other flag sets.

It also decides how a script ends: a user's mistake is one line and exit code 2, Ctrl-C is one line and 130, a bug keeps
its traceback. A script with its own arguments writes `import configurator` before its slow imports to get only this.
answer_help() prints a script's settings without running it, so that --help need not wait for these imports.
"""

import ast as _ast
import builtins as _builtins
import dataclasses as _dataclasses
import difflib as _difflib
import errno as _errno
import os as _os
import re as _re
import signal as _signal
import sys as _sys
import textwrap as _textwrap
import time as _time
import traceback as _traceback
import types as _types

_DISK = (_errno.ENOSPC, _errno.EDQUOT, _errno.EFBIG, _errno.EIO, _errno.EROFS)  # full, failing, read-only
_PACKAGES = ('accelerate', 'datasets', 'matplotlib', 'safetensors', 'tiktoken', 'tokenizers', 'tqdm', 'transformers',
             'triton', 'wandb')  # optional ones, which a script imports when it needs them


def shown(text):
    """The text without control characters, which a terminal would obey: their code points, as U+001B"""
    return _re.sub(r'[\x00-\x08\x0b-\x1f\x7f-\x9f]', lambda found: f'U+{ord(found[0]):04X}', text)


def _print(text):
    if _os.environ.get('RANK', '0') == '0':  # only rank 0 prints
        print(shown(text))


def _one_line(error):
    """exception -> one-line message if it is a user's mistake, None if it is a bug"""
    model = _sys.modules.get('model')  # not imported yet: the error is no Mistake
    said = ' '.join(str(error).split())
    if isinstance(error, KeyboardInterrupt):
        return 'interrupted'
    if model and isinstance(error, model.Mistake):
        return said
    if isinstance(error, MemoryError) or model and model.is_out_of_memory(error):
        return f'out of memory: make the batch or the model smaller ({said[:200] or type(error).__name__})'
    if isinstance(error, ModuleNotFoundError) and error.name in _PACKAGES:
        return f'this needs {error.name}: pip install {error.name}'
    lost = isinstance(error, RuntimeError) and _re.search('onnection .* by peer|gloo/transport', said)
    if 'RANK' in _os.environ and (lost or type(error).__name__ in ('DistNetworkError', 'DistStoreError')):
        return f'another rank is gone, or cannot be reached: {said[:200]}'
    if type(error).__module__.startswith('wandb.'):
        return f'wandb cannot start ({said[:200]}): run `wandb login`, or set WANDB_MODE=offline'
    if isinstance(error, OSError):
        path = str(error.filename or '')
        settings = [globals()[key] for key in _keys if type(globals().get(key)) is str]
        named = settings + [arg.partition('=')[2] or arg for arg in _sys.argv[1:]]
        if any(name and path.startswith(name) for name in named) or error.errno in _DISK:
            return f'{path or "a file"} cannot be used: {error.strerror}'
    return None


def _excepthook(kind, error, trace):
    """End a script after an exception that it did not catch."""
    line = _one_line(error)
    code = 130 if kind is KeyboardInterrupt else 1 if line is None else 2
    ranks = 'RANK' in _os.environ
    if ranks:  # torch.distributed's own hook would hold the text back
        _sys.stderr = _sys.__stderr__
    if code == 2 and ranks and _os.environ.get('LOCAL_RANK', '0') != '0':
        # local rank 0 prints a mistake of all ranks, and torchrun then ends this rank; otherwise this rank prints it
        _signal.signal(_signal.SIGTERM, _signal.SIG_DFL)
        _time.sleep(10)
    if line is None:
        _sys.__excepthook__(kind, error, trace)
    else:
        print(shown(line), file=_sys.stderr)
    for stream in (_sys.stdout, _sys.stderr):
        try:
            stream.flush()
        except OSError:  # the reader, such as head, has left
            pass
    if ranks:
        wandb = _sys.modules.get('wandb')
        if wandb and wandb.run:
            wandb.finish(code)  # which Python's end does elsewhere
        _os._exit(code)  # at once: gloo's threads may outlive Python and abort it (pytorch#190489)
    _sys.exit(code)  # by the name that wandb watches


_sys.excepthook = _excepthook
if hasattr(_sys.stdout, 'reconfigure'):
    # into a pipe too: tee and grep see each line at once; a terminal may lack some characters
    _sys.stdout.reconfigure(line_buffering=True, errors='replace')


def mistake(text):
    """A model.Mistake, for scripts that start without model.py, which imports torch."""
    import model
    return model.Mistake(text)


def need(ok, message):
    if not ok:
        raise mistake(message)


def _settings(namespace):
    return {k: v for k, v in namespace.items() if not k.startswith('_') and isinstance(v, (bool, int, float, str))}


def _check_key(key, where):
    known = _settings(globals())
    if key not in known:
        others = _fields_of_others() if 'architecture' in known else {}
        if key in others:
            raise mistake(f'{where}: {key} is a setting of {others[key]}.py: add --architecture={others[key]}')
        near = _difflib.get_close_matches(key, [*known, *others], n=3, cutoff=0.6)
        raise mistake(f'{where}: unknown key {key!r}' + (f'; did you mean {" or ".join(near)}?' if near else ''))
    return type(known[key])


def _fields_of_others():
    """{field of a GPTConfig: the model_*.py beside the script that has it}"""
    folder, found = _os.path.dirname(_os.path.abspath(__file__)), {}
    for name in _os.listdir(folder):
        if _re.fullmatch(r'model_\w+\.py', name):
            fields = _fields(_os.path.join(folder, name))
            found |= dict.fromkeys([field.target.id for field in fields], name.removesuffix('.py'))
    return found


def _fields(path):
    """The file's class GPTConfig -> its fields as syntax trees: importing it takes torch, and so seconds"""
    with open(path, encoding='utf-8') as f:
        classes = [node for node in _ast.parse(f.read()).body if isinstance(node, _ast.ClassDef)]
    return [node for c in classes if c.name == 'GPTConfig' for node in c.body if isinstance(node, _ast.AnnAssign)]


def _fit(key, value, kind, where):
    """value -> the same value as a `kind`; Mistake if it does not fit"""
    if type(value) is int and value.bit_length() > 1000:
        raise mistake(f'{where[:200]}: {key} has too many digits')
    if type(value) is kind:
        return value
    if kind is float and type(value) is int and abs(value) < 1e300:
        return float(value)
    if kind is int and type(value) is float and value.is_integer():  # 1e4
        return int(value)
    raise mistake(f'{where}: {key} must be {kind.__name__}, not {value!r}')


def failed_at(error, path):
    """', line N' of the Python file at path, where the error left it; a SyntaxError says it itself"""
    lines = [frame.lineno for frame in _traceback.extract_tb(error.__traceback__) if frame.filename == path]
    return f', line {lines[-1]}' if lines else ''


def _set_at(key, source):
    """', line N' of a config file's text, where a line begins with the key"""
    found = _re.search(rf'^{_re.escape(key)}\b', source, _re.M)
    return f', line {source.count(chr(10), 0, found.start()) + 1}' if found else ''


def _read_config(path, flagged=()):
    """What a config file sets -> {key: value}, without the keys in `flagged`"""
    try:
        with open(path, encoding='utf-8-sig') as f:
            source = f.read()
    except OSError as e:
        meant = f'--{path}' if '=' in path else f'--out_dir={path}' if isinstance(e, IsADirectoryError) else ''
        hint = f'; did you mean {meant}?' if meant else ''
        raise mistake(f'config file {path}: {e.strerror}{hint}') from None
    except UnicodeDecodeError:
        raise mistake(f'config file {path}: not UTF-8 text') from None
    names = dict(globals())  # a config file may read the defaults
    before = dict(names)
    try:
        exec(_builtins.compile(source, path, 'exec'), names)  # compile is a setting of train.py
    except BaseException as e:  # SystemExit and KeyboardInterrupt too
        raise mistake(f'{path}{failed_at(e, path)}: {type(e).__name__}: {e}') from None
    found = {}
    for key, value in names.items():
        passing = key.startswith('_') or isinstance(value, (_types.ModuleType, _types.FunctionType, type))
        if not passing and key not in flagged and not (key in before and before[key] is value):
            where = path + _set_at(key, source)
            found[key] = _fit(key, value, _check_key(key, where), where)
    _print(_textwrap.fill(f'Overriding config with {path}: ' + ', '.join(f'{k} = {v!r}' for k, v in found.items()),
                          width=120, subsequent_indent='  ', break_long_words=False, break_on_hyphens=False))
    return found


def _add_dial():
    """depth becomes a setting of train.py, which alone has a model's sizes and begins or resumes its run."""
    if 'n_layer' in globals() and 'init_from' in globals():
        globals()['depth'] = 0
        globals().setdefault('config_keys', []).append('depth')


def _add_architecture(args):
    """The further fields of an architecture's GPTConfig become settings, if a flag or a config file names one.
    -> the architecture's name
    """
    name = _architecture_of(args)
    if name != 'model':
        from extras import architecture
        for field in _dataclasses.fields(architecture.named(name)[1]):
            if field.name not in globals():
                globals()[field.name] = field.default
                globals().setdefault('config_keys', []).append(field.name)
    return name


def _architecture_of(args):
    """What the last flag or config file says that names one"""
    names = ['model']
    for arg in args:
        names += _re.findall('^--architecture=(.*)', arg)
        if not arg.startswith('-') and _os.path.isfile(arg):
            with open(arg, encoding='utf-8-sig', errors='replace') as f:
                names += _re.findall(r"""^architecture = ['"](.*)['"]""", f.read(), _re.M)
    return names[-1]


def answer_help(script):
    """Answer --help from the files' text, if the command line has it: call it before the slow imports."""
    architecture, folder = _architecture_of(_sys.argv[1:]), _os.path.dirname(_os.path.abspath(script))
    if not {'--help', '-h'} & set(_sys.argv[1:]) or not _os.path.isfile(_os.path.join(folder, architecture + '.py')):
        return  # the script goes on, and a wrong architecture is a mistake
    found = {}

    def add(nodes):
        """Assignments of plain values; what needs a module is a device, or no setting"""
        for node in nodes:
            target = node.targets[0] if isinstance(node, _ast.Assign) else getattr(node, 'target', None)
            if isinstance(target, _ast.Name) and node.value is not None:
                value = _builtins.compile(_ast.Expression(node.value), script, 'eval')
                try:
                    found[target.id] = eval(value, {'__builtins__': {}}, found)
                except Exception:  # names that are not there
                    if target.id == 'device':
                        found['device'] = 'cuda, mps or cpu'

    with open(script, encoding='utf-8') as f:
        source = f.read()
    if 'dataclasses.fields(GPTConfig)' in source:  # a model's settings too
        for name in dict.fromkeys(('model', architecture)):
            add(_fields(_os.path.join(folder, name + '.py')))
    end = source.partition('exec(open(')[0].count('\n')  # the line that runs this file
    add(node for node in _ast.parse(source).body if node.lineno <= end)
    if 'n_layer' in found and 'init_from' in found:  # as in _add_dial()
        found['depth'] = 0
    _help(script, architecture, _settings(found))


def _help(script, architecture, settings):
    """Print the script's docstring, and each setting with its default and the comment on its line; then exit."""
    comments = {'depth': 'this many blocks, and all that follows from it in config/depth.py; 0: off'}
    folder = _os.path.dirname(_os.path.abspath(script))
    # GPTConfig's fields, and the script's own settings, which stand at the left margin before it runs this file
    for name, line in (('model.py', r' {4}(\w+): \w+'), (architecture + '.py', r' {4}(\w+): \w+'),
                       (_os.path.basename(script), r'(\w+)')):
        path = _os.path.join(folder, name)
        if not _os.path.exists(path):  # the script lies in a folder below
            path = _os.path.join(_os.path.dirname(folder), name)
        with open(path, encoding='utf-8') as f:
            source = f.read()
        comments |= _re.findall(rf'^{line} = [^#\n]+  # (.+)$', source.partition('exec(open(')[0], _re.M)
    lines = [f'  --{key}={value if str(value).isprintable() else repr(value)}'
             + (f'  # {comments[key]}' if key in comments else '') for key, value in settings.items()]
    doc = _ast.get_docstring(_ast.parse(source)) or ''
    try:
        _print('\n'.join([doc, '', 'Settings, each with its default:', *lines]))
        _sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as head, has left
        _os.dup2(_os.open(_os.devnull, _os.O_WRONLY), _sys.stdout.fileno())  # for the flush at Python's end
    raise SystemExit(0)


def _read_flag(arg):
    key, equals, text = arg[2:].partition('=')
    if not arg.startswith('--') or not equals:
        raise mistake(f'{arg}: settings are written --key=value')
    kind = _check_key(key, arg)
    value = text
    if kind is not str:
        try:
            value = _ast.literal_eval(text)
        except Exception:  # literal_eval raises five kinds
            pass
    value = _fit(key, value, kind, arg)
    _print(f'Overriding: {key} = {value}')
    return key, value


for _name in ('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'LOCAL_WORLD_SIZE', 'GROUP_RANK', 'GROUP_WORLD_SIZE', 'MASTER_PORT'):
    if not _re.fullmatch('[0-9]{1,9}', _os.environ.get(_name, '0')):
        raise mistake(f'{_name}={_os.environ[_name]} in the environment must be a number: torchrun sets it')
if int(_os.environ.get('RANK', 0)) >= int(_os.environ.get('WORLD_SIZE', 'RANK' not in _os.environ)):
    raise mistake('RANK in the environment must be below WORLD_SIZE: torchrun sets both; unset RANK to run alone')
_keys = list(_settings(globals()))
if __name__ != 'configurator':
    _architecture = _add_architecture(_sys.argv[1:]) if 'architecture' in globals() else 'model'
    _add_dial()
    if {'--help', '-h'} & set(_sys.argv[1:]):
        _help(__file__, _architecture, _settings(globals()))
    _flagged = set()
    for _arg in _sys.argv[1:]:
        if _arg.startswith('-'):
            _key, _value = _read_flag(_arg)
            globals()[_key] = _value
            _flagged.add(_key)
        else:
            globals().update(_read_config(_arg))
    if globals().get('depth', 0) != 0:
        _path = _os.path.join(_os.path.dirname(_os.path.abspath(__file__)), 'config', 'depth.py')
        globals().update(_read_config(_os.path.relpath(_path), _flagged))
