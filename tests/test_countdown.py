"""The countdown game: its rules, its data, and a run on it beside sums."""

import random
import re
import runpy
from fractions import Fraction

import pytest
from conftest import ROOT, copy_project, run_inside
from test_grpo import GRPO, SFT, inside, records, training_text

RULES = {}
exec((ROOT / 'data/countdown/reward.py').read_text(), RULES)
PROMPT = '3,8,2:26='


def score(expression, prompt=PROMPT):
    return RULES['reward'](prompt, f'<tries>{expression}\n', '')


@pytest.mark.parametrize('expression', ['3*8+2', '(3*8)+2', '2+3*8', '8*3+2', '((2)+(8*3))'])
def test_several_answers_are_right(expression):
    assert score(expression) == (1.0, 1.0)


@pytest.mark.parametrize('expression, form', [
    ('3*8', 1), ('3*8+2+2-2', 1), ('24+2', 1), ('(3+8)*2', 1), ('2/(3-3)', 1), ('26', 1), ('3*8+02', 0), ('3*8+', 0),
    ('(3*8+2', 0), ('3*8+2)', 0), ('3**8+2', 0), ('-3*8+2', 0), ('3 *8+2', 0), ('', 0), ('()', 0), ('3(8)+2', 0),
    ('__import__("os")', 0), ('3*8+2>3*8+2', 0), ('3*8+２', 0), ('(' * 90 + '3', 0), ('9**9**9**9', 0)])
def test_other_answers_are_not(expression, form):
    assert score(expression) == (0.0, float(form))


def test_the_form_of_a_response():
    for response in ('<>3*8+2', '3*8+2\n', '<<>3*8+2\n', '<\n>3*8+2\n', ''):
        assert RULES['reward'](PROMPT, response, '') == (0.0, 0.0)
    assert score('1/(3-8/3)*8', '1,3,8,3,8:24=') == (1.0, 1.0)                 # exactly: 1 / (1/3) * 8
    assert score('8/3*3', '8,3,3:8=') == (1.0, 1.0)
    assert score('1/3*3', '1,3,3:2=') == (0.0, 1.0)


def test_values_are_pythons():
    """Random expressions, with precedence and from left to right, against Python's own rule on fractions."""
    rng = random.Random(0)

    def expression(depth):
        if depth == 0 or rng.random() < 0.2:
            return str(rng.randint(1, 30))
        inner = rng.choice('+-*/').join(expression(depth - 1) for _ in range(rng.randint(2, 3)))
        return f'({inner})' if rng.random() < 0.5 else inner

    for _ in range(300):
        text = expression(3)
        try:
            want = eval(re.sub(r'(\d+)', r'Fraction(\1)', text), {'Fraction': Fraction})
        except ZeroDivisionError:
            want = None
        assert RULES['evaluate'](text) == (want, [int(n) for n in re.findall(r'\d+', text)])


@pytest.fixture(scope='module')
def games(tmp_path_factory):
    """A clone with 3-number games up to 9, and sums among the lines."""
    folder = copy_project(tmp_path_factory.mktemp('countdown') / 'clone')
    inside('data/countdown/prepare.py', '--largest=9', '--examples=200', '--sums=100', '--tries=4',
           '--name=small', cwd=folder)
    return folder


def test_the_games_can_be_won_and_no_split_knows_anothers(games):
    folder, seen = games / 'data/countdown/small', {}
    for split in ('train', 'val', 'test'):
        pairs = [line.split('\t') for line in (folder / f'{split}_prompts.txt').read_text().splitlines()]
        assert len(pairs) > 100
        assert all(RULES['reward'](prompt, f'<>{answer}\n', '') == (1, 1) for prompt, answer in pairs)
        parts = [prompt[:-1].split(':') for prompt, _ in pairs]
        seen[split] = {(*sorted(map(int, numbers.split(','))), target) for numbers, target in parts}
        assert len(seen[split]) == len(pairs)
    assert not seen['train'] & seen['val'] and not (seen['train'] | seen['val']) & seen['test']


def test_the_tries_calculate_well(games):
    """Each step is right, and joins numbers that are there; the last try makes the target, and no other does."""
    text, length = training_text(games / 'data/countdown/small')
    tries = set()
    for i in range(0, 200 * length, length):
        prompt, work, answer = re.fullmatch(r'(.*=)<(.*)>(.*\n)', text[i:text.index('\n', i) + 1]).groups()
        assert RULES['reward'](prompt, f'<>{answer}', '') == (1.0, 1.0)
        numbers, target = prompt[:-1].split(':')
        results = []
        for attempt in work.split(';'):
            left = sorted(map(int, numbers.split(',')))
            for step in attempt.split(','):
                a, sign, b, result = re.fullmatch(r'(\d+)([-+*/])(\d+)=(\d+)', step).groups()
                left.remove(int(a))
                left.remove(int(b))
                left.append(int(result))
                assert RULES['evaluate'](f'{a}{sign}{b}')[0] == int(result) > 0
            results += left
        tries.add(len(results))
        assert [result == int(target) for result in results] == [False] * (len(results) - 1) + [True]
    assert tries == {1, 2, 3, 4}
    assert re.fullmatch(r'\d+\+\d+=<.*>\d+\n', text[200 * length:text.index('\n', 200 * length) + 1])


def test_a_run_on_two_tasks(games):
    """Games and sums in the same batches, each with its own rule."""
    inside('data/arithmetic/prepare.py', '--examples=50', cwd=games)
    length = training_text(games / 'data/countdown/small')[1]
    inside('train.py', *SFT, '--dataset=countdown/small', f'--block_size={length}', '--out_dir=out-both', cwd=games)
    said = inside('grpo.py', *GRPO, '--dataset=countdown/small,arithmetic/add3', '--max_iters=2', '--out_dir=out-two',
                  '--reward_file=data/countdown/reward.py,data/arithmetic/reward.py', '--init_from=out-both', cwd=games)
    evaluated = [r for r in records(games, 'out-two') if 'val_accuracy' in r]
    assert all({'val_accuracy countdown/small', 'val_accuracy arithmetic/add3'} <= set(r) for r in evaluated)
    assert 'val_accuracy countdown/small 0.0%, val_accuracy arithmetic/add3 0.0%' in said


@pytest.mark.parametrize('flag', ['--numbers=1', '--largest=100', '--tries=0', '--examples=0', '--name=../up',
                                  '--name=', '--length=8', '--sums=-1'])
def test_mistakes_in_making_games(games, flag):
    code, _, said = run_inside('data/countdown/prepare.py', '--largest=5', '--examples=200', flag, cwd=games)
    assert code == 2 and said.startswith(flag.split('=')[0]) and len(said.strip().splitlines()) == 1, said


def test_the_commands_of_the_option_runs_have_settings_that_exist(tmp_path):
    """runs/grpo_options.py takes hours: a flag that its script refuses would be seen late."""
    options = runpy.run_path(str(ROOT / 'runs/grpo_options.py'))
    commands = options['PREPARE'] + [c for start in options['STARTS'].values() for c in start]
    commands += [c for runs in options['QUESTIONS'].values() for start, c in runs.values() if options['STARTS'][start]]
    known = {script: inside(script, '--help', cwd=ROOT) for script in {c.split()[0] for c in commands}}
    for command in commands:
        script, *args = command.split()
        for arg in args:
            flag = re.escape(arg.partition('=')[0])
            assert (ROOT / arg).exists() if arg[0] != '-' else re.search(rf'{flag}[= ]', known[script]), command
