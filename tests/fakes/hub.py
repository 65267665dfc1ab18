"""A small Hugging Face hub on this machine, for datasets and huggingface_hub as they are: see HF_ENDPOINT."""

import hashlib
import http.server
import json
import threading
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit


class Hub(http.server.ThreadingHTTPServer):
    """Serves folder/OWNER/NAME/REVISION, where a revision is main or refs/convert/parquet. `asked`: all requests."""

    def __init__(self, folder):
        self.folder, self.asked = Path(folder), []
        super().__init__(('127.0.0.1', 0), Answer)
        self.endpoint = f'http://127.0.0.1:{self.server_port}'

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()

    def revision(self, name, revision):
        """The commit that a branch is at, or that the name already is, and its folder."""
        for branch in ('main', 'refs/convert/parquet'):
            commit = hashlib.sha1(f'{name}{branch}'.encode()).hexdigest()
            if revision in (branch, commit) and (self.folder / name / branch).is_dir():
                return commit, self.folder / name / branch
        return None, None


class Answer(http.server.BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'

    def log_message(self, *_):
        pass

    def answer(self, code, body=b'', length=None, **headers):
        self.send_response(code)
        for key, value in {'Content-Length': len(body) if length is None else length, **headers}.items():
            self.send_header(key.replace('_', '-'), str(value))
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(body)

    def do(self):
        body = self.rfile.read(int(self.headers.get('Content-Length') or 0)).decode()
        url = urlsplit(self.path)
        parts = url.path.strip('/').split('/')                     # their slashes are quoted: refs%2Fconvert%2Fparquet
        if parts[0] == 'api':
            parts = parts[1:]
        kind, name = parts[0], '/'.join(parts[1:3])
        self.server.asked.append(f'{self.command} {unquote(url.path)}')
        if kind != 'datasets' or len(parts) < 5 or not (self.server.folder / name).is_dir():
            return self.answer(404, X_Error_Code='RepoNotFound')
        (what, revision), path = map(unquote, parts[3:5]), unquote('/'.join(parts[5:]))
        commit, folder = self.server.revision(name, revision)
        if not commit:
            return self.answer(404, X_Error_Code='RevisionNotFound')

        def entry(file):
            return {'type': 'directory' if file.is_dir() else 'file', 'path': file.relative_to(folder).as_posix(),
                    'size': file.stat().st_size, 'oid': hashlib.sha1(str(file).encode()).hexdigest()}

        if what == 'revision':
            return self.answer(200, json.dumps({'id': name, 'sha': commit, 'siblings': []}).encode())
        if what == 'tree' and (folder / path).is_dir():
            every = parse_qs(url.query).get('recursive', ['false'])[0].lower() in ('true', '1')
            files = sorted((folder / path).rglob('*') if every else (folder / path).iterdir())
            return self.answer(200, json.dumps([entry(f) for f in files]).encode(), Content_Type='application/json')
        if what == 'paths-info':
            asked = json.loads(body)['paths'] if body.startswith('{') else parse_qs(body).get('paths', [])
            found = [entry(folder / path) for path in asked if (folder / path).exists()]
            return self.answer(200, json.dumps(found).encode(), Content_Type='application/json')
        if what != 'resolve' or not (folder / path).is_file():
            return self.answer(404, X_Error_Code='EntryNotFound', X_Repo_Commit=commit)
        data = (folder / path).read_bytes()
        about = {'X_Repo_Commit': commit, 'ETag': '"' + entry(folder / path)['oid'] + '"'}
        if self.command == 'HEAD':
            return self.answer(200, length=len(data), **about)
        first, _, last = self.headers.get('Range', 'bytes=0-').removeprefix('bytes=').partition('-')
        part = data[int(first):int(last) + 1 if last else None]
        self.answer(206, part, Content_Range=f'bytes {first}-{int(first) + len(part) - 1}/{len(data)}', **about)

    do_GET = do_HEAD = do_POST = do
