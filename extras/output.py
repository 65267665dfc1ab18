"""Pages, figures and folders that a script writes are whole or absent. A page replaces only an earlier page."""

import contextlib
import glob
import os
import shutil
import tempfile

from configurator import mistake

OURS = '.unfinished'  # a file of this name in a temporary folder says that it may be removed
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


def lock(folder):
    """-> a descriptor that holds the folder's lock until it is closed; None if the system or its disk has no such locks.
    BlockingIOError if another process holds it.
    """
    if os.name == 'nt':
        return None
    import fcntl
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        os.close(descriptor)
        if isinstance(e, BlockingIOError):
            raise
        return None
    return descriptor


@contextlib.contextmanager
def unfinished_folder(target):
    """A temporary folder beside `target`, closed to other users. Those of killed processes are removed first."""
    parent, name = os.path.split(target)
    for left in glob.glob(f'{glob.escape(target)}.????????.unfinished'):
        with contextlib.suppress(OSError):
            descriptor = lock(left) if os.path.exists(os.path.join(left, OURS)) else None
            if descriptor is not None:  # nobody writes to it
                shutil.rmtree(left)
                os.close(descriptor)
    with tempfile.TemporaryDirectory(dir=parent, prefix=f'{name}.', suffix='.unfinished') as folder:
        descriptor = lock(folder)
        open(os.path.join(folder, OURS), 'w').close()
        try:
            yield folder
        finally:
            if descriptor is not None:
                os.close(descriptor)
