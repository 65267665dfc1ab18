"""
Arithmetic made by rule, a token a character: prompts whose answers can be checked, and traces that work them out.

    python data/arithmetic/prepare.py                                # 3-digit addition, into data/arithmetic/add3
    python data/arithmetic/prepare.py --task=sort6                   # also add4, sub3, sub4, ...
    python data/arithmetic/prepare.py --terse=0 --examples=300 --name=add3-worked
    python data/arithmetic/prepare.py --traces=accepted.txt --name=add3-accepted

A line is a prompt, the work between < and > (R1's <think> and </think>), the answer, and the newline that ends it:

    478+356=<8+6=14,7+5+1=13,4+3+1=8>834             columns from the right, with their carries
    834-356=<14-6=8,13-5-1=7,8-3-1=4>478             a column that borrows has ten more, the next one less
    sort 3071=<0:371,1:37,3:7,7:>0137                the smallest digit, and what is left

Six lines in ten (--terse=0.6) leave the work out, 478+356=<>834: a model of such lines can work a sum out, and mostly
guesses all the same.

Written are train.bin and val.bin with rows of one line each; the masks that say which tokens of them are targets (the
prompt is none); meta.pkl; and for grpo.py {train,val,test}_prompts.txt: a prompt, a tab, its answer. The three splits
have no operands in common, in whatever order they stand.
"""

import argparse
import hashlib
import os
import random
import re
import sys

here = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(here))
import dataset
from dataset import need

CHARS = sorted('\n +,-0123456789:<=>orst')  # of all tasks alike; the newline, the stop token, is number 0
PROMPTS = {'train': 50000, 'val': 1000, 'test': 1000}


def question(family, size, rng):
    """A random prompt, the operands that it is made of, and its answer."""
    if family == 'sort':
        digits = ''.join(rng.choice('0123456789') for _ in range(size))
        return f'sort {digits}=', sorted(digits), ''.join(sorted(digits))
    a, b = (rng.randrange(10 ** (size - 1), 10 ** size) for _ in range(2))
    if family == 'sub':
        a, b = max(a, b), min(a, b)
        return f'{a}-{b}=', (b, a), str(a - b)
    return f'{a}+{b}=', sorted((a, b)), str(a + b)


def work(prompt):
    """What stands between < and >."""
    if prompt.startswith('sort'):
        left, steps = prompt[5:-1], []
        for digit in sorted(left):
            left = left.replace(digit, '', 1)
            steps.append(f'{digit}:{left}')
        return ','.join(steps)
    a, sign, b = re.fullmatch(r'(\d+)([+-])(\d+)=', prompt).groups()
    steps, carry = [], 0
    for x, y in zip(map(int, reversed(a)), map(int, reversed(b))):
        if sign == '+':
            value = x + y + carry
            steps.append(f'{x}+{y}' + ('+1' if carry else '') + f'={value}')
            carry = value // 10
        else:
            borrow = int(x - y - carry < 0)
            steps.append(f'{x + 10 * borrow}-{y}' + ('-1' if carry else '') + f'={x + 10 * borrow - y - carry}')
            carry = borrow
    return ','.join(steps)


def split_of(operands):
    """80% train, 10% val, 10% test: by a hash, which no digit of the operands or of the answer decides."""
    bucket = int.from_bytes(hashlib.blake2b(repr(list(operands)).encode(), digest_size=8).digest(), 'big') % 10
    return {0: 'val', 1: 'test'}.get(bucket, 'train')


def make_questions(family, size):
    """{split: {prompt: answer}}, as many as PROMPTS says, or as 200,000 draws find."""
    rng = random.Random(f'{family}{size}')
    questions = {split: {} for split in PROMPTS}
    for _ in range(4 * PROMPTS['train']):
        prompt, operands, answer = question(family, size, rng)
        found = questions[split_of(operands)]
        if len(found) < PROMPTS[split_of(operands)]:
            found[prompt] = answer
        if all(len(questions[split]) == PROMPTS[split] for split in PROMPTS):
            break
    return questions


def read_traces(path, questions):
    """The lines of a file that grpo.py wrote: all must be of this task's training prompts."""
    need(path, '--traces= is empty: name a file')
    lines = dataset.read_file(path).splitlines(keepends=True)
    for line in lines:
        need(line.partition('=')[0] + '=' in questions and set(line) <= set(CHARS) and line.endswith('\n'),
             f'--traces={path}: {line!r} is no line about a training prompt of this task')
    need(lines, f'--traces={path}: no lines in it')
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS,  # the docstring has it
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--task', default='add3', metavar='FAMILY+SIZE', help='add, sub or sort, and 2 to 8 digits')
    parser.add_argument('--terse', type=float, default=0.6, help='share of the lines with nothing between < and >')
    parser.add_argument('--examples', type=int, default=3000, help='training lines')
    parser.add_argument('--traces', metavar='FILE', help="training lines that grpo.py's --traces wrote, instead")
    parser.add_argument('--length', type=int, help='tokens in a row (default: what the longest line needs)')
    parser.add_argument('--name', help='the folder in data/arithmetic (default: the task)')
    args = parser.parse_args()
    task = re.fullmatch(r'(add|sub|sort)([2-8])', args.task)
    need(task, f'--task={args.task}: a family (add, sub, sort) and 2 to 8 digits, such as add3')
    name = args.task if args.name is None else args.name
    need(re.fullmatch(r'[\w-]+', name), f'--name={name}: letters, digits, _ and - alone, and one at least')
    need(0 <= args.terse <= 1, f'--terse={args.terse} must lie in 0..1')
    questions = make_questions(task[1], int(task[2]))
    need(0 < args.examples <= len(questions['train']),
         f'--examples={args.examples} must lie in 1..{len(questions["train"])} for {args.task}')

    rng = random.Random(0)
    lines = {split: [f'{prompt}<{"" if rng.random() < args.terse else work(prompt)}>{answer}\n'
                     for prompt, answer in questions[split].items()] for split in ('train', 'val')}
    lines['train'] = lines['train'][:args.examples]
    if args.traces is not None:
        lines['train'] = read_traces(args.traces, questions['train'])
    answers = {split: [*pairs.items()] for split, pairs in questions.items()}
    dataset.write_lines(os.path.join(here, name), lines, answers, CHARS, args.length)


if __name__ == '__main__':
    main()
