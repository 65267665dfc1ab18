"""
The countdown game, made by rule, a token a character: from the given numbers, each used once, make the target.

    python data/countdown/prepare.py                                  # 3 numbers up to 12, into data/countdown/three
    python data/countdown/prepare.py --numbers=4 --largest=9 --name=four
    python data/countdown/prepare.py --sums=3000 --name=mixed         # and 3,000 lines of 3-digit addition

A line is a prompt, tries between < and > (R1's <think> and </think>), the answer, and the newline that ends it:

    3,8,2:26=<3+8=11,11*2=22;3*8=24,24+2=26>(3*8)+2

A try joins two numbers at a time until one is left. The tries of the training lines are random: up to --tries - 1
wrong ones, then the right one. So a model of these lines calculates well, and guesses what to calculate. What tries
are worth making, and how many, is left to grpo.py. A prompt has several right answers: reward.py accepts all of them.

Written are train.bin and val.bin with rows of one line each; the masks that say which tokens of them are targets;
meta.pkl; and for grpo.py {train,val,test}_prompts.txt: a prompt, a tab, one solution. No two splits have a game (the
numbers, in whatever order, and the target) in common. The characters are those of data/arithmetic and some more, so
that a model of --sums learns from the prompts of both: grpo.py --dataset=countdown/mixed,arithmetic/add3.
"""

import argparse
import itertools
import os
import random
import re
import runpy
import sys

here = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(here))
import dataset
from dataset import need

arithmetic = runpy.run_path(os.path.join(os.path.dirname(here), 'arithmetic', 'prepare.py'))
CHARS = sorted({*arithmetic['CHARS'], *'*/();'})  # the newline, the stop token, is number 0
PROMPTS = {'train': 12000, 'val': 1000, 'test': 1000}


def play(numbers, rng):
    """Join two random numbers at a time, by a rule with a positive whole result -> steps, result, expression"""
    left, steps = [(n, str(n)) for n in numbers], []
    while len(left) > 1:
        (a, x), (b, y) = (left.pop(rng.randrange(len(left))) for _ in range(2))
        signs = ['+'] + ['*'] * (a * b <= 200) + ['-'] * (a > b) + ['/'] * (b > 1 and a % b == 0)
        sign = rng.choice(signs)
        result = {'+': a + b, '-': a - b, '*': a * b, '/': a // b}[sign]
        steps.append(f'{a}{sign}{b}={result}')
        left.append((result, f'({x}{sign}{y})'))
    return ','.join(steps), left[0][0], left[0][1][1:-1]


def make_games(count, largest):
    """{split: {prompt: (numbers, target, steps, expression)}}, as many as PROMPTS says, or as many draws find."""
    rng = random.Random(f'{count} {largest}')
    games, seen = {split: {} for split in PROMPTS}, set()
    for _ in range(8 * PROMPTS['train']):
        numbers = [rng.randint(1, largest) for _ in range(count)]
        steps, target, expression = play(numbers, rng)
        game = *sorted(numbers), target
        found = games[arithmetic['split_of'](game)]
        if target < 100 and game not in seen and len(found) < PROMPTS[arithmetic['split_of'](game)]:
            seen.add(game)
            found[f'{",".join(map(str, numbers))}:{target}='] = numbers, target, steps, expression
        if all(len(games[split]) == PROMPTS[split] for split in PROMPTS):
            break
    return games


def line_of(prompt, game, tries, rng):
    """A prompt with its tries and its answer."""
    numbers, target, steps, expression = game
    wrong = []
    for _ in range(rng.randrange(tries)):
        attempt, result, _ = play(numbers, rng)
        if result != target:
            wrong.append(attempt)
    return f'{prompt}<{";".join([*wrong, steps])}>{expression}\n'


def sums(n, rng):
    """n lines of data/arithmetic's 3-digit addition, {split: lines}"""
    questions = arithmetic['make_questions']('add', 3)
    return {split: [f'{prompt}<{arithmetic["work"](prompt) if rng.random() < 0.4 else ""}>{answer}\n'
                    for prompt, answer in [*questions[split].items()][:n]] for split in ('train', 'val')}


def main():
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS,  # the docstring has it
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--numbers', type=int, default=3, help='numbers of a game, 2 to 6')
    parser.add_argument('--largest', type=int, default=12, help='the largest number of a game, 5 to 99')
    parser.add_argument('--tries', type=int, default=3, help='tries of a training line at most')
    parser.add_argument('--examples', type=int, default=30000, help='training lines, several of a game')
    parser.add_argument('--sums', type=int, default=0, help='and so many training lines of 3-digit addition')
    parser.add_argument('--length', type=int, help='tokens in a row (default: what the longest line needs)')
    parser.add_argument('--name', default='three', help='the folder in data/countdown')
    args = parser.parse_args()
    for name, least, most in (('numbers', 2, 6), ('largest', 5, 99), ('tries', 1, 20), ('sums', 0, 50000)):
        value = getattr(args, name)
        need(least <= value <= most, f'--{name}={value} must lie in {least}..{most}')
    need(re.fullmatch(r'[\w-]+', args.name), f'--name={args.name}: letters, digits, _ and - alone, and one at least')
    games = make_games(args.numbers, args.largest)
    need(0 < args.examples < 1000000, f'--examples={args.examples} must lie in 1..999999')

    rng = random.Random(0)
    lines = {split: [line_of(prompt, game, args.tries, rng) for prompt, game in
                     itertools.islice(itertools.cycle(games[split].items()), count)]
             for split, count in (('train', args.examples), ('val', len(games['val'])))}
    if args.sums:
        lines = {split: lines[split] + more for split, more in sums(args.sums, rng).items()}
    answers = {split: [(prompt, game[-1]) for prompt, game in found.items()] for split, found in games.items()}
    dataset.write_lines(os.path.join(here, args.name), lines, answers, CHARS, args.length)


if __name__ == '__main__':
    main()
