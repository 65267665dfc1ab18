"""
What V3.2 and V4 add to GRPO, with and without each part: the runs, tables and figure of docs/grpo.md.

    python runs/grpo_options.py run [--only=KL] [--seeds=3]   # what the results lack; two workers of one thread each
    python runs/grpo_options.py report                        # prints the tables, draws assets/grpo_options.png

Each run is one line of runs/grpo_options.jsonl, written when it ends, so that a killed command goes on where it was;
its model and the output of its commands lie in out-options/. A cold start is trained once for all runs that need it,
because it alone makes more difference than an option.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
from configurator import need  # whose import makes a mistake one line and exit code 2

RESULTS = os.path.join(ROOT, 'runs', 'grpo_options.jsonl')
OUT = 'out-options'

# ---------------------------------------------------------------------------------------------------------------------
# the runs

GAMES = 'config/grpo_countdown.py --max_iters=60'
SUMS = 'config/grpo_arithmetic.py --dataset=arithmetic/add3'
STUDENT = 'config/sft_arithmetic.py --n_layer=1 --n_embd=64'
BOTH = ('--dataset=countdown/mixed,arithmetic/add3 '
        '--reward_file=data/countdown/reward.py,data/arithmetic/reward.py')

PREPARE = ['data/countdown/prepare.py', 'data/countdown/prepare.py --sums=3000 --name=mixed',
           'data/arithmetic/prepare.py']
STARTS = {  # the commands that train the cold start out-options/NAME, and what else its runs need
    'games': [f'train.py config/sft_countdown.py --out_dir={OUT}/games'],
    'drafts': [f'train.py config/sft_countdown.py --num_nextn_predict_layers=1 --out_dir={OUT}/drafts'],
    'both': [f'train.py config/sft_countdown.py --dataset=countdown/mixed --out_dir={OUT}/both'],
    'student': [f'train.py {STUDENT} --out_dir={OUT}/student',
                f'train.py config/sft_arithmetic.py --out_dir={OUT}/sums',
                f'grpo.py {SUMS} --init_from={OUT}/sums --out_dir={OUT}/teacher',
                f'grpo.py {SUMS} --init_from={OUT}/teacher --traces={OUT}/accepted.txt',
                f'data/arithmetic/prepare.py --traces={OUT}/accepted.txt --name=add3-accepted'],
}
QUESTIONS = {  # {question: {run: (its start, its command)}}
    'routing': {
        'plain': ('games', f'grpo.py {GAMES}'),
        'bfloat16': ('games', f'grpo.py {GAMES} --dtype=bfloat16'),
        'bfloat16, old_logp=rollout': ('games', f'grpo.py {GAMES} --dtype=bfloat16 --old_logp=rollout'),
        'bfloat16, replay_routing': ('games', f'grpo.py {GAMES} --dtype=bfloat16 --replay_routing=True'),
    },
    'sampling mask': {
        'top_k=3': ('games', f'grpo.py {GAMES} --top_k=3'),
        'top_k=3, keep_sampling_mask': ('games', f'grpo.py {GAMES} --top_k=3 --keep_sampling_mask=True'),
    },
    'off-policy': {
        'mu=4': ('games', f'grpo.py {GAMES} --mu=4'),
        'mu=4, mask_drift=0.02': ('games', f'grpo.py {GAMES} --mu=4 --mask_drift=0.02'),
    },
    'KL': {
        'kl_coef=0.05': ('games', f'grpo.py {GAMES} --kl_coef=0.05'),
        'kl_coef=0.05, unbiased_kl': ('games', f'grpo.py {GAMES} --kl_coef=0.05 --unbiased_kl=True'),
    },
    'truncated': {
        'truncated=mask': ('games', f'grpo.py {GAMES} --truncated=mask'),
    },
    'MTP modules': {
        'fixed': ('drafts', f'grpo.py {GAMES}'),
        'train_mtp': ('drafts', f'grpo.py {GAMES} --train_mtp=True'),
    },
    'two tasks': {
        'games and sums': ('both', f'grpo.py {GAMES} {BOTH}'),
    },
    'student': {
        "teacher's traces": ('student', f'train.py {STUDENT} --dataset=arithmetic/add3-accepted --max_iters=1500 '
                                        '--lr_decay_iters=1500'),
        'teacher': ('student', f'grpo.py {SUMS} --teacher={OUT}/teacher --max_iters=100 --eval_interval=1000'),
    },
    'longer': {
        '300 iterations': ('games', f'grpo.py {GAMES} --max_iters=300'),
    },
}


def call(command, log):
    """A script and its arguments, with one thread; its output is added to the file `log`."""
    parent = multiprocessing.parent_process()
    if parent and not parent.is_alive():  # killed: begin nothing more
        os._exit(1)
    with open(log, 'a') as f:
        code = subprocess.call([sys.executable, *command.split()], cwd=ROOT, stdout=f, stderr=f,
                               env={**os.environ, 'OMP_NUM_THREADS': '1'})
    need(code == 0, f'{command} failed: see {log}')


def begin(start):
    log, traces = (os.path.join(ROOT, OUT, name) for name in (f'{start}.log', 'accepted.txt'))
    if start == 'student' and os.path.exists(traces):  # of a killed start: grpo.py refuses an old file
        os.remove(traces)
    for command in STARTS[start]:
        call(command, log)
    os.rename(log, os.path.join(ROOT, OUT, f'{start}.done'))


def records(path):
    with open(os.path.join(ROOT, path)) as f:
        return [json.loads(line) for line in f]


def measure(out_dir, question):
    """A model's right answers to the test prompts, greedy: {'test_accuracy': of both tasks if there are two}"""
    settings = {'student': SUMS, 'two tasks': f'{GAMES} {BOTH}'}.get(question, GAMES)
    call(f'grpo.py {settings} --init_from={out_dir} --out_dir={out_dir} --eval_only=True --eval_split=test',
         os.path.join(ROOT, out_dir + '.log'))
    return {k: x for k, x in records(f'{out_dir}/eval.jsonl')[-1].items() if k.startswith('test_accuracy')}


def drafts(out_dir):
    """How often a module's draft is accepted, in greedy answers to 200 test prompts; the seconds of 256 rollouts with
    and without drafts, the least of three
    """
    import torch

    from extras import scripts
    from extras.decode import Decoder
    torch.set_num_threads(1)
    model, _, tokenizer = scripts.load_checkpoint(os.path.join(ROOT, out_dir), 'cpu')
    with open(os.path.join(ROOT, 'data', 'countdown', 'three', 'test_prompts.txt')) as f:
        prompts = [tokenizer.encode(line.split('\t')[0]) for line in f][:200]
    decoder, stop = Decoder(model), model.config.eos_token_id
    counts = decoder.generate(prompts, 72, 0.0, stop_token=stop, speculative=True)[1]
    seconds = {}
    for speculative in (False, True) * 3:
        t0 = time.perf_counter()
        decoder.generate([prompt for prompt in prompts[:16] for _ in range(16)], 72, 1.0, stop_token=stop,
                         speculative=speculative)
        seconds[speculative] = min(time.perf_counter() - t0, seconds.get(speculative, 1e9))
    return {'accepted': (counts.accepted.sum() / counts.drafts.sum()).item(),
            'rollout_seconds': seconds[False], 'speculative_seconds': seconds[True]}


def train(question, name, seed):
    """Trains and measures one run -> its record."""
    start, command = QUESTIONS[question][name]
    out_dir = f'{OUT}/{"".join(c if c.isalnum() else "-" for c in name)}-{seed}'
    t0 = time.time()
    call(f'{command} --init_from={OUT}/{start} --seed={seed} --out_dir={out_dir}', os.path.join(ROOT, out_dir + '.log'))
    record = {'question': question, 'run': name, 'seed': seed, 'wall': time.time() - t0, **measure(out_dir, question)}
    header, *log = records(f'{out_dir}/log.jsonl')
    ended = log[-1].get('step') == header['config']['max_iters']  # else by a signal: grpo.py calls that no failure
    need(ended, f'{out_dir} ended before its last iteration')
    record['curve'] = [(r['step'], r['seconds'], r['val_accuracy']) for r in log if 'val_accuracy' in r]
    for key in ('accuracy', 'length', 'cut', 'mismatch', 'routing_mismatch', 'drifted', 'kl', 'clip', 'tokens_per_s'):
        found = [r[key] for r in log if r.get(key) is not None]  # None: an iteration without rows
        if found:
            record[key] = statistics.mean(found)
    record |= drafts(out_dir) if question == 'MTP modules' else {}
    with open(RESULTS, 'a') as f:  # here: a run that fails must not lose the others
        f.write(json.dumps(record) + '\n')
    return record


def read_results():
    return records(RESULTS) if os.path.exists(RESULTS) else []


def run_all(only, seeds, workers):
    names = {*QUESTIONS, *(name for runs in QUESTIONS.values() for name in runs)}
    need(only is None or only in names, f'--only={only} names no question and no run: {", ".join(sorted(names))}')
    os.makedirs(os.path.join(ROOT, OUT), exist_ok=True)
    done = {(r['run'], r['seed']) for r in read_results()}
    jobs = [(question, name, seed) for seed in range(seeds) for question, runs in QUESTIONS.items() for name in runs
            if (name, seed) not in done and only in (None, question, name)]
    starts = dict.fromkeys(QUESTIONS[question][name][0] for question, name, _ in jobs)
    starts = [start for start in starts if not os.path.exists(os.path.join(ROOT, OUT, f'{start}.done'))]
    for command in PREPARE if starts else []:
        call(command, os.path.join(ROOT, OUT, 'prepare.log'))
    with ProcessPoolExecutor(workers, multiprocessing.get_context('spawn')) as pool:
        list(pool.map(begin, starts))
        for future in as_completed([pool.submit(train, *job) for job in jobs]):
            if future.exception():
                pool.shutdown(wait=False, cancel_futures=True)
            print({k: v for k, v in future.result().items() if k != 'curve'}, flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# the report

def cells(runs):
    """The records of one run's seeds -> what the table says of them"""
    right = [100 * r['test_accuracy'] for r in runs]
    known = {key: statistics.mean(r[key] for r in runs) for key in runs[0] if type(runs[0][key]) is float}
    formats = {'accuracy': '{:.1%}', 'length': '{:.1f}', 'cut': '{:.1%}', 'mismatch': '{:.1e}',
               'routing_mismatch': '{:.2%}', 'wall': '{:.0f}'}
    return [', '.join(f'{x:.1f}' for x in right), f'{statistics.mean(right):.1f}%',
            *(form.format(known[key]) if key in known else '' for key, form in formats.items())]


def report():
    found = read_results()
    names = {question: [name for name in runs if any(r['run'] == name for r in found)]
             for question, runs in QUESTIONS.items()}
    head = ['run', 'right, by seed', 'mean', 'of rollouts', 'tokens', 'cut', 'mismatch', 'routing_mismatch', 'seconds']
    for question, runs in names.items():
        print(f'### {question}\n\n| {" | ".join(head)} |\n|{"---|" * len(head)}')
        for name in runs:
            own = [r for r in found if r['run'] == name]
            print(f'| {" | ".join([name, *cells(own)])} |')
            for key in ('drifted', 'kl', 'accepted', 'rollout_seconds', 'speculative_seconds',
                        'test_accuracy countdown/mixed', 'test_accuracy arithmetic/add3'):
                if key in own[0]:
                    print(f'  {key}: {", ".join(f"{r[key]:.3g}" for r in own)}')
        print()
    # each beside the plain run, which the MTP modules' runs do not share their cold start with
    panels = {question: ['plain', *(run for run in runs if run != 'plain')] for question, runs in names.items()
              if question in ('routing', 'sampling mask', 'off-policy', 'KL', 'truncated')}
    if all(any(r['run'] == run for r in found) for runs in panels.values() for run in runs):
        draw(found, panels)


def draw(found, names):
    """assets/grpo_options.png: right answers to the validation prompts, each question beside the plain run"""
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    fig, axes = plt.subplots(2, -(-len(names) // 2), figsize=(12, 6), sharex=True, sharey=True, layout='constrained')
    for ax, (question, runs) in zip(axes.flat, names.items()):
        for k, name in enumerate(runs):
            curves = [r['curve'] for r in found if r['run'] == name]
            for curve in curves:
                ax.plot([p[0] for p in curve], [100 * p[2] for p in curve], f'C{k}', alpha=0.25)
            means = [statistics.mean(100 * p[2] for p in points) for points in zip(*curves)]
            ax.plot([p[0] for p in curves[0]], means, f'C{k}', label=name, marker='.')
        ax.set(title=question)
        ax.legend(fontsize=7)
        ax.grid(alpha=0.3)
    fig.supxlabel('iteration')
    fig.supylabel('right validation games, %')
    fig.savefig(os.path.join(ROOT, 'assets', 'grpo_options.png'), dpi=110)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS,  # the docstring has it
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('what', choices=('run', 'report'))
    parser.add_argument('--only', help='one question or one run')
    parser.add_argument('--workers', type=int, default=2)
    parser.add_argument('--seeds', type=int, default=3)
    args = parser.parse_args()
    if args.what == 'run':
        run_all(args.only, args.seeds, args.workers)
    else:
        report()
