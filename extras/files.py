"""
Checks of a file that others wrote, before it is opened. A file of a folder may be a link to a private file (a copy
would publish it), a pipe that never answers, or an endless device; a small file may ask for much memory.
"""

import json
import os

MOST = 2**26  # bytes of a tokenizer.json or an index; V3's have 8 million each


def mistake(text, error=''):
    """A model.Mistake. model.py imports torch, which takes seconds: the prepare scripts do without it."""
    from model import Mistake, first_line
    return Mistake(text + (first_line(error) if error else ''))


def checked(folder, name, most=MOST):
    """The path of a folder's file. A Mistake unless it is a regular file in the folder, of at most `most` bytes.

    A link may lead to another file of the folder, or, in the hub's cache, from models--X/snapshots/REVISION to
    models--X/blobs.
    """
    path = os.path.join(folder, name)
    home, target = os.path.realpath(folder), os.path.realpath(path)
    snapshots = os.path.dirname(home)
    homes = [home] + [os.path.join(os.path.dirname(snapshots), 'blobs')] * (os.path.basename(snapshots) == 'snapshots')
    fault = ''
    if not os.path.isfile(target):
        fault = 'it is no regular file' if os.path.exists(target) else 'there is no such file'
    elif not any(target.startswith(os.path.join(home, '')) for home in homes):
        fault = f'it leads out of its folder, to {target}: copy that file there if you trust it'
    elif os.path.getsize(target) > most:
        fault = f'it has {os.path.getsize(target):,} bytes, and may have {most:,}'
    if fault:
        raise mistake(f'{path} cannot be read: {fault}')
    return path


def read_bytes(path, most=MOST):
    """The bytes of a checked() file."""
    checked(*os.path.split(path), most)
    try:
        with open(path, 'rb') as f:
            return f.read()
    except OSError as e:
        raise mistake(f'{path} cannot be read: ', e.strerror) from None


def read_table(path, most=2**23):
    """A checked() JSON file that holds a table."""
    data = read_bytes(path, most)
    try:
        table = json.loads(data)
        if type(table) is not dict:
            raise ValueError('it holds no table')
    except (ValueError, RecursionError) as e:
        raise mistake(f'{path} cannot be read: ', e) from None
    return table
