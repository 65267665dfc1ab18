import os
import subprocess
import sys

import pytest
from conftest import ROOT, run_inside

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
    ('rtae = 1', 'did you mean rate'), ('rate = "fast"', 'rate must be float'), ('rate = = 1', 'SyntaxError'),
    ('rate = 1 / 0', 'ZeroDivisionError'),
])
def test_mistakes_in_a_file(monkeypatch, tmp_path, capsys, text, message):
    file = tmp_path / 'a.py'
    file.write_text(text)
    with pytest.raises(SystemExit) as error:
        configure(monkeypatch, file, **DEFAULTS)
    said = capsys.readouterr().err
    assert error.value.code == 2 and message in said and said.count('\n') == 1


def test_help_lists_every_setting_with_its_default_and_comment(small):
    code, printed, said = run_inside('train.py', '--help', cwd=small)
    assert code == 0 and said == '' and not (small / 'out').exists()
    assert '--eval_only=False  # evaluate once and stop' in printed and '--beta1=0.9\n' in printed
    assert '--kv_lora_rank=-1  # width of the latent that is cached' in printed  # of GPTConfig
    assert printed.startswith("Trains a model; nanoGPT's loop and flags")


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
    assert error.value.code == 2 and capsys.readouterr().err == f'{file}: SystemExit: bye\n'
