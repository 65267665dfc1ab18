import os
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, SMALL, run_inside, run_outside

from extras import sizes
from model import Mistake

SOURCE = (ROOT / 'configurator.py').read_text()


def configure(monkeypatch, *argv, **settings):
    monkeypatch.setattr('sys.argv', ['script.py', *map(str, argv)])
    monkeypatch.setattr('sys.excepthook', sys.excepthook)  # which the source replaces
    names = dict(settings)
    try:
        exec(SOURCE, names)
    except Exception as e:  # as Python does with what nobody catches
        sys.excepthook(type(e), e, e.__traceback__)
        raise
    return {k: names[k] for k in settings}


DEFAULTS = dict(rate=0.1, steps=10, name='x', flag=True)


@pytest.mark.parametrize('flag, key, value', [
    ('--rate=1', 'rate', 1.0), ('--rate=3e-4', 'rate', 3e-4), ('--steps=20', 'steps', 20),
    ('--steps=1e4', 'steps', 10000), ('--name=a=b', 'name', 'a=b'), ('--name=123', 'name', '123'),
    ('--name=', 'name', ''), ('--flag=False', 'flag', False), ('--name=--x', 'name', '--x'),
])
def test_values_take_the_defaults_type(monkeypatch, flag, key, value):
    got = configure(monkeypatch, flag, **DEFAULTS)[key]
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize('flag, message', [
    ('--rte=1', 'did you mean rate'), ('--steps=1.5', 'steps must be int'), ('--flag=1', 'flag must be bool'),
    ('--flag=yes', 'flag must be bool'), ('--rate=fast', 'rate must be float'), ('--rate', '--key=value'),
    ('-rate=1', '--key=value'), ('--steps=True', 'steps must be int'), ('nowhere.py', 'No such file'),
])
def test_mistakes_name_the_key(monkeypatch, capsys, flag, message):
    with pytest.raises(SystemExit) as error:
        configure(monkeypatch, flag, **DEFAULTS)
    said = capsys.readouterr().err
    assert error.value.code == 2 and message in said and said.count('\n') == 1


def test_files_and_flags_in_order(monkeypatch, tmp_path, capsys):
    file = tmp_path / 'a.py'
    file.write_text('import time\nrate = 1\nsteps = steps * 2\n_half = 3\nname = f"run-{_half}"\ndef f(): pass\n')
    got = configure(monkeypatch, '--steps=7', file, '--rate=2', **DEFAULTS)
    assert got == dict(rate=2.0, steps=14, name='run-3', flag=True) and type(got['rate']) is float
    assert configure(monkeypatch, '--rate=2', file, **DEFAULTS)['rate'] == 1.0
    assert 'rate = 2' in capsys.readouterr().out


@pytest.mark.parametrize('text, message', [
    ('\nrtae = 1', "a.py, line 2: unknown key 'rtae'; did you mean rate"),
    ('steps = 1\nrate = "fast"', 'a.py, line 2: rate must be float'), ('\nrate = = 1', '(a.py, line 2)'),
    ('def f():\n    return 1 / 0\n\nrate = f()', 'a.py, line 2: ZeroDivisionError'),
])
def test_mistakes_in_a_file(monkeypatch, tmp_path, capsys, text, message):
    file = tmp_path / 'a.py'
    file.write_text(text)
    with pytest.raises(SystemExit) as error:
        configure(monkeypatch, file, **DEFAULTS)
    said = capsys.readouterr().err
    assert error.value.code == 2 and message in said and said.count('\n') == 1


def settings_of_train(monkeypatch, *flags):
    monkeypatch.setattr('sys.argv', ['train.py', *map(str, flags)])
    monkeypatch.setattr('sys.excepthook', sys.excepthook)
    return sizes.read_settings(ROOT)


def test_the_dial_is_turned_last_and_leaves_other_flags_alone(monkeypatch):
    file = ROOT / 'config/train_deepseek.py'
    s = settings_of_train(monkeypatch, '--depth=4', file, '--learning_rate=1', '--n_head=2')
    assert [s[key] for key in ('n_layer', 'n_embd', 'n_head', 'learning_rate', 'n_routed_experts', 'q_lora_rank')] == \
        [4, 256, 2, 1.0, 8, -1]
    assert (s['eos_token_id'], s['out_dir'], s['depth'], s['config_keys']) == (50256, 'out-depth4', 4, ['depth'])
    assert settings_of_train(monkeypatch, ROOT / 'config/depth.py')['n_embd'] == 256
    assert settings_of_train(monkeypatch, ROOT / 'config/depth.py', '--depth=3')['n_embd'] == 192
    off = settings_of_train(monkeypatch)
    assert (off['depth'], off['n_layer'], off['learning_rate']) == (0, 12, 6e-4)


def test_what_the_dial_derives_follows_the_flags(monkeypatch):
    s = settings_of_train(monkeypatch, '--depth=4', '--max_iters=100', '--learning_rate=1e-3')
    assert [s[key] for key in ('max_iters', 'lr_decay_iters', 'warmup_iters', 'eval_interval')] == [100, 100, 2, 10]
    assert (s['learning_rate'], s['min_lr']) == (1e-3, 1e-4)
    plain, wide, dense = (settings_of_train(monkeypatch, '--depth=4', *flags)
                          for flags in ([], ['--n_embd=512', '--n_head=8'], ['--n_routed_experts=0']))
    assert wide['max_iters'] > plain['max_iters'] != dense['max_iters']
    assert wide['learning_rate'] < plain['learning_rate']
    # the rows that fit stay the bound
    assert settings_of_train(monkeypatch, '--depth=4', '--gradient_accumulation_steps=1')['batch_size'] == 12


def test_help_of_scripts_without_the_dial():
    for script in ('train.py', 'scale/pipeline.py'):  # the pipeline has sizes of its own
        code, printed, _ = run_inside(script, '--help', cwd=ROOT)
        assert code == 0 and ('--depth=' in printed) == (script == 'train.py')
    code, printed, _ = run_inside('extras/dcp.py', '--help', cwd=ROOT)
    assert code == 0 and 'python -m extras.dcp OUT_DIR' in printed


def test_the_dials_batch_follows_the_context_and_the_ranks(monkeypatch):
    """Wherever the flags stand: an iteration has about as many tokens, and as many micro-batches on each rank."""
    def batch(*flags):
        s = settings_of_train(monkeypatch, *flags)
        tokens = s['gradient_accumulation_steps'] * s['batch_size'] * s['block_size'] * s['max_iters']
        assert 'depth=20' in flags[0] or tokens == pytest.approx(4.78e7, rel=0.01)
        return s['gradient_accumulation_steps'], s['batch_size'], s['block_size']

    steps, rows, context = batch('--depth=4', '--block_size=64')
    assert (rows, context) == (12, 64) and steps * rows * context == pytest.approx(20800, rel=0.05)
    assert batch('--block_size=64', '--depth=4') == (steps, rows, context)
    assert batch('--depth=4', '--block_size=64', '--batch_size=100') == (4, 100, 64)
    assert batch('--depth=4', '--gradient_accumulation_steps=5') == (5, 4, 1024)
    fewer = settings_of_train(monkeypatch, '--depth=4', '--gradient_accumulation_steps=1', '--batch_size=5')
    assert fewer['learning_rate'] == pytest.approx(0.0043 / 2, rel=0.03)          # 5 of 20 rows: the root of a quarter
    monkeypatch.setenv('RANK', '0')
    monkeypatch.setenv('WORLD_SIZE', '8')
    assert batch('--depth=4') == (8, 2, 1024) and batch('--depth=20') == (40, 12, 1024)


@pytest.mark.parametrize('script, flag, message', [
    ('train.py', '--depth=deep', "depth must be int, not 'deep'"), ('train.py', '--depth=-1', 'n_layer=-1'),
    ('sample.py', '--depth=8', "unknown key 'depth'"), ('train.py', '--dept=8', 'did you mean depth')])
def test_a_dial_that_turns_nothing_is_one_line(script, flag, message):
    code, _, said = run_inside(script, flag, cwd=ROOT)
    assert code == 2 and message in said and said.count('\n') == 1, said


def test_help_lists_every_setting_with_its_default_and_comment(small):
    code, printed, said = run_inside('train.py', '--help', cwd=small)
    assert code == 0 and said == '' and not (small / 'out').exists()
    assert '--eval_only=False  # evaluate once and stop' in printed and '--beta1=0.9\n' in printed
    assert '--kv_lora_rank=-1  # width of the latent that is cached' in printed  # of GPTConfig
    assert printed.startswith("Trains a model; nanoGPT's loop and flags")


@pytest.mark.parametrize('script', ['train.py', 'sample.py', 'grpo.py', 'inside.py', 'bench.py'])
def test_help_comes_before_the_slow_imports(script, tmp_path, monkeypatch):
    (tmp_path / 'torch.py').write_text('raise SystemExit("torch is imported")')
    for arg in ('--help', '-h'):
        done = subprocess.run([sys.executable, ROOT / script, arg], capture_output=True, text=True, cwd=tmp_path,
                              env=os.environ | {'PYTHONPATH': str(tmp_path)})
        assert (done.returncode, done.stderr) == (0, '') and done.stdout.count('\n') > 5, done.stderr
    if script == 'train.py':  # the text's values are those of the run
        said = dict(line.split('  # ')[0].strip().removeprefix('--').split('=', 1)
                    for line in done.stdout.splitlines() if line.startswith('  --'))
        run = {k: str(v) for k, v in settings_of_train(monkeypatch).items()
               if not k.startswith('_') and isinstance(v, (bool, int, float, str))}
        assert said.pop('device') == 'cuda, mps or cpu' and run.pop('device') and said == run


def test_help_shows_a_line_break_as_two_characters_and_no_comment_of_a_later_line(tmp_path):
    lines = ['rate = 1.0', r"start = '\n'  # the prompt", f"exec(open({str(ROOT / 'configurator.py')!r}).read())",
             'rate = 2.0  # of the loop', "start = 'x'  # of the loop"]
    (tmp_path / 'script.py').write_text('\n'.join(lines))
    (tmp_path / 'model.py').write_text('')  # its comments are read
    code, printed, said = run_inside('script.py', '--help', cwd=tmp_path)
    assert (code, said) == (0, '')
    assert printed.splitlines()[-2:] == ['  --rate=1.0', r"  --start='\n'  # the prompt"]


def test_help_into_a_pipe_that_is_closed(tmp_path):
    script = tmp_path / 'script.py'
    script.write_text(f"rate = 1.0\nexec(open({str(ROOT / 'configurator.py')!r}).read())\n")
    (tmp_path / 'model.py').write_text('')  # its comments are read
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, script, '--help'], stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, '')


def test_a_config_file_is_echoed_as_what_it_sets(monkeypatch, tmp_path, capsys):
    file = tmp_path / 'a.py'
    file.write_text('# a long comment\n' * 30 + 'rate = 1\nname = "y"\n')
    configure(monkeypatch, file, **DEFAULTS)
    assert ' '.join(capsys.readouterr().out.split()) == f"Overriding config with {file}: rate = 1.0, name = 'y'"


def test_a_config_file_that_leaves(monkeypatch, tmp_path, capsys):
    file = tmp_path / 'a.py'
    file.write_text('import sys; sys.exit("bye")')
    with pytest.raises(SystemExit) as error:
        configure(monkeypatch, file, **DEFAULTS)
    assert error.value.code == 2 and capsys.readouterr().err == f'{file}, line 1: SystemExit: bye\n'


# how a script ends

def ended(monkeypatch, capsys, error, *argv, **settings):
    """The exit code of a script that ends with this error, and what it says."""
    monkeypatch.setattr('sys.argv', ['script.py', *argv])
    monkeypatch.setattr('sys.excepthook', sys.excepthook)
    exec(SOURCE, {'out_dir': 'out-x', 'rate': 1.0, **settings})
    capsys.readouterr()
    code = 1  # Python's, after the hook
    try:
        sys.excepthook(type(error), error, error.__traceback__)
    except SystemExit as e:
        code = e.code
    return code, capsys.readouterr().err


@pytest.mark.parametrize('error, code, line', [
    (Mistake('what is wrong; what to do'), 2, 'what is wrong; what to do'), (Mistake('two\n lines'), 2, 'two lines'),
    (KeyboardInterrupt(), 130, 'interrupted'),
    (MemoryError(), 2, 'out of memory: make the batch or the model smaller (MemoryError)'),
    (torch.OutOfMemoryError('CUDA out of memory.'), 2,
     'out of memory: make the batch or the model smaller (CUDA out of memory.)'),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), 2,
     "out of memory: make the batch or the model smaller ([enforce fail] DefaultCPUAllocator: can't allocate memory: "
     'you tried)'),
    (ModuleNotFoundError("No module named 'tiktoken'", name='tiktoken'), 2,
     'this needs tiktoken: pip install tiktoken'),
    # a path of a setting or an argument, or a disk that is full
    (FileNotFoundError(2, 'No such file or directory', 'out-x/ckpt.pt'), 2,
     'out-x/ckpt.pt cannot be used: No such file or directory'),
    (PermissionError(13, 'Permission denied', '/data/words'), 2, '/data/words cannot be used: Permission denied'),
    (OSError(28, 'No space left on device'), 2, 'a file cannot be used: No space left on device'),
])
def test_what_the_user_can_mend_is_one_line(monkeypatch, capsys, error, code, line):
    assert ended(monkeypatch, capsys, error, '--out_dir=out-x', **{'input': '/data'}) == (code, line + '\n')


@pytest.mark.parametrize('error', [
    ValueError('Expected input batch_size (3) to match target batch_size (2).'), KeyError('n_embd'),
    RuntimeError('Connection closed by peer'),  # without ranks
    ModuleNotFoundError("No module named 'nowhere'", name='nowhere'),
    FileNotFoundError(2, 'No such file or directory', '/nobody/named/it'), OSError('no name and no number'),
])
def test_a_bug_keeps_its_traceback(monkeypatch, capsys, error):
    try:
        raise error
    except Exception as e:
        code, said = ended(monkeypatch, capsys, e)
    assert code == 1 and said.startswith('Traceback') and "raise error" in said and type(error).__name__ in said


@pytest.mark.parametrize('said', ['[/x/gloo/transport/tcp/pair.cc:1] writev [127.0.0.1]:1: Broken pipe',
                                  'Connection closed by peer [127.0.0.1]:1'])
def test_a_rank_that_lost_another_says_so_in_one_line(monkeypatch, said):
    names = {'out_dir': 'out'}
    for where in ('sys.argv', 'sys.excepthook'):
        monkeypatch.setattr(where, ['script.py'] if where == 'sys.argv' else sys.excepthook)
    exec(SOURCE, names)
    monkeypatch.setenv('RANK', '0')
    assert names['_one_line'](RuntimeError(said)) == f'another rank is gone, or cannot be reached: {said}'


def test_an_interrupt_before_the_loop_is_one_line(small):
    (small / 'stuck.py').write_text('''
import runpy, sys, time
import model
def stuck(*_):
    print('stuck', flush=True)
    while True:
        time.sleep(0.1)
model.GPT.configure_optimizers = stuck
runpy.run_path('train.py', run_name='__main__')
''')
    process = subprocess.Popen([sys.executable, 'stuck.py', *SMALL], cwd=small, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)
    while process.stdout.readline() != 'stuck\n':
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60)[1] == 'interrupted\n' and process.returncode == 130
    assert not (small / 'out').exists()


def test_a_config_file_may_begin_with_windows_mark(tmp_path, monkeypatch):
    (tmp_path / 'given.py').write_bytes('\ufeffsteps = 20\n'.encode())
    assert configure(monkeypatch, tmp_path / 'given.py', **DEFAULTS)['steps'] == 20


def test_output_that_the_terminal_cannot_show(tmp_path):
    script = f'out_dir = ""; exec(open({str(ROOT / "configurator.py")!r}).read())'
    done = subprocess.run([sys.executable, '-c', script, '--out_dir=caf\u00e9'], capture_output=True, text=True,
                          env=os.environ | {'PYTHONIOENCODING': 'ascii'})
    assert (done.returncode, done.stdout) == (0, 'Overriding: out_dir = caf?\n'), done.stderr


@pytest.mark.parametrize('script', ['train.py', pytest.param('sample.py', marks=pytest.mark.slow)])
def test_a_start_does_not_import_the_compiler(script):
    """It takes as long as the rest of torch."""
    code = ('import runpy, sys\nsys.argv = sys.argv[1:]\ntry:\n    runpy.run_path(sys.argv[0], run_name="__main__")\n'
            'finally:\n    print("compiler:", "torch._dynamo" in sys.modules)\n')
    code, printed, said = run_outside('-c', code, ROOT / script, '--help', cwd=ROOT)
    assert code == 0 and printed.endswith('compiler: False\n'), said
