"""train.py, sample.py and grpo.py themselves on a GPU that runs nothing: host syncs, launches, memory, graph breaks.

docs/gpu.md says what is seen. Numbers are not computed here at all: a GPU's are another test's.
"""

import math
import re
import shutil

import fakegpu
import numpy as np
import pytest
from conftest import ROOT, SMALL, train

pytestmark = pytest.mark.skipif(fakegpu.what_is_missing() != '', reason=fakegpu.what_is_missing() or 'none')
slow = pytest.mark.slow

# the first iteration alone is logged, after its optimizer step; the third is the first that is like all others
LOOP = ['--device=cuda', '--dtype=bfloat16', '--max_iters=3', '--log_interval=1000', '--eval_interval=1000',
        '--eval_iters=1']
MAIN = ['config/train_deepseek.py', '--dataset=abc', '--vocab_size=50304', '--gradient_accumulation_steps=1', *LOOP]
# few of many experts: grouped products, where the main config's 14 of 20 are one wide one
GROUPED = [*SMALL, *LOOP, '--n_layer=1', '--num_nextn_predict_layers=1', '--n_routed_experts=16']
LOOK = 'decode.py: remaining = (s.end - s.known).masked_fill(s.done, 0).tolist()'


@pytest.fixture(scope='module')
def library(tmp_path_factory):
    return fakegpu.build(tmp_path_factory.mktemp('fakegpu'))


@pytest.fixture
def on_gpu(library, small):
    """on_gpu(sm, script, *flags): what fakegpu.run() finds, in a clone with a data set."""
    for split in ('train', 'val'):
        np.arange(4000, dtype=np.uint16).clip(max=39).tofile(small / f'data/abc/{split}.bin')
    yield lambda sm, script, *flags: fakegpu.run(library, sm, script, *flags, cwd=small)
    for folder in small.glob('out*'):  # the main config's checkpoint is 1.7 GB
        shutil.rmtree(folder)


def faults(found, kernels, gemms, compiled=False):
    """What is wrong with a run of train.py: its last iteration may launch so many kernels and products of cuBLAS."""
    if found['code'] != 0:
        return [f'failed: {found["printed"][-2000:]}']
    last, seen = found['iterations'][-1], []
    if last['syncs'] > 0:
        seen.append(f'host syncs: {last["waits"]}')
    if last['mallocs'] > 0:
        seen.append(f'{last["mallocs"]} cudaMallocs')
    if last['launches'] + last['triton'] > kernels:
        seen.append(f'kernels: {last["launches"]} + {last["triton"]}, more than {kernels}')
    if last['gemms'] > gemms:
        seen.append(f'GEMMs: {last["gemms"]}, more than {gemms}')
    if 'going on without' in found['printed']:
        seen.append(re.search('going on without.*', found['printed']).group())
    if found['graph_breaks'] > 0:
        seen.append(f'{found["graph_breaks"]} graph breaks')
    if compiled and last['triton'] < last['launches'] / 2:
        seen.append(f'eager: {last["launches"]} kernels, of Triton {last["triton"]}')
    return seen


def numbers_of_the_docs(sm, mode):
    """The row of docs/gpu.md: syncs, torch's kernels, Triton's, GEMMs, and GiB allocated and reserved."""
    rows = [line.strip('| ').split(' | ') for line in (ROOT / 'docs/gpu.md').read_text().splitlines()]
    row, = (row for row in rows if row[:2] == [f'{sm // 10}.{sm % 10}', mode])
    return [float(cell.replace(',', '')) for cell in row[2:]]


def test_the_main_run_with_narrow_layers(on_gpu):
    """As many products as at its own width, and no more kernels: AdamW's smaller weights need fewer."""
    found = on_gpu(80, 'train.py', *MAIN, '--compile=False', '--n_embd=96', '--n_head=2', '--moe_intermediate_size=16')
    _, launches, triton, gemms, _, _ = numbers_of_the_docs(80, 'eager')
    assert faults(found, launches + triton, gemms) == []


@slow
@pytest.mark.parametrize('mode', ['eager', 'compiled'])
@pytest.mark.parametrize('sm', [80, 89, 90])
def test_the_main_run(on_gpu, sm, mode):
    """An iteration of one micro-batch of config/train_deepseek.py, beside docs/gpu.md."""
    found = on_gpu(sm, 'train.py', *MAIN, f'--compile={mode == "compiled"}')
    syncs, launches, triton, gemms, allocated, reserved = numbers_of_the_docs(sm, mode)
    assert syncs == 0
    assert faults(found, 1.05 * (launches + triton), 1.05 * gemms, mode == 'compiled') == []
    assert (found['allocated'], found['reserved']) == pytest.approx((allocated, reserved), rel=0.05)
    logged, = found['iterations'][-2]['waits'].items()  # an iteration that is logged waits once
    assert 'numbers = torch.cat(' in logged[0] and logged[1] == 1


@slow
@pytest.mark.parametrize('mode', ['eager', 'compiled'])
def test_the_main_run_on_a_t4(on_gpu, mode):
    """In float16, with a GradScaler, in 15 GB. It has no bfloat16, and Triton no tensor cores for its products."""
    found = on_gpu(75, 'train.py', *MAIN, '--dtype=', '--batch_size=8', f'--compile={mode == "compiled"}')
    assert 'cuda, float16' in found['printed']
    known = 'going on without extras/kernels.py: Triton has no tensor-core products there'
    found['printed'] = found['printed'].replace(known, '')
    assert faults(found, 3650 if mode == 'eager' else 1250, 460, mode == 'compiled') == []


@slow
def test_out_of_memory_says_what_to_try_until_it_fits(on_gpu):
    """On 24 GB. What it says is half the batch, and twice as many micro-batches: the same tokens in an iteration."""
    flags, advice = ['--batch_size=60'], []
    while True:
        found = on_gpu(89, 'train.py', *MAIN, '--compile=False', *flags)
        if found['code'] == 0:
            break
        assert found['code'] == 2 and 'Traceback' not in found['printed'], found['printed']
        flags = re.search(r'^out of memory: try (\S+) (\S+)$', found['printed'], re.M).groups()
        advice.append(flags)
    accumulation = int(next(flag for flag in MAIN if 'accumulation' in flag).split('=')[1])
    assert advice == [(f'--batch_size={60 // 2 ** i}', f'--gradient_accumulation_steps={accumulation * 2 ** i}')
                      for i in (1, 2)]
    assert 12 < found['reserved'] < 24


BUDGETS = {'eager': (1150, 112), 'compiled': (680, 112)}  # of GROUPED: kernels and GEMMs of two micro-batches


@pytest.mark.parametrize('sm, mode', [
    (80, 'eager'), *(pytest.param(*case, marks=slow) for case in (
        (89, 'eager'), (90, 'eager'), (80, 'compiled'), (89, 'compiled'), (90, 'compiled')))])
def test_grouped_experts(on_gpu, sm, mode):
    found = on_gpu(sm, 'train.py', *GROUPED, f'--compile={mode == "compiled"}')
    assert faults(found, *BUDGETS[mode], mode == 'compiled') == []


FORWARD = '            _, loss = model(x, y, mtp_lambda=mtp_weight, label_counts=label_counts)\n'
SECOND = 'GroupedLinear.apply(swiglu(y, limit) * row_gates.to(dtype), down.to(dtype), offsets)'
BLOCK = '        x = x + self.attn('


@pytest.mark.parametrize('file, line, planted, compiled, seen', [
    ('train.py', FORWARD, FORWARD + '            loss.item()\n', False, ['host syncs: .*loss.item']),
    pytest.param('train.py', FORWARD, 2 * FORWARD, False, ['kernels', 'GEMMs'], marks=slow),
    pytest.param('extras/kernels.py', SECOND,
                 'model_file.grouped_linear(swiglu(y, limit).float() * row_gates, down, offsets)', False,
                 ['host syncs: .*ends = offsets.tolist', 'kernels'], marks=slow),
    ('model.py', 'block.compile(dynamic=False,', 'block.compile(backend=lambda *args: 1 / 0,', True,
     ['kernels', 'going on without torch.compile', 'eager'])],
    ids=['item', 'two forwards', 'grouped product in fp32', 'no compiler'])
def test_a_planted_mistake_of_training_is_seen(on_gpu, small, file, line, planted, compiled, seen):
    plant(small / file, line, planted)
    found = faults(on_gpu(80, 'train.py', *GROUPED, f'--compile={compiled}'),
                   *BUDGETS['compiled' if compiled else 'eager'], compiled)
    assert len(found) == len(seen) and all(map(re.match, seen, found)), found


@slow
def test_a_planted_graph_break_is_seen(on_gpu, small):
    plant(small / 'model.py', BLOCK, '        torch._dynamo.graph_break()\n' + BLOCK)
    assert any('graph breaks' in fault for fault in faults(on_gpu(80, 'train.py', *GROUPED, '--compile=True'),
                                                           *BUDGETS['compiled'], True))


def plant(path, line, planted):
    text = path.read_text()
    assert line in text
    path.write_text(text.replace(line, planted, 1))


# decoding

@pytest.fixture
def trained(small):
    """A clone with a checkpoint, of 2 blocks and 2 MTP modules, in out."""
    train(small, '--block_size=128', '--num_nextn_predict_layers=2', '--eos_token_id=39', '--max_iters=1',
          '--eval_iters=1', '--eval_interval=1')
    return small


def sampled(on_gpu, *flags, sm=80):
    """100 tokens behind the prompt's, of two rows. The two steps in which a graph is made are left out."""
    found = on_gpu(sm, 'sample.py', '--device=cuda', '--dtype=bfloat16', '--start=0', '--num_samples=2',
                   '--max_new_tokens=101', *flags)
    assert found['code'] == 0 and 'going on without' not in found['printed'], found['printed']
    return found, found['steps'][2:]


@pytest.mark.parametrize('sm, speculative, launches, gemms', [
    (80, False, 203, 26), (80, True, 437, 55), pytest.param(90, False, 203, 26, marks=slow),
    pytest.param(90, True, 437, 55, marks=slow)])
def test_decoding(on_gpu, trained, sm, speculative, launches, gemms):
    """No step waits; between them the host looks at most 7 times whether 100 tokens are there."""
    found, steps = sampled(on_gpu, f'--speculative={speculative}', sm=sm)
    assert len(found['steps']) == (49 if speculative else 99)  # differences of 50 and 100 steps
    assert max(step['launches'] for step in steps) <= launches and max(step['gemms'] for step in steps) <= gemms
    looks = sum(step['syncs'] for step in found['steps'])
    assert {line for step in found['steps'] for line in step['waits']} == {LOOK} and 0 < looks <= 7


@slow
@pytest.mark.parametrize('speculative', [False, True])
def test_compiled_decoding(on_gpu, trained, speculative):
    """A step is one graph, recorded once, and what torch's random numbers and a look launch beside it."""
    found, steps = sampled(on_gpu, '--compile=True', f'--speculative={speculative}')
    assert len(steps) > 40 and all(step['replays'] == 1 for step in steps)
    assert sum(step['recordings'] + step['gemms'] + step['triton'] + step['mallocs'] for step in steps) == 0
    assert max(step['launches'] for step in steps) <= 6 and found['graph_breaks'] == 0
    assert {line for step in steps for line in step['waits']} == {LOOK} and sum(s['syncs'] for s in steps) <= 7


def test_a_planted_sync_of_decoding_is_seen(on_gpu, trained):
    line = '    h, routing = model.main_stack(s.tokens.gather(1, positions), s.caches, positions) '
    plant(trained / 'extras/decode.py', line, '    positions.max().item()\n' + line)
    _, steps = sampled(on_gpu)
    assert sum(step['waits'].get('decode.py: positions.max().item()', 0) for step in steps) == len(steps) == 97


# GRPO

SYNCS_OF_GRPO = 16  # of an iteration, beside the looks of its rollouts: docs/gpu.md names the lines


def iteration_of_grpo(on_gpu, clone, *flags):
    """The last iteration: 2 prompts, 4 responses to each, of 33 tokens."""
    for split in ('train', 'val'):
        (clone / f'data/abc/{split}_prompts.txt').write_text('01\t2\n34\t5\n')
    (clone / 'data/abc/reward.py').write_text('def reward(prompt, response, answer):\n    return 0, 1\n')
    found = on_gpu(80, 'grpo.py', '--init_from=out', '--out_dir=out-grpo', '--dataset=abc', '--device=cuda',
                   '--dtype=bfloat16', '--reward_file=data/abc/reward.py', '--prompts_per_iter=2', '--group_size=4',
                   '--max_new_tokens=33', '--max_iters=3', '--eval_prompts=2', '--eval_interval=100', *flags)
    assert found['code'] == 0 and 'going on without' not in found['printed'], found['printed']
    return found['iterations'][-1]


def test_grpo(on_gpu, trained):
    last = iteration_of_grpo(on_gpu, trained)
    assert last['waits'][LOOK] == math.ceil(32 / 16)
    assert last['syncs'] <= SYNCS_OF_GRPO + last['waits'][LOOK]
    assert last['launches'] + last['triton'] <= 7500 and last['gemms'] <= 1000 and last['mallocs'] == 0
    # each line that waits does so once or twice, not once a row or a token
    assert max(last['waits'].values()) <= 2


@slow
def test_grpo_with_compiled_rollouts(on_gpu, trained):
    last = iteration_of_grpo(on_gpu, trained, '--compile=True')
    assert last['replays'] == 32 and last['recordings'] == 0
    assert last['syncs'] <= SYNCS_OF_GRPO + last['waits'][LOOK]


def test_a_planted_sync_of_grpo_is_seen(on_gpu, trained):
    line = '            (-(weights[part] * gain).sum()).backward()\n'
    plant(trained / 'grpo.py', line, line + '            gain.sum().item()\n')
    last = iteration_of_grpo(on_gpu, trained)
    assert last['waits'].pop('grpo.py: gain.sum().item()') == 1
    assert last['syncs'] > SYNCS_OF_GRPO + last['waits'][LOOK]
