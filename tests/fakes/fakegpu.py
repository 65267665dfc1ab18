"""Runs a script of this project on a GPU that is not there (fakecuda.c), and says what it asked of it. By hand:

    python tests/fakes/fakegpu.py 90 train.py config/train_deepseek.py --max_iters=3 --gradient_accumulation_steps=1
"""

import contextlib
import ctypes
import importlib.util
import io
import json
import linecache
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections import Counter
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))  # for a call by hand
import forks

COUNTERS = ('launches', 'triton', 'gemms', 'recorded', 'recordings', 'replays', 'syncs', 'mallocs')


def what_is_missing():
    """Why there can be no fake GPU here, or ''."""
    import torch
    if torch.version.cuda is None:
        return 'this torch has no CUDA build'
    if sys.platform != 'linux' or importlib.util.find_spec('triton') is None:
        return 'a fake GPU needs Linux and Triton'
    if not shutil.which('gcc') or not shutil.which('nm'):
        return 'a fake GPU needs gcc and nm'
    if not Path(sysconfig.get_path('include'), 'Python.h').exists():
        return "Triton needs Python's headers, such as of python3-dev"
    return ''


def build(folder):
    """libcuda.so.1 in the folder: fakecuda.c, and a function that does nothing for each other one that torch wants."""
    torch, triton = (Path(importlib.util.find_spec(name).origin).parent for name in ('torch', 'triton'))
    symbols = subprocess.check_output(['nm', '-D', '--undefined-only', *torch.glob('lib/*.so')], text=True)
    names = re.findall(r' [Uw] ((?:__cuda|cuda|cublas|cu[A-Z])\w+)', symbols)
    names += re.findall(r'\bcu[A-Z]\w+(?=\()', (triton / 'backends/nvidia/driver.c').read_text())
    with open(folder / 'others.c', 'w') as f:  # weak: those of fakecuda.c win
        print('int fake_gemm(void);', file=f)
        for name in sorted(set(names)):
            answer = 'fake_gemm()' if re.search('[Gg]emm|Matmul$', name) else '0'
            print(f'__attribute__((weak)) int {name}(void) {{ return {answer}; }}', file=f)
    # torch's CUDA headers from the wheels that it depends on; Triton has those that they lack
    headers = [*sorted(torch.parent.glob('nvidia/*/include')), triton / 'backends/nvidia/include']
    command = ['gcc', '-w', '-O1', '-fPIC', '-shared', *(f'-I{path}' for path in headers), HERE / 'fakecuda.c',
               folder / 'others.c', '-Wl,-soname,libcuda.so.1', '-o', folder / 'libcuda.so.1']
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0, done.stderr
    (folder / 'libcuda.so').symlink_to('libcuda.so.1')  # which Triton links to
    return folder


def run(library, sm, script, *args, cwd, timeout=600):
    """A script with its flags, in a process of its own, on a GPU of compute capability sm / 10: report()'s dict.

    library: build()'s folder, which also keeps what the compilers made, for the next run.
    """
    env = {**os.environ, 'LD_PRELOAD': f'{library}/libcuda.so.1', 'TRITON_LIBCUDA_PATH': str(library),
           'LD_LIBRARY_PATH': str(library), 'FAKE_SM': str(sm), 'OMP_NUM_THREADS': '1',
           'TORCHINDUCTOR_COMPILE_THREADS': '1', 'TORCHINDUCTOR_CACHE_DIR': f'{library}/inductor{sm}',
           'TRITON_CACHE_DIR': f'{library}/triton{sm}', 'PYTHONPATH': str(cwd)}
    path = Path(library) / f'report{os.getpid()}.json'
    code, printed, said = forks.run([HERE / 'fakegpu.py', 'inside', path, script, *args], cwd, env, timeout)
    assert code == 0, (printed + said)[-4000:]
    found = json.loads(path.read_text())
    assert found['sm'] == int(sm)
    return found


# ---------------------------------------------------------------------------------------------------------------------
# in that process

def report(script, args):
    """Run the script, and return as a dict: the GPU's `sm`; the exit `code`; what it `printed`; counters in `total`,
    and what each of its `iterations` (from one optimizer step to the next) and decoding `steps` added to them;
    `graph_breaks`; and the allocator's peak in GiB: `allocated` to tensors, and `reserved` for them.

    With the counters, `waits`: the project's lines at which the host waited.
    """
    import torch
    from torch.optim.optimizer import register_optimizer_step_post_hook

    torch.backends.cuda.enable_cudnn_sdp(False)  # there is no fake cuDNN
    fake = ctypes.CDLL(None)
    waits, marks = Counter(), {'iterations': [], 'steps': []}

    def now():
        return {name: ctypes.c_long.in_dll(fake, f'fake_{name}').value for name in COUNTERS}, Counter(waits)

    register_optimizer_step_post_hook(lambda *_: marks['iterations'].append(now()))
    tokens_left = watch_decoding(lambda: marks['steps'].append(now()))

    @ctypes.CFUNCTYPE(None)
    def on_sync():
        line = projects_line()
        waits[line] += 1
        if line.startswith('decode.py: remaining = '):
            left = tokens_left()
            read = ctypes.c_void_p.in_dll(fake, 'fake_read').value
            (ctypes.c_long * len(left)).from_address(read)[:] = left

    ctypes.c_void_p.in_dll(fake, 'fake_on_sync').value = ctypes.cast(on_sync, ctypes.c_void_p).value
    before = now()
    printed, code = io.StringIO(), 0
    sys.argv = [script, *args]
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            try:
                runpy.run_path(os.path.abspath(script), run_name='__main__')
            except Exception as e:  # as Python does with what nobody catches
                code = 1
                sys.excepthook(type(e), e, e.__traceback__)
        except SystemExit as e:
            code = e.code or 0
    after = now()
    ctypes.c_void_p.in_dll(fake, 'fake_on_sync').value = None
    major, minor = torch.cuda.get_device_capability()
    found = {'sm': 10 * major + minor, 'code': code, 'printed': printed.getvalue(), 'total': difference(before, after),
             'graph_breaks': sum(torch._dynamo.utils.counters['graph_break'].values()),
             'allocated': torch.cuda.max_memory_allocated() / 2**30,
             'reserved': torch.cuda.max_memory_reserved() / 2**30}
    return found | {kind: [difference(a, b) for a, b in zip(times, times[1:])] for kind, times in marks.items()}


def difference(before, after):
    return {name: after[0][name] - before[0][name] for name in COUNTERS} | {'waits': after[1] - before[1]}


def projects_line():
    frame = sys._getframe(1)
    while frame and not frame.f_code.co_filename.startswith(os.getcwd()):
        frame = frame.f_back
    if frame is None:  # in a thread of autograd's
        return 'in the backward'
    path = frame.f_code.co_filename
    return f'{os.path.basename(path)}: {linecache.getline(path, frame.f_lineno).strip()}'


def watch_decoding(mark):
    """mark() after each decoding step. And what no kernel does: rows begin with their prompts, and grow with each step,
    by a token and half of their drafts, whose scores are finite. Returns a function: how many tokens each row lacks.
    """
    from extras import decode

    begin, take_step, left = decode.begin, decode.Decoder.take_step, []

    def known_of(s):
        return (ctypes.c_long * len(s.known)).from_address(s.known.data_ptr())

    def grow(s, n):
        left[:] = [tokens - n for tokens in left]
        known = known_of(s)
        known[:] = [length + n for length in known]

    def begin_and_grow(model, s, prompts, max_new_tokens, *args):
        begin(model, s, prompts, max_new_tokens, *args)
        left[:] = [max_new_tokens] * len(prompts)
        known_of(s)[:] = [len(prompt) for prompt in prompts]
        ctypes.memset(s.scores.data_ptr(), 0, s.scores.nbytes)
        grow(s, 1)

    def step_and_grow(self, s, D, *kind):
        take_step(self, s, D, *kind)
        grow(s, 1 + D // 2)
        mark()

    decode.begin, decode.Decoder.take_step = begin_and_grow, step_and_grow
    return lambda: left


if __name__ == '__main__':
    if sys.argv[1] == 'inside':
        sys.path.pop(0)  # this folder
        Path(sys.argv[2]).write_text(json.dumps(report(sys.argv[3], sys.argv[4:])))
    else:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(run(build(Path(folder)), *sys.argv[1:], cwd=os.getcwd()), indent=1))
