"""README, docs/ and notebooks/: links lead somewhere, and what they name is there: files, flags, functions, tests."""

import json
import re

import pytest
from conftest import ROOT

import model
import model_v4
from extras import decode, experts, optim

PAGES = [ROOT / 'README.md', ROOT / 'scale/README.md', *sorted((ROOT / 'docs').glob('*.md')),
         *sorted((ROOT / 'notebooks').glob('*.ipynb'))]
ROOMS = ('.', 'extras', 'runs', 'scale', 'data', 'data/arithmetic', 'data/countdown', 'data/openwebtext', 'tests',
         'tests/fakes', 'tests/by_hand')
TORCHRUNS = {'nproc_per_node', 'nnodes', 'node_rank', 'master_addr', 'master_port'}
EXAMPLES = {'data/letters/prepare.py', 'data/letters/reward.py', 'data/NAME/prepare.py'}  # the reader writes the first
NANOGPTS = {'finetune_shakespeare.py'}
page = pytest.mark.parametrize('path', PAGES, ids=lambda path: str(path.relative_to(ROOT)))


def text_of(path):
    """A page. Of a notebook its texts, and its cells with code as blocks of commands"""
    if path.suffix != '.ipynb':
        return path.read_text()
    sources = [(cell['cell_type'], ''.join(cell['source'])) for cell in json.loads(path.read_text())['cells']]
    return '\n\n'.join(source if kind == 'markdown' else f'```sh\n{source}\n```' for kind, source in sources)


def anchors(path):
    """The anchors that GitHub makes of a page's headings."""
    text = re.sub(r'^```.*?^```', '', text_of(path), flags=re.S | re.M)
    titles = re.findall(r'^#+ (.+)$', text, re.M)
    return {re.sub(r'[^\w -]', '', title.lower()).replace(' ', '-') for title in titles}


@page
def test_links_lead_somewhere(path):
    text = re.sub(r'```.*?```', '', text_of(path), flags=re.S)
    links = [link for link in re.findall(r'\]\(([^)\s]+)\)', text) if not link.startswith('http')]
    assert links
    for link in links:
        file, _, anchor = link.partition('#')
        target = (path.parent / file).resolve() if file else path
        assert target.is_file(), link
        assert not anchor or anchor in anchors(target), link


@page
def test_files_are_there(path):
    """A command names a file with its folder; a text may leave the folder out."""
    text = text_of(path)
    commands = ' '.join(re.findall(r'```sh\n(.*?)```', text, re.S))
    code = ' '.join(re.findall(r'`([^`\n]+)`', re.sub(r'```.*?```', '', text, flags=re.S)))
    known = {file.name for room in ROOMS for file in (ROOT / room).glob('*')}
    for words, short in ((commands, False), (code, True)):
        named = set(re.findall(r'(?<![\w/*.-])[\w/-]+\.(?:py|sh|c)\b', words)) - EXAMPLES - NANOGPTS
        for name in named:
            assert (ROOT / name).is_file() or short and name in known, name
    for folder in re.findall(r'`(\w[\w/]*/)`', text):
        assert (ROOT / folder).is_dir(), folder


@page
def test_flags_are_there(path):
    """As a setting of a script, a field of GPTConfig, an argument of argparse, or the dial."""
    source = '\n'.join(file.read_text() for room in ROOMS if room[:5] != 'tests' for file in (ROOT / room).glob('*.py'))
    flags = set(re.findall(r'--([a-z]\w*)=', text_of(path))) - TORCHRUNS - {'key'}
    for flag in flags:
        assert re.search(rf"^{flag} = |^    {flag}: \w+ = |'--{flag}'|\['{flag}'\] = ", source, re.M), flag


def test_what_the_table_of_papers_names_is_there():
    table = (ROOT / 'README.md').read_text().split('| in the code | in the papers |')[1].split('\n\n')[0]
    rooms = {'extras/decode.py': decode, 'extras/experts.py': experts, 'extras/optim.py': optim,
             'model_v4.py': model_v4}
    rows = [re.findall(r'`([^`]+)`', row.split('|')[1]) for row in table.splitlines() if '`' in row]
    assert len(rows) > 10
    for names in rows:
        room = next((rooms[name] for name in names if name in rooms), model)
        for name in set(names) - set(rooms):
            thing = room
            for part in name.split('.'):
                assert hasattr(thing, part), name
                thing = getattr(thing, part)


def test_versions_of_python_agree():
    """README's, those of pyproject.toml, and those that are tested"""
    first, last = re.search(r'Python 3\.(\d+) to 3\.(\d+)', (ROOT / 'README.md').read_text()).groups()
    stated = [str(minor) for minor in range(int(first), int(last) + 1)]
    assert re.findall(r'Python :: 3\.(\d+)', (ROOT / 'pyproject.toml').read_text()) == stated
    assert re.findall(r"python: '3\.(\d+)'", (ROOT / '.github/workflows/test.yml').read_text()) == stated


@page
def test_tests_are_there(path):
    text = text_of(path)
    source = '\n'.join(file.read_text() for file in (ROOT / 'tests').rglob('*.py'))
    for name in re.findall(r'\btest_\w+\b(?!\.py)', text):
        assert f'def {name}(' in source, name
    for file, chosen in re.findall(r'(tests/\S+\.py) .*?-k ("[^"]+"|\w+)', text):
        for word in chosen.strip('"').split(' or '):
            assert re.search(rf'def test_\w*{word}', (ROOT / file).read_text()), f'{file} -k {word}'


def test_soaks_table_has_its_parts():
    table = (ROOT / 'docs/training.md').read_text().split('### make soak')[1].split('\n#')[0]
    soak = (ROOT / 'tests/by_hand/soak.py').read_text()
    parts = re.findall(r'^def (kill|dcp|ranks|grpo|files|disk|memory)\(', soak, re.M)
    assert re.findall(r'^\| `(\w+)` \|', table, re.M) == parts and len(parts) == 7
