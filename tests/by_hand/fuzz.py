"""
Random damage to every file that a script reads, and random values for its flags. Linux alone.

    python tests/by_hand/fuzz.py [cases] [seed]           # 1000 0: 20 minutes on two idle cores
    python tests/by_hand/fuzz.py --only=CASE [seed]       # one case again: prints what it is, and what the script said

Each case is a script in a copy of a small project. It must end with exit code 0 or 2, without a traceback, within 60
seconds of a core, and take at most 2 GB more memory than torch itself. Prints a table and the command of each failure,
whose damaged folder stays; exit code 1 if one failed.
"""

import ast
import json
import os
import random
import resource
import runpy
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TRAIN = ['train.py', '--dataset=abc', '--device=cpu', '--dtype=float32', '--compile=False', '--n_layer=2', '--n_head=2',
         '--n_embd=32', '--block_size=16', '--batch_size=4', '--gradient_accumulation_steps=2', '--n_routed_experts=4',
         '--num_experts_per_tok=2', '--eval_iters=2', '--mtp_n_layer=1', '--max_iters=2']
SAMPLE = ['sample.py', '--device=cpu', '--start=0', '--num_samples=2', '--max_new_tokens=20']
INSIDE = ['inside.py', '--device=cpu', '--text=prompt.txt', '--count_tokens=100']
GRPO = ['grpo.py', '--device=cpu', '--init_from=out', '--dataset=abc', '--max_iters=1', '--eval_prompts=4',
        '--prompts_per_iter=2', '--group_size=2', '--max_new_tokens=4', '--reward_file=reward.py']
EXPORT = ['convert.py', 'export', '--out_dir=out', '--hf_dir=new']
RESUME, RUN = [*TRAIN, '--init_from=resume', '--out_dir=out'], [*TRAIN, '--out_dir=new']
HF = [['convert.py', 'import', '--hf_dir=hf', '--out_dir=new'], [*SAMPLE, '--init_from=hf'],
      [*RUN, '--init_from=hf', '--dataset=hf']]
READERS = {  # file: the scripts that read it
    'out/ckpt.pt': [RESUME, SAMPLE, EXPORT, [*INSIDE, '--out_dir=out'], [*RUN, '--init_from=out'], GRPO],
    'dcp/ckpt.dcp/rest.pt': [[*TRAIN, '--init_from=resume', '--out_dir=dcp'], [*SAMPLE, '--out_dir=dcp']],
    'dcp/ckpt.dcp/.metadata': [[*TRAIN, '--init_from=resume', '--out_dir=dcp'], [*SAMPLE, '--out_dir=dcp']],
    'dcp/ckpt.dcp/__0_0.distcp': [[*TRAIN, '--init_from=resume', '--out_dir=dcp'], [*SAMPLE, '--out_dir=dcp']],
    'data/abc/meta.pkl': [RUN, RESUME], 'data/abc/train.bin': [RUN], 'data/abc/val.bin': [RUN],
    'data/abc/train_mask.bin': [RUN], 'data/abc/train_prompts.txt': [GRPO], 'data/abc/val_prompts.txt': [GRPO],
    'hf/config.json': HF, 'hf/tokenizer.json': HF, 'hf/tokenizer_config.json': HF, 'hf/special_tokens_map.json': HF,
    'hf/model.safetensors.index.json': HF, 'hf/model-1.safetensors': HF, 'hf/model-2.safetensors': HF,
    'out/log.jsonl': [['plot.py', 'out'], EXPORT, INSIDE], 'given.py': [[*RUN, 'given.py']], 'reward.py': [GRPO],
    'prompt.txt': [[*SAMPLE, '--start=FILE:prompt.txt'], INSIDE,
                   ['data/shakespeare_char/prepare.py', '--input=prompt.txt', '--name=new']],
}
ODD = ['', '0', '-1', '1', '2', '3', '0.5', '-0.0', '1e-320', '1e308', 'nan', 'inf', '1e999', '9' * 13, '1' + '0' * 19,
       '9' * 400, '0x' + 'f' * 5000, 'None', 'True', 'False', '[1]', '()', '"a"', 'a\nb', '\udcff', 'é' * 300, '{x}',
       '%s', '/dev/null', '/proc/self/mem', 'model.py', 'out', 'hf', '-', '--', '*', '~']
LONG = {'max_iters', 'compile', 'wandb_log', 'compile_from', 'backend'}  # as told, they may take long
VALUES = [None, True, False, 0, -1, 1, 2, 10**7, 10**12, 10**19, 10**400, 0.5, 1e-320, 1e308, float('nan'),
          float('inf'), '', 'a', '\ud800', '..', '/dev/zero', [], {}, [[]], {'': None}, ['a', 'a'], [1, 2], {'a': {}}]


# -----------------------------------------------------------------------------
# the small project

def prepare(folder):
    """A project with a data set, checkpoints of both forms, a folder in Hugging Face's format, and other inputs."""
    import numpy as np
    from safetensors.torch import load_file, save_file
    skip = shutil.ignore_patterns('.*', 'out', 'out-*', '__pycache__', '*.bin', '*.pkl', '*_prompts.txt', 'tests',
                                  'wandb', 'assets', 'docs', 'runs', 'scale')
    shutil.copytree(ROOT, folder, ignore=skip)
    text = '0123456789+-*/=\n' * 60
    (folder / 'prompt.txt').write_text(text)
    (folder / 'given.py').write_text('# an example\nlearning_rate = 1e-3\nweight_decay = 2 * 0.05\nbeta2 = 0.99\n')
    (folder / 'reward.py').write_text('def reward(prompt, response, answer):\n'
                                      '    return float(response == answer), len(response) / 10\n')

    def run(*args):
        code, printed = start(args, folder)
        if code:
            raise SystemExit(f'{args}: exit code {code}\n{printed}')

    run('data/shakespeare_char/prepare.py', '--input=prompt.txt', '--name=abc')
    for split in ('train', 'val'):
        n = (folder / f'data/abc/{split}.bin').stat().st_size // 2
        np.ones(n, dtype=np.uint8).tofile(folder / f'data/abc/{split}_mask.bin')
        (folder / f'data/abc/{split}_prompts.txt').write_text(''.join(f'{i}+{i}=\t{2 * i}\n' for i in range(9)))
    run(*TRAIN, '--out_dir=out', '--eos_token_id=0')
    run(*TRAIN, '--out_dir=dcp', '--checkpoint=dcp')
    run('convert.py', 'export', '--out_dir=out', '--hf_dir=hf')
    (folder / 'hf/special_tokens_map.json').write_text('{"eos_token": "="}')
    tensors = load_file(folder / 'hf/model.safetensors')
    names = {name: f'model-{1 + i % 2}.safetensors' for i, name in enumerate(tensors)}
    for file in ('model-1.safetensors', 'model-2.safetensors'):
        save_file({name: x for name, x in tensors.items() if names[name] == file}, folder / 'hf' / file)
    (folder / 'hf/model.safetensors.index.json').write_text(json.dumps({'metadata': {}, 'weight_map': names}))
    (folder / 'hf/model.safetensors').unlink()
    (folder / 'data/hf').mkdir()
    for name in ('train.bin', 'val.bin', 'meta.pkl'):
        shutil.copy(folder / 'data/abc' / name, folder / 'data/hf' / name)


def limited():
    """This process, which has imported torch, becomes a script under limits: fuzz.py --limited SCRIPT FLAGS"""
    size = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + 2**31,) * 2)
    resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.argv = sys.argv[2:]
    sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
    runpy.run_path(sys.argv[0], run_name='__main__')


def start(args, folder):
    """A script in a folder -> its exit code, and what it printed."""
    import forks
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'TIKTOKEN_CACHE_DIR': str(folder / 'none'), 'HF_HUB_OFFLINE': '1',
           'https_proxy': 'http://127.0.0.1:9', 'RUST_BACKTRACE': '0'}
    try:
        code, printed, said = forks.run([__file__, '--limited', *args], folder, env, timeout=240)
    except subprocess.TimeoutExpired:
        return None, 'it waits'
    except UnicodeDecodeError as e:
        return None, f'it prints what is no UTF-8: {e}'
    return code, printed + said


def fault(code, printed):
    """In words, what is wrong with a script's end, or nothing."""
    for words in ('Traceback (most recent', 'panicked at', 'out of memory', 'Segmentation fault'):
        if words in printed:
            return words
    return '' if code in (0, 2) else f'exit code {code}'


# -----------------------------------------------------------------------------
# damage

def change_json(rng, data):
    """One value of a JSON text, or of one of its lines, becomes another one, or goes."""
    lines = data.splitlines() if data.count(b'\n{') else [data]
    i = rng.randrange(len(lines))
    table = json.loads(lines[i])
    at = table
    while True:
        keys = list(at) if isinstance(at, dict) else list(range(len(at)))
        if not keys:
            break
        key = rng.choice(keys)
        if isinstance(at[key], (dict, list)) and at[key] and rng.random() < 0.8:
            at = at[key]
            continue
        if rng.random() < 0.15:
            del at[key]
        else:
            at[key] = rng.choice([*VALUES, table]) if at is not table else rng.choice(VALUES)
        break
    try:
        lines[i] = json.dumps(table).encode()
    except ValueError:  # a table within itself
        lines[i] = b'[' * 100_000
    return b'\n'.join(lines)


def damage(rng, path, folder, others):
    """Damage a file, in words."""
    data = bytearray(path.read_bytes())
    kinds = ['flip', 'cut', 'append', 'swap', 'fill', 'insert', 'link', 'pipe', 'folder', 'gone']
    weights = [6, 3, 2, 2, 2, 2, 0.3, 0.3, 0.3, 0.3]
    if path.suffix in ('.json', '.jsonl'):
        kinds, weights = [*kinds, 'value'], [*weights, 20]
    kind = rng.choices(kinds, weights)[0]
    if kind in ('link', 'pipe') and path.parent == folder:  # what the user names may be a pipe
        kind = 'cut'
    at = rng.randrange(len(data))
    if kind == 'flip':
        for _ in range(rng.choice([1, 1, 2, 8])):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == 'cut':
        del data[rng.choice([0, at, len(data) - 1]):]
    elif kind == 'append':
        data += rng.choice([rng.randbytes(rng.choice([1, 1000])), bytes(data), b'\0' * 10**6, b'\n'])
    elif kind == 'swap':
        data = rng.choice(others).read_bytes()
    elif kind == 'fill':
        data[at:at + 64] = rng.choice([b'\0', b'\xff', b'9', b'[', b'"']) * len(data[at:at + 64])
    elif kind == 'insert':
        data[at:at] = rng.randbytes(rng.choice([1, 8, 64]))
    elif kind == 'value':
        data = change_json(rng, bytes(data))
    path.unlink()
    if kind == 'link':
        path.symlink_to('/dev/zero')
    elif kind == 'pipe':
        os.mkfifo(path)
    elif kind == 'folder':
        path.mkdir()
    elif kind != 'gone':
        path.write_bytes(data)
    return kind


def settings_of(script):
    """The names of a script's settings."""
    body = ast.parse((ROOT / script).read_text()).body
    names = [node.targets[0].id for node in body if isinstance(node, ast.Assign) and node.lineno < 100
             and isinstance(node.targets[0], ast.Name) and isinstance(node.value, (ast.Constant, ast.BinOp))]
    if script == 'train.py':
        body = ast.parse((ROOT / 'model.py').read_text()).body
        config = next(node for node in body if isinstance(node, ast.ClassDef))
        names += [node.target.id for node in config.body if isinstance(node, ast.AnnAssign)]
    return sorted(set(names) - LONG)


def make_case(rng, pristine, folder):
    """Copy the project to the folder, damaged or not -> what the case is, and its command."""
    shutil.copytree(pristine, folder, symlinks=True)
    if rng.random() < 0.25:
        args = rng.choice([RUN, SAMPLE, [*INSIDE, '--out_dir=out'], GRPO])
        flags = [f'--{name}={rng.choice(ODD)}' for name in rng.sample(settings_of(args[0]), rng.choice([1, 1, 2]))]
        return f'flags of {args[0]}', [*args, *flags]
    name = rng.choice(list(READERS))
    others = [folder / other for other in READERS if other != name]
    kind = damage(rng, folder / name, folder, others)
    return f'{name}: {kind}', rng.choice(READERS[name])


def main():
    only = next((int(arg.partition('=')[2]) for arg in sys.argv[1:] if arg.startswith('--only=')), None)
    numbers = [int(arg) for arg in sys.argv[1:] if not arg.startswith('--')]
    if only is not None:
        numbers.insert(0, 1)
    cases, seed = (numbers + [1000, 0][len(numbers):])[:2]
    sys.path[:0] = [str(ROOT / 'tests')]
    work = Path(tempfile.mkdtemp(prefix='fuzz-'))
    prepare(work / 'pristine')

    def run(i):
        folder = work / str(i)
        kind, args = make_case(random.Random(f'{seed} {i}'), work / 'pristine', folder)
        code, printed = start(args, folder)
        shutil.rmtree(folder)
        said = fault(code, printed)
        if said or only is not None:
            make_case(random.Random(f'{seed} {i}'), work / 'pristine', folder)  # as it was
            report = f'case {i}, {kind}: {said or "right"}\n    cd {folder}; {sys.executable} {shlex.join(args)}\n'
            print((report + printed[-2000:]).encode(errors='replace').decode(), flush=True)
        return kind.partition(':')[0], bool(said)

    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(run, range(cases) if only is None else [only]))
    tried, failed = Counter(kind for kind, _ in results), Counter(kind for kind, bad in results if bad)
    print(f'\n{"kind":40} tried failed')
    for kind, n in sorted(tried.items()):
        print(f'{kind:40} {n:5} {failed[kind]:6}')
    print(f'{"all":40} {len(results):5} {failed.total():6}')
    if not failed and only is None:
        shutil.rmtree(work)
    raise SystemExit(1 if failed else 0)


if __name__ == '__main__':
    limited() if sys.argv[1:2] == ['--limited'] else main()
