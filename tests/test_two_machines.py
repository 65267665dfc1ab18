"""Two of torchrun's agents, as on two machines: folders of their own, and one network interface, lo."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import SMALL, torchrun


def two_machines(clones, *flags, script='train.py', port=29655, first=(), **env):
    """A rank on each; what they printed, and torchrun's exit codes. first: more flags for the first machine."""
    agents = []
    for node, clone in enumerate(clones):
        command = [sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node=1', '--nnodes=2',
                   f'--node_rank={node}', '--master_addr=127.0.0.1', f'--master_port={port}', script]
        more = first if node == 0 else ()
        agents.append(subprocess.Popen([*command, *SMALL, *flags, *more], cwd=clone, text=True, stdout=subprocess.PIPE,
                                       stderr=subprocess.STDOUT, env={**os.environ, 'OMP_NUM_THREADS': '1', **env}))
    printed = [agent.communicate(timeout=500)[0] for agent in agents]
    return [agent.returncode for agent in agents], printed


@pytest.mark.slow
def test_a_host_name_that_no_other_machine_reaches(small, tmp_path):
    """Debian's /etc/hosts has 127.0.1.1 for it. One machine failed, in a traceback, and the other waited."""
    (small / 'debian.py').write_text('''
import runpy, socket
socket.gethostbyname = lambda name: '127.0.1.1'
runpy.run_path('train.py', run_name='__main__')
''')
    other = shutil.copytree(small, tmp_path / 'other')
    env = {name: value for name, value in os.environ.items() if name != 'GLOO_SOCKET_IFNAME'}
    codes, printed = two_machines([small, other], script='debian.py', **env)
    assert 0 not in codes
    for text in printed:
        assert 'set GLOO_SOCKET_IFNAME to the network interface' in text, text
        assert 'Error' not in text.split('set GLOO_SOCKET_IFNAME')[0]
    assert not (small / 'out').exists()


@pytest.mark.slow
def test_a_mistake_on_the_first_machine_alone(small, tmp_path):
    """Before the ranks connect: torchrun's store, which is there, goes with it."""
    other = shutil.copytree(small, tmp_path / 'other')
    codes, printed = two_machines([small, other], port=29658, first=['--batch_size=0'], GLOO_SOCKET_IFNAME='lo')
    assert 0 not in codes and printed[0].count('batch_size=0 must be positive and below 2**31\n') == 1, printed[0]
    assert 'another rank is gone, or cannot be reached: ' in printed[1], printed[1]
    assert 'train.py", line' not in printed[1]


@pytest.mark.slow
def test_an_out_dir_that_is_not_one_folder(small, tmp_path):
    other = shutil.copytree(small, tmp_path / 'other')
    codes, printed = two_machines([small, other], '--max_iters=3', port=29656, GLOO_SOCKET_IFNAME='lo')
    assert codes == [0, 0], printed
    assert 'out is not one folder for all machines' in printed[0] and 'not one folder' not in printed[1]
    assert (small / 'out/ckpt.pt').exists() and not (other / 'out/ckpt.pt').exists()
    before = (small / 'out/ckpt.pt').read_bytes()
    codes, printed = two_machines([small, other], '--init_from=resume', port=29657, GLOO_SOCKET_IFNAME='lo')
    assert 0 not in codes and (small / 'out/ckpt.pt').read_bytes() == before
    for text in printed:
        assert 'out/ckpt.pt is missing on some machines: out must be one folder for all of them\n' in text, text


def test_whichever_rank_cannot_compile_says_so_and_all_go_on_without(small):
    """The second rank alone. On a rank other than 0 this was silent, and the ranks ran different code."""
    (small / 'fails.py').write_text('''
import os, runpy, sys
import pytest
import torch
import model
if os.environ['RANK'] == '1':
    def compiler(graph, inputs):
        raise RuntimeError('no compiler')
else:
    compiler = 'eager'
    model.torch.compile = lambda f, **kwargs: f
model.Block.compile = lambda self, **kwargs: torch.nn.Module.compile(self, backend=compiler)
runpy.run_path('train.py', run_name='__main__')
''')
    code, printed = torchrun(small, '--compile=True', '--max_iters=2', script='fails.py')
    assert code == 0 and printed.count('going on without torch.compile') == 1, printed
    assert 'rank 1: going on without torch.compile: ' in printed
    assert torch.load(small / 'out/ckpt.pt', weights_only=True)['iter_num'] == 2


def test_whichever_rank_runs_out_of_memory_says_so_and_all_stop(small):
    (small / 'fails.py').write_text('''
import os, runpy
import pytest
import torch
import model
forward = model.GPT.forward
def no_room(self, *args, **kwargs):
    if os.environ['RANK'] == '1':
        raise torch.OutOfMemoryError('CUDA out of memory')
    return forward(self, *args, **kwargs)
model.GPT.forward = no_room
runpy.run_path('train.py', run_name='__main__')
''')
    code, printed = torchrun(small, script='fails.py')
    advice = 'out of memory: try --batch_size=2 --gradient_accumulation_steps=4'
    assert code != 0 and printed.count(advice) == 1, printed
    assert not (small / 'out').exists()
