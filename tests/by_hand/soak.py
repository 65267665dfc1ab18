"""
What takes too long for the tests: kills at random instants, a full disk, and ten thousand steps. Linux alone.

    python tests/by_hand/soak.py kill dcp ranks grpo files    # 100 kills, of all that writes
    python tests/by_hand/soak.py [kill] [dcp] [ranks] [grpo] [files] [disk] [memory]
                                 [--kills=100] [--steps=10000] [--seed=0]

The named kinds share the kills. `make soak` runs everything, in a copy of the project, and prints a table of what was
seen; exit code 1 if one failed.
"""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from extras import dcp as shards
from extras.integrity import check_checkpoint
from model import GPT

FLAGS = ['--dataset=soak', '--device=cpu', '--dtype=float32', '--compile=False', '--n_layer=2', '--n_head=2',
         '--n_embd=64', '--vocab_size=304', '--block_size=16', '--batch_size=4', '--gradient_accumulation_steps=2',
         '--n_routed_experts=4', '--num_experts_per_tok=2', '--dropout=0.1', '--warmup_iters=10',
         '--learning_rate=1e-3', '--eval_iters=2', '--bias_update_speed=0.01']
TORCHRUN = ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', '--max-restarts=1000']


def prepare(clone):
    """A small random data set in a copy of the project."""
    folder = clone / 'data/soak'
    folder.mkdir()
    rng = np.random.default_rng(0)
    for split, n in (('train', 20000), ('val', 2000)):
        (rng.integers(300, size=n) // 3 * 3).astype(np.uint16).tofile(folder / f'{split}.bin')
    return clone


def start(clone, *flags, python=(), script='train.py', **kwargs):
    command = [sys.executable, *python, script, *(FLAGS if script == 'train.py' else []), *flags]
    log = open(clone / 'printed', 'ab')
    return subprocess.Popen(command, cwd=clone, env={**os.environ, 'OMP_NUM_THREADS': '1'}, stdout=log,
                            stderr=subprocess.STDOUT, start_new_session=True, **kwargs)


def finish(clone, *flags, **kwargs):
    code = start(clone, *flags, **kwargs).wait()
    if code != 0:
        raise SystemExit(f'a run ended with code {code}:\n' + (clone / 'printed').read_text()[-2000:])


def weights(path):
    """Of a checkpoint, whole or sharded; each byte of it is checked."""
    model, checkpoint = (shards if path.suffix == '.dcp' else GPT).from_checkpoint(str(path))
    check_checkpoint(path, model, checkpoint)
    return model.state_dict()


def same_weights(a, b):
    a, b = weights(a), weights(b)
    return all(torch.equal(a[k], b[k]) for k in b)


def steps_of_this_start(out):
    """The last iteration that log.jsonl tells of since train.py was started last; None before the first."""
    step = None
    path = out / 'log.jsonl'
    for line in path.read_bytes().splitlines() if path.exists() else []:
        if line.startswith(b'{"command"'):
            step = None
        elif line.startswith(b'{"step"') and (b'"loss"' in line or b'"reward"' in line) and line.endswith(b'}'):
            step = json.loads(line)['step']
    return step


def wait_for(what, process, seconds=120):
    """Until what() is true or the process has ended."""
    end = time.time() + seconds
    while process.poll() is None and not what():
        if time.time() > end:
            process.terminate()
            raise SystemExit('nothing happened for too long')
        time.sleep(0.005)


def kill_and_resume(clone, kills, path, *flags, **kwargs):
    """kill -9 at random instants of a run that saves after each iteration, and resuming; run after run. path: of its
    checkpoint. Each one that a kill leaves must be whole.
    """
    out, whole = path.parent, path.parent.with_name('whole')
    finish(clone, *flags, f'--out_dir={whole.name}', **kwargs)
    tmp = out / {'.pt': 'ckpt.pt.tmp', '.dcp': 'ckpt.dcp.new'}[path.suffix]
    made = writing = starting = finished = equal = 0
    tmp_seen = None
    # the last kill may come before a checkpoint: then a new run must still show that it finishes
    while made < kills or not finished or path.exists():
        resume = ['--init_from=resume'] if path.exists() else []
        process = start(clone, *flags, *resume, f'--out_dir={out.name}', **kwargs)
        if made < kills:
            early = random.random() < 0.1  # before it trains, as a rule
            if early:
                time.sleep(random.uniform(0, 3))
            else:
                steps = (out / 'log.jsonl').stat().st_size if (out / 'log.jsonl').exists() and resume else 0
                wait_for(lambda n=steps: (out / 'log.jsonl').exists() and (out / 'log.jsonl').stat().st_size > n + 1000
                         and steps_of_this_start(out) is not None, process)
                time.sleep(random.uniform(0, 0.5))
            process.send_signal(signal.SIGKILL)
        code = process.wait()
        if code == -signal.SIGKILL:
            made += 1
            starting += early
            if tmp.exists() and tmp.stat().st_mtime_ns != tmp_seen:  # left by this kill
                tmp_seen = tmp.stat().st_mtime_ns
                writing += 1
            if path.exists():
                weights(path)
        elif code == 0:
            finished += 1
            equal += same_weights(path, whole / path.name)
            shutil.rmtree(out)
        else:
            raise SystemExit(f'a resumed run ended with code {code}:\n' + (clone / 'printed').read_text()[-2000:])
    return equal == finished > 0, f'{made} kills, {writing} of them while a checkpoint was written, {starting} ' \
        f'in the first 3 seconds; all went on; {equal} of {finished} finished runs equal the whole one bit for bit'


def kill(clone, kills, iterations=300):
    """A run with whole checkpoints."""
    return kill_and_resume(clone, kills, clone / 'out/ckpt.pt', f'--max_iters={iterations}', '--eval_interval=1',
                           '--eval_iters=1')


def dcp(clone, kills, iterations=100):
    """A run with sharded ones, which are written while the training goes on."""
    return kill_and_resume(clone, kills, clone / 'out/ckpt.dcp', f'--max_iters={iterations}', '--eval_interval=1',
                           '--eval_iters=1', '--checkpoint=dcp')


def children(pid):
    """The processes that a process has started."""
    found = []
    for stat in Path('/proc').glob('[0-9]*/stat'):
        try:
            fields = stat.read_text().rpartition(')')[2].split()
        except OSError:  # it has ended meanwhile
            continue
        if int(fields[1]) == pid:
            found.append(int(stat.parent.name))
    return found


def ranks(clone, kills, iterations=300):
    """kill -9 of one of two ranks under torchrun --max-restarts, which starts both again."""
    flags = [f'--max_iters={iterations}', '--eval_interval=2', '--eval_iters=2']
    finish(clone, *flags, '--out_dir=whole2', python=TORCHRUN)
    out = clone / 'out2'
    made = finished = equal = 0
    victims = [0, 0]
    while made < kills:
        shutil.rmtree(out, ignore_errors=True)
        process = start(clone, *flags, '--out_dir=out2', python=TORCHRUN)
        while process.poll() is None:
            before = (out / 'log.jsonl').stat().st_size if (out / 'log.jsonl').exists() else 0
            wait_for(lambda n=before: (out / 'log.jsonl').exists() and (out / 'log.jsonl').stat().st_size > n + 4000
                     and steps_of_this_start(out) is not None, process)
            if made >= kills:
                process.wait()
                break
            time.sleep(random.uniform(0, 1.0))
            workers = sorted(children(process.pid))
            if process.poll() is None and len(workers) == 2:
                victim = random.randrange(2)
                try:
                    os.kill(workers[victim], signal.SIGKILL)
                except ProcessLookupError:
                    continue
                victims[victim] += 1
                made += 1
        if process.returncode != 0:
            raise SystemExit(f'torchrun: code {process.returncode}:\n' + (clone / 'printed').read_text()[-3000:])
        finished += 1
        equal += same_weights(out / 'ckpt.pt', clone / 'whole2/ckpt.pt')
    return equal == finished > 0, f'{made} kills ({victims[0]} of rank 0, {victims[1]} of rank 1), torchrun started ' \
        f'both again each time; {equal} of {finished} finished runs equal the whole one bit for bit'


def grpo(clone, kills, iterations=100):
    """A run of grpo.py, from a cold start of a few iterations."""
    finish(clone, '--task=add2', '--name=add3', '--examples=200', script='data/arithmetic/prepare.py')
    finish(clone, 'config/sft_arithmetic.py', '--n_layer=1', '--n_embd=32', '--n_head=2', '--vocab_size=0',
           '--max_iters=10', '--eval_iters=1', '--out_dir=sft')
    return kill_and_resume(clone, kills, clone / 'out/ckpt.pt', 'config/grpo_arithmetic.py', '--init_from=sft',
                           f'--max_iters={iterations}', '--eval_interval=1', '--eval_prompts=8', '--prompts_per_iter=4',
                           '--group_size=4', script='grpo.py')


def contents(main):
    """{name: bytes} of a folder, or None without the file `main`, without which the others count for nothing."""
    files = {path.name: path.read_bytes() for path in main.parent.glob('*') if path.suffix != '.tmp'}
    return files if main.name in files else None


def files(clone, kills):
    """prepare.py over another data set, convert.py export and import: what they write is whole, or not there."""
    finish(clone, '--max_iters=1', '--eval_interval=1', '--n_embd=256', '--out_dir=run')
    finish(clone, 'export', '--out_dir=run', '--hf_dir=hf-whole', script='convert.py')
    prepare = ['data/arithmetic/prepare.py', '--name=two', '--task=add2']
    jobs = [  # what runs before; what is killed; the last file that it writes; its unfinished ones
        ([*prepare[:2], '--task=sub2'], prepare, 'data/arithmetic/two/train.bin', 'data/arithmetic/two/*.tmp'),
        (None, ['convert.py', 'export', '--out_dir=run', '--hf_dir=hf'], 'hf/config.json', 'hf.*'),
        (None, ['convert.py', 'import', '--hf_dir=hf-whole', '--out_dir=back'], 'back/ckpt.pt', 'back.*')]

    def once(job, process=finish):
        return process(clone, *job[1:], script=job[0])

    made = writing = 0
    wanted, seconds = {}, {}  # of one that is not killed
    while made < kills:
        earlier, job, main, unfinished = jobs[made % len(jobs)]
        main = clone / main
        if main not in wanted:
            t0 = time.time()
            once(job)
            wanted[main], seconds[main] = contents(main), time.time() - t0
            shutil.rmtree(main.parent)
        if earlier:
            once(earlier)
        before = contents(main)
        process = once(job, start)
        if random.random() < 0.3:
            time.sleep(random.uniform(0, seconds[main]))
        else:
            wait_for(lambda names=unfinished: any(clone.glob(names)), process)
            time.sleep(random.uniform(0, 0.02))
        process.send_signal(signal.SIGKILL)
        if process.wait() == -signal.SIGKILL:
            made += 1
            writing += any(clone.glob(unfinished))
            if contents(main) not in (None, before, wanted[main]):
                raise SystemExit(f'{job}: a kill left a mixture: {sorted(main.parent.iterdir())}')
            if earlier or not main.exists():
                once(job)
                if any(clone.glob(unfinished)):
                    raise SystemExit(f'{job} did not remove what the killed one left')
        if contents(main) != wanted[main]:
            raise SystemExit(f'{job} wrote something else after a kill')
        for path in {main.parent, *clone.glob(unfinished)}:
            shutil.rmtree(path, ignore_errors=True)
    return True, f'{made} kills of prepare.py, export and import, {writing} of them while files were written: all or ' \
        'nothing was there, and the next one wrote the same bytes as one that was not killed, and removed the rest'


def disk(clone, _):
    """A checkpoint that does not fit: files may have 60% of its size, then less than the log has."""
    finish(clone, '--max_iters=3', '--eval_interval=3', '--out_dir=full')
    path = clone / 'full/ckpt.pt'
    before = path.read_bytes()
    header = len((clone / 'full/log.jsonl').read_bytes().splitlines()[0])
    for limit, file in ((len(before) * 6 // 10, 'ckpt.pt'), (header + 3000, 'ckpt.pt'), (header + 300, 'log.jsonl')):
        (clone / 'printed').write_bytes(b'')
        (clone / 'full/log.jsonl').write_bytes(b'')
        process = start(clone, '--max_iters=20', '--eval_interval=5', '--init_from=resume', '--out_dir=full',
                        preexec_fn=lambda n=limit: resource.setrlimit(resource.RLIMIT_FSIZE, (n, n)))
        code = process.wait()
        printed = (clone / 'printed').read_text()
        last = printed.strip().splitlines()[-1]
        if code != 2 or 'Traceback' in printed or f'full/{file} could not be written' not in last or \
                path.read_bytes() != before or list((clone / 'full').glob('*.tmp')):
            raise SystemExit(f'a full disk: code {code}\n{printed[-2000:]}')
    finish(clone, '--max_iters=20', '--eval_interval=5', '--init_from=resume', '--out_dir=full')
    finish(clone, '--max_iters=20', '--eval_interval=5', '--out_dir=roomy')
    equal = same_weights(path, clone / 'roomy/ckpt.pt')
    return equal, 'full while ckpt.pt was written, early and late, and while log.jsonl was: one line, exit code 2, ' \
        'the old ckpt.pt untouched; resumed with room, the weights equal those of a whole run'


WATCHED = '''
import ctypes, json, os, runpy, sys
import torch

class Mallinfo(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in ('arena', 'ordblks', 'smblks', 'hblks', 'hblkhd', 'usmblks',
                                                     'fsmblks', 'uordblks', 'fordblks', 'keepcost')]

libc = ctypes.CDLL(None)
libc.mallinfo2.restype = Mallinfo
samples, save = open('samples', 'w'), torch.save

def watched(checkpoint, *args):
    save(checkpoint, *args)
    status = open('/proc/self/status').read()
    malloc = libc.mallinfo2()
    print(json.dumps([checkpoint['iter_num'], (malloc.uordblks + malloc.hblkhd) / 1024, sys.getallocatedblocks(),
                      int(status.split('RssAnon:')[1].split()[0]), len(os.listdir('/proc/self/fd'))]),
          file=samples, flush=True)

torch.save, sys.argv, sys.path[0] = watched, sys.argv[1:], os.getcwd()
runpy.run_path(sys.argv[0], run_name='__main__')
'''


def memory(clone, steps):
    """Memory and open files over many steps, seen from within at a checkpoint every 100.

    What the program holds is what malloc has handed out, and Python's small objects. Resident memory also counts what
    malloc keeps of what was freed: by chance that rises by a few MiB in the first thousands of steps, and then stays.
    """
    (clone / 'watched.py').write_text(WATCHED)
    finish(clone, f'--max_iters={steps}', '--eval_interval=100', '--out_dir=long', python=['watched.py'])
    samples = [json.loads(line) for line in (clone / 'samples').read_text().splitlines()]
    x, held, objects, rss, files = np.array([sample for sample in samples if sample[0] > 1000], dtype=float).T
    held_slope, objects_slope, rss_slope = (np.polyfit(x, y, 1)[0] * 1000 for y in (held, objects, rss))
    half = len(rss) // 2
    # a tensor of three numbers that is kept at each step: 390 KiB and 2,900 objects in 1,000 steps
    return held_slope < 50 and objects_slope < 500 and rss[-1] - rss[0] < 8 * 1024 and max(files) == files[0], \
        f'{steps} steps, after the first 1,000, per 1,000: malloc has {held_slope:+.1f} KiB in use, Python ' \
        f'{objects_slope:+.0f} small objects; resident memory {rss_slope:+.1f} KiB, {(rss[-1] - rss[0]) / 1024:+.2f} ' \
        f'MiB in all, of {rss[-1] / 1024:.0f}, of that {(rss[-1] - rss[half]) / 1024:+.2f} in the second half; open ' \
        f'files {files[0]:.0f}, {files[-1]:.0f}'


def main():
    options = {'kills': 100, 'steps': 10000, 'seed': 0}
    for arg in sys.argv[1:]:
        if arg.startswith('--'):
            key, value = arg[2:].split('=')
            options[key] = int(value)
    named = [arg for arg in sys.argv[1:] if not arg.startswith('--')]
    parts = {part.__name__: part for part in (kill, dcp, ranks, grpo, files, disk, memory)}
    named = named or list(parts)
    killing = [name for name in named if name not in ('disk', 'memory')]
    amounts = {name: len(range(i, options['kills'], len(killing))) for i, name in enumerate(killing)}
    amounts |= {'disk': None, 'memory': options['steps']}
    rows, failed = [], False
    for name in named:
        random.seed(options['seed'])
        clone = Path(tempfile.mkdtemp(prefix='soak-')) / 'clone'
        skip = shutil.ignore_patterns('.*', 'out', 'out-*', '__pycache__', '*.bin', '*.pkl', 'tests')
        prepare(shutil.copytree(ROOT, clone, ignore=skip))
        t0 = time.time()
        good, text = parts[name](clone, amounts[name])
        failed |= not good
        rows.append(f'{name:>7}  {"ok" if good else "FAILED"}  {time.time() - t0:5.0f} s  {text}')
        print(rows[-1], flush=True)
        shutil.rmtree(clone.parent)
    print('\n' + '\n'.join(rows))
    raise SystemExit(int(failed))


if __name__ == '__main__':
    main()
