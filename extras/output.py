"""Pages and figures: each is written whole or not at all, and replaces nothing but an earlier page or figure."""

import contextlib
import os

from configurator import mistake

MARK = 'written by nanoGPT with DeepSeek inside'  # pages and figures carry it; some formats of figures cannot


def check(path, inputs=()):
    """Mistake if the file at path is one of the inputs, or if it does not carry MARK."""
    if not os.path.exists(path):
        return
    if any(os.path.exists(name) and os.path.samefile(path, name) for name in inputs):
        raise mistake(f'{path} is the file to read: write to another one with --out')
    ours = False
    if os.path.isfile(path):
        with open(path, 'rb') as f:
            ours = MARK.encode() in f.read()
    if not ours:
        raise mistake(f'{path} is there, and this program did not write it: remove it, or write to another with --out')


def write(path, content, inputs=()):
    """Write bytes to a temporary name in the same folder, force them to the disk, and rename them to `path`."""
    check(path, inputs)
    target = os.path.realpath(path)  # a link stays one
    unfinished = f'{target}.{os.getpid()}.tmp'
    try:
        with open(unfinished, 'wb') as f:
            f.write(content)
            f.flush()
            os.fsync(f.fileno())
        os.replace(unfinished, target)
    except OSError as e:
        raise mistake(f'{path} cannot be written: {e.strerror}') from None
    finally:
        with contextlib.suppress(OSError):
            os.remove(unfinished)
