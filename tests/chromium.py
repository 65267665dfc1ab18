"""
A Chromium for the tests, driven through a pipe by the protocol of its developer tools: real time, real keys, workers.

    with Chromium() as browser:
        tab = browser.open('file:///...', width=390)
        tab.evaluate('document.title')
"""

import base64
import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import tempfile
import time

import pytest

FLAGS = ['--headless', '--no-sandbox', '--disable-gpu', '--disable-extensions', '--disable-background-networking',
         '--no-first-run', '--remote-debugging-pipe']


def find_chromium():
    """-> its path, or the test is skipped"""
    found = [shutil.which(name) for name in ('chromium', 'chromium-browser', 'google-chrome')]
    if not any(found):
        pytest.skip('no Chromium here: apt-get install chromium')
    return next(path for path in found if path)


class Chromium:
    def __enter__(self):
        path = find_chromium()
        self.profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        (read, theirs), (ours, write) = os.pipe(), os.pipe()
        command = [path, *FLAGS, f'--user-data-dir={self.profile.name}']

        def connect():  # it reads commands from descriptor 3 and writes answers to descriptor 4
            high = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, 10) for descriptor in (read, write)]
            os.dup2(high[0], 3)
            os.dup2(high[1], 4)

        self.process = subprocess.Popen(command, preexec_fn=connect, close_fds=False, stdout=subprocess.DEVNULL,
                                        stderr=subprocess.DEVNULL, start_new_session=True)
        os.close(read)
        os.close(write)
        self.commands, self.answers = open(theirs, 'wb', buffering=0), open(ours, 'rb', buffering=0)
        self.number, self.held, self.events = 0, b'', []
        return self

    def __exit__(self, *exc):
        with contextlib.suppress(OSError, AssertionError):
            self.call('Browser.close')
        self.commands.close()
        self.answers.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, 9)
            self.process.wait()
        self.profile.cleanup()

    def call(self, method, session=None, **params):
        """Send a command -> its result. Events that come meanwhile are kept in `events`."""
        self.number += 1
        message = {'id': self.number, 'method': method, 'params': params}
        self.commands.write(json.dumps(message | ({'sessionId': session} if session else {})).encode() + b'\0')
        while True:
            while b'\0' not in self.held:
                got = self.answers.read(1 << 20)
                assert got, 'Chromium has ended'
                self.held += got
            line, self.held = self.held.split(b'\0', 1)
            answer = json.loads(line)
            if answer.get('id') == self.number:
                assert 'error' not in answer, f'{method}: {answer["error"]}'
                return answer['result']
            self.events.append(answer)

    def open(self, url, width=1280, height=900, dark=False):
        return Tab(self, url, width, height, dark)


class Tab:
    def __init__(self, browser, url, width, height, dark):
        self.browser = browser
        self.target = browser.call('Target.createTarget', url='about:blank')['targetId']
        self.session = browser.call('Target.attachToTarget', targetId=self.target, flatten=True)['sessionId']
        for domain in ('Page', 'Runtime', 'Log'):
            self.call(f'{domain}.enable')
        self.resize(width, height)
        scheme = {'name': 'prefers-color-scheme', 'value': 'dark' if dark else 'light'}
        self.call('Emulation.setEmulatedMedia', features=[scheme])
        self.call('Page.navigate', url=url)
        self.wait('document.readyState === "complete"')

    def call(self, method, **params):
        return self.browser.call(method, self.session, **params)

    def close(self):
        self.browser.call('Target.closeTarget', targetId=self.target)

    def resize(self, width, height):
        self.call('Emulation.setDeviceMetricsOverride', width=width, height=height, deviceScaleFactor=1, mobile=False)

    def evaluate(self, code):
        """The value of a JavaScript expression, or of what it promises"""
        done = self.call('Runtime.evaluate', expression=code, returnByValue=True, awaitPromise=True)
        assert 'exceptionDetails' not in done, json.dumps(done['exceptionDetails'])[:2000]
        return done['result'].get('value')

    def wait(self, code, seconds=200):
        """Until the expression is true -> its value"""
        end = time.time() + seconds
        while not (value := self.evaluate(code)):
            assert time.time() < end, f'not within {seconds} s: {code}'
            time.sleep(0.02)
        return value

    def press(self, key, text='', modifiers=0):
        for kind in ('keyDown', 'keyUp'):
            self.call('Input.dispatchKeyEvent', type=kind, key=key, code=key, text=text if kind == 'keyDown' else '',
                      windowsVirtualKeyCode=CODES.get(key, 0), modifiers=modifiers)

    def errors(self):
        """What the page's console and the browser's log complained of"""
        events = [e for e in self.browser.events if e.get('sessionId') == self.session]
        said = [e['params'] for e in events if e['method'] in ('Runtime.exceptionThrown', 'Log.entryAdded')]
        said += [e['params'] for e in events if e['method'] == 'Runtime.consoleAPICalled' and
                 e['params']['type'] in ('error', 'warning')]
        return [json.dumps(x)[:500] for x in said]

    def screenshot(self, path, whole=False):
        data = self.call('Page.captureScreenshot', captureBeyondViewport=whole)['data']
        with open(path, 'wb') as f:
            f.write(base64.b64decode(data))


CODES = {'Tab': 9, 'Enter': 13, ' ': 32, 'End': 35, 'Home': 36, 'ArrowLeft': 37, 'ArrowUp': 38, 'ArrowRight': 39,
         'ArrowDown': 40}
