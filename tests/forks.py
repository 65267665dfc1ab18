"""
Scripts that start in a tenth of a second: a server that has imported torch forks a process for each of them.

A forked process runs its script as `python script.py` would, with its own arguments, folder, environment, streams and
end. It does not import torch again, which costs two to five seconds of a core and four times that under torchrun.
"""

import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time

import torch

SERVERS = {}  # {what libraries read when they are loaded: this process's socket to the server started with it}


class Process:
    """A script that runs: pid; wait() gives its exit code, negative where a signal ended it, as subprocess's does."""

    def __init__(self, args, cwd, env, out, err):
        """args: the script and its arguments; out, err: files for what it prints"""
        key = tuple(env.get(name) for name in ('LD_PRELOAD', 'LD_LIBRARY_PATH', 'FAKE_SM'))
        if key not in SERVERS:
            SERVERS[key], theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            one = {'OMP_NUM_THREADS': '1', 'OPENBLAS_NUM_THREADS': '1'}  # no thread before a fork
            subprocess.Popen([sys.executable, __file__, str(theirs.fileno())], pass_fds=[theirs.fileno()],
                             env=env | one, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
            theirs.close()
        self.reply, theirs = os.pipe()
        request = json.dumps({'args': [str(a) for a in args], 'cwd': str(cwd), 'env': env}).encode()
        socket.send_fds(SERVERS[key], [request], [out.fileno(), err.fileno(), theirs])
        os.close(theirs)
        self.pid = int(os.read(self.reply, 8))
        self.returncode = None

    def wait(self, timeout):
        if self.returncode is None:
            if not select.select([self.reply], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            self.returncode = int(os.read(self.reply, 8))
            os.close(self.reply)
        return self.returncode

    def kill(self, number=signal.SIGKILL):
        if self.returncode is None:
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                os.kill(self.pid, number)


def run(args, cwd, env, timeout=300):
    """One script: its exit code, and what it printed."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = Process(args, cwd, env, out, err)
        try:
            code = process.wait(timeout)
        finally:
            process.kill()
        return code, *(text(file) for file in (out, err))


def torchrun(args, cwd, env, n, timeout=600):
    """n ranks of a script, as torchrun starts and ends them: 0 or 1, and what they printed, both streams."""
    # as torchrun's agent does: a rank that served the store would take it away from the others when it leaves
    store = torch.distributed.TCPStore('localhost', 0, is_master=True, wait_for_workers=False)
    env = env | {'WORLD_SIZE': str(n), 'LOCAL_WORLD_SIZE': str(n), 'GROUP_RANK': '0', 'MASTER_ADDR': 'localhost',
                 'MASTER_PORT': str(store.port), 'TORCHELASTIC_USE_AGENT_STORE': 'True',
                 'TORCHELASTIC_RESTART_COUNT': '0'}
    until, code = time.monotonic() + timeout, 0
    with tempfile.TemporaryFile() as out:
        running = [Process(args, cwd, env | {'RANK': str(i), 'LOCAL_RANK': str(i)}, out, out) for i in range(n)]
        rank, report = {p.pid: i for i, p in enumerate(running)}, ''
        try:
            while running:
                ready = select.select([p.reply for p in running], [], [], max(until - time.monotonic(), 0))[0]
                if not ready:
                    raise subprocess.TimeoutExpired(args, timeout)
                for process in [p for p in running if p.reply in ready]:
                    running.remove(process)
                    if process.wait(0) and not code:  # the first rank that fails ends the others
                        code, until = 1, min(until, time.monotonic() + 30)
                        i = rank[process.pid]
                        report = f'  rank      : {i} (local_rank: {i})\n  exitcode  : {process.returncode}\n'
                        time.sleep(1)  # torchrun is no faster: the others may still say what is wrong
                        for other in running:
                            other.kill(signal.SIGTERM)
        finally:
            for process in running:
                process.kill()
        return code, text(out) + report


def run_anew(args, cwd, env, timeout=300):
    """run() by a new Python."""
    done = subprocess.run([sys.executable, *map(str, args)], cwd=cwd, env=env, timeout=timeout, capture_output=True,
                          text=True)
    return done.returncode, done.stdout, done.stderr


def torchrun_anew(args, cwd, env, n, flags=('--standalone',), timeout=600):
    """torchrun() by torchrun; flags: its own."""
    command = [sys.executable, '-m', 'torch.distributed.run', *flags, f'--nproc_per_node={n}', *map(str, args)]
    done = subprocess.run(command, cwd=cwd, env=env, timeout=timeout, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          text=True)
    return done.returncode, done.stdout


def text(file):
    file.seek(0)
    return file.read().decode()


def serve(server):
    """Answer requests for ever; a forked process returns from here, with the script to run."""
    while True:
        request, files, _, _ = socket.recv_fds(server, 1 << 20, 3)
        if not request:
            os._exit(0)  # the tests have ended
        if os.fork() == 0:
            break
        for file in files:
            os.close(file)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    server.close()
    out, err, reply = files
    pid = os.fork()
    if pid:  # waits for the process, as the tests cannot
        os.write(reply, b'%8d' % pid)
        os.write(reply, b'%8d' % os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        os._exit(0)
    os.close(reply)
    os.dup2(out, 1)
    os.dup2(err, 2)
    for file in (out, err):
        os.close(file)
    request = json.loads(request)
    os.environ.clear()
    os.environ.update(request['env'])
    os.chdir(request['cwd'])
    sys.argv = request['args']
    paths = request['env'].get('PYTHONPATH', '').split(os.pathsep)
    sys.path[0:1] = [os.path.dirname(os.path.abspath(sys.argv[0])), *filter(None, paths)]
    return sys.argv[0]


if __name__ == '__main__':
    for name in ('_dynamo', '_inductor.compile_fx', 'distributed.checkpoint', 'distributed.fsdp',
                 'distributed.tensor.parallel', 'nn.parallel'):
        importlib.import_module(f'torch.{name}')
    assert len(os.listdir('/proc/self/task')) == 1, 'threads do not survive a fork'
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    runpy.run_path(serve(socket.socket(fileno=int(sys.argv[1]))), run_name='__main__')
