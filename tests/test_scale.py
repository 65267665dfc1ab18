"""scale/layouts.py: formulas beside what torch and the kernel count, tables; scale/schedules.py beside the papers."""

import json
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT, TINY
from torch._subclasses.fake_tensor import FakeTensorMode

sys.path.insert(0, str(ROOT / 'scale'))
import layouts
import schedules
from layouts import Layout

from model import GPTConfig

SETTINGS = dict(block_size=64, vocab_size=2048, n_layer=4, n_head=4, n_embd=128, n_routed_experts=8,
                num_experts_per_tok=4, num_nextn_predict_layers=1)
can_unshare = subprocess.run(['unshare', '-rn', 'ip', 'link', 'set', 'lo', 'up'], capture_output=True).returncode == 0 \
    if sys.platform == 'linux' else False
needs_namespace = pytest.mark.skipif(not can_unshare, reason='needs Linux, and network namespaces')


def in_a_namespace(command, cwd=ROOT):
    """What a command prints in a network namespace of its own, where lo carries nothing else."""
    done = subprocess.run(['unshare', '-rn', 'bash', '-c', f'ip link set lo up; {command}'], cwd=cwd, text=True,
                          env={**os.environ, 'OMP_NUM_THREADS': '1', 'GLOO_SOCKET_IFNAME': 'lo'}, timeout=500,
                          capture_output=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def torchrun(n, script):
    return f'{sys.executable} -m torch.distributed.run --nproc_per_node={n} --master_addr=127.0.0.1 {script}'


def test_v3_has_its_published_sizes():
    """V3 section 1: 671B parameters, 37B of them activated. (V2-Lite's and Moonlight's: test_convert.py.)"""
    v3 = layouts.without_memory(**{**vars(layouts.MODELS['V3'].gpt.config), 'num_nextn_predict_layers': 0})
    assert round(v3.get_num_params(non_embedding=False) / 1e9) == 671
    assert 37 <= layouts.active(v3) / 1e9 < 38
    assert f'{layouts.MODELS["V2-Lite"].gpt.get_num_params(non_embedding=False) / 1e9:.1f}' == '15.7'
    assert f'{layouts.MODELS["Moonlight"].gpt.get_num_params(non_embedding=False) / 1e9:.1f}' == '16.0'


@pytest.mark.slow
@pytest.mark.parametrize('world', [2, 4])
@needs_namespace
def test_states_and_traffic_are_what_torch_and_the_kernel_count(world):
    found = json.loads(in_a_namespace(torchrun(world, f"tests/fakes/traffic.py '{json.dumps(SETTINGS)}'")))
    gpt = layouts.without_memory(**SETTINGS)

    def compare(name, layout, rel):
        """Of a step with one micro-batch. gloo's reduce-scatter sends twice a ring's bytes."""
        sent, states = found[name]
        gloo = sum(layouts.ring(4 * n, shards) for n, _, shards, _ in layouts.parts(gpt, layout))
        want = sum(n for _, n, _ in layouts.wire(gpt, world, layout, 1, 1)) + gloo
        assert sent == pytest.approx(want, rel=rel)
        assert states == pytest.approx(layouts.states(gpt, world, layout), rel=0.01)

    compare('ddp', Layout(), rel=0.02)
    compare('fsdp', Layout(shard=world), rel=0.02)
    compare('experts', Layout(ep=world), rel=0.04)  # rows go to the experts that are chosen, not equally many to each
    if world == 4:
        compare('hsdp', Layout(shard=2), rel=0.02)
        compare('experts and hsdp', Layout(ep=2, shard=2), rel=0.04)


@pytest.mark.slow
@needs_namespace
def test_a_pipelines_traffic_is_what_the_kernel_counts(small):
    """Of scale/pipeline.py, by its 3rd to 12th iteration."""
    totals = []
    for steps in (2, 12):
        script = f'scale/pipeline.py --dataset=abc --device=cpu --max_iters={steps} --out_dir=out-{steps}'
        printed = in_a_namespace(torchrun(2, script) + ' && cat /proc/net/dev', cwd=small)
        totals.append(int(re.search(r'lo:\s*(?:\d+\s+){8}(\d+)', printed)[1]))
    gpt = layouts.without_memory(block_size=64, vocab_size=65, n_layer=8, n_head=4, n_embd=64)
    (want,) = (n for what, n, _ in layouts.wire(gpt, 2, Layout(pp=2), 4, 16) if what == 'stages')
    assert (totals[1] - totals[0]) / 10 / 2 == pytest.approx(want, rel=0.03)


def test_an_expert_rank_holds_its_share():
    whole, half = (layouts.without_memory(**SETTINGS | {'n_routed_experts': E}) for E in (8, 4))
    routers = sum(moe.gate.weight.numel() for moe in half.moe_layers())
    want = half.get_num_params(non_embedding=False) + routers  # each rank routes among all
    assert sum(n for n, *_ in layouts.parts(whole, Layout(ep=2))) == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize('dense', [False, True])
def test_activations_are_those_of_a_real_block(dense):
    """And grow with the sequence as memory does that no two tokens share."""
    config = GPTConfig(**TINY | {'block_size': 256, 'n_embd': 128})
    kept = layouts.saved_bytes(config, dense)
    with FakeTensorMode():
        assert layouts.saved_bytes(config, dense) == kept
        longer = layouts.saved_bytes(GPTConfig(**TINY | {'block_size': 512, 'n_embd': 128}), dense)
    assert longer == pytest.approx(2 * kept, rel=0.02)
    # at least the residual stream, q, k, v and the attention's output, and what the experts or the FFN multiply with
    width = config.num_experts_per_tok * config.moe_intermediate_size if not dense else config.intermediate_size
    assert kept > 256 * (4 * 128 + 4 * 2 * 128 + 3 * 2 * width)


def test_the_main_runs_peak_is_near_that_of_torchs_allocator():
    table = (ROOT / 'docs/gpu.md').read_text()
    measured = float(re.search(r'\| 9\.0 \| eager \|.*\| ([\d.]+) \| [\d.]+ \|', table)[1])
    formula = layouts.memory(layouts.MODELS['main run'].gpt, 1, Layout(), 12, recompute=False) / 2**30
    assert formula == pytest.approx(measured, rel=0.1)
    assert f'the formulas give {formula:.1f} GiB' in (ROOT / 'scale/README.md').read_text()


@pytest.mark.parametrize('P', [2, 4, 8])
def test_simulated_bubbles_are_the_papers(P):
    """Exactly where F = I = W, for any number of micro-batches; with other times 1F1B's still, the others' nearly."""
    for M in (2 * P, 2 * P + 3, 5 * P):
        for times in ((1, 1, 1), (1, 1.2, 0.8)):
            for schedule, formula in schedules.BUBBLES.items():
                step, spans = schedules.simulate(schedule, P, M, *times)
                bubble = step - 2 * M * sum(times)
                exact = times == (1, 1, 1) or schedule == '1F1B'
                assert bubble == pytest.approx(formula(P, *times), abs=1e-6 if exact else 0.25 * P), (schedule, M)
                if schedule == 'ZB-V' and exact:  # ranks never wait between their first and their last action
                    for rank in range(P):
                        mine = [(start, end) for r, *_, start, end in spans if r == rank]
                        assert max(end for _, end in mine) - min(start for start, _ in mine) == 2 * M * sum(times)


@pytest.mark.parametrize('schedule', schedules.BUBBLES)
def test_a_simulated_step_keeps_the_order_of_stages(schedule):
    P, M = 4, 9
    step, spans = schedules.simulate(schedule, P, M, 1, 1.5, 0.5)
    at = {(kind, stage, m): (start, end) for _, kind, stage, m, start, end in spans}
    stages = P if schedule == '1F1B' else 2 * P
    for m in range(M):
        backward = [at.get(('I', stage, m)) or at['B', stage, m] for stage in range(stages)]
        for stage in range(stages):
            start, end = at['F', stage, m]
            assert end <= backward[stage][0]
            assert ('B', stage, m) in at or at['W', stage, m][0] >= backward[stage][1]
            if stage > 0:
                assert start >= at['F', stage - 1, m][1] and backward[stage][1] <= backward[stage - 1][0]
    for rank in range(P):  # which does one thing at a time
        mine = sorted((start, end) for r, *_, start, end in spans if r == rank)
        assert all(end <= start + 1e-9 for (_, end), (start, _) in zip(mine, mine[1:]))
        assert sum(end - start for start, end in mine) == pytest.approx(2 * M * 3)


@pytest.mark.parametrize('P', [2, 4, 8])
def test_ranks_keep_as_many_micro_batches_as_the_papers_say(P):
    """V3 table 2: 1F1B P, DualPipe 2P + 1 of half as long stages, as layouts.memory() has it; 2401.10241: ZB-V 2P."""
    for schedule, want in (('1F1B', P), ('ZB-V', 2 * P), ('DualPipeV', 2 * P + 1)):
        peaks = []
        for units in schedules.orders(schedule, P, 5 * P):
            kept = peak = 0
            for unit in units:  # of two that overlap the forward begins while the other's activations are there
                kept += sum(kind == 'F' for kind, *_ in unit)
                peak = max(peak, kept)
                kept -= sum(kind in 'BW' for kind, *_ in unit)
            peaks.append(peak)
        assert max(peaks) == want, (schedule, peaks)


def test_the_plan_fits_and_links_matter(monkeypatch):
    model = layouts.MODELS['Moonlight']
    plan = layouts.choose(model, 8, pipelines=False)
    assert plan.memory <= layouts.MEMORY and 0.3 < plan.mfu < model.efficiency
    assert layouts.choose(model, 1, pipelines=False) is None  # 16 bytes a parameter are 255 GB
    monkeypatch.setattr(layouts, 'NVLINK', layouts.NVLINK / 20)
    slower = layouts.predict(model, 8, *plan[:3])
    assert slower.step > 1.5 * plan.step and slower.memory == plan.memory


def test_rings_over_machines():
    """A ring over whole machines has the links of 8 GPUs, one with a GPU on each machine that of its own."""
    assert [layouts.ring_speed(*group) for group in ((8, 1), (64, 1), (8, 8), (4, 4))] == \
        [layouts.NVLINK, layouts.NVLINK, layouts.NETWORK, 2 * layouts.NETWORK]


def test_experts_cross_the_network_only_between_machines():
    v3 = layouts.MODELS['V3'].gpt
    found = {}
    for ep in (8, 64):
        sent = layouts.wire(v3, 64, Layout(ep=ep), 1, 1)
        found[ep] = next((n, seconds) for what, n, seconds in sent if what == 'experts')
    rows = 4 * 59 * 4096 * 7168 * 2  # four passes, 58 MoE layers and the MTP module's
    assert found[8] == (pytest.approx(rows * 8 * 7 / 8), pytest.approx(rows * 8 * 7 / 8 / layouts.NVLINK))
    assert found[64][1] == pytest.approx(rows * 4 * 7 / 8 / layouts.NETWORK)  # to 4 machines of 8


def test_the_page_holds_the_tables_that_the_script_computes():
    text = (ROOT / 'scale/README.md').read_text()
    assert re.findall('<!-- (?!end)(.*) -->', text) == ['models', 'memory', 'wire', 'choice', 'bubbles']
    assert layouts.filled(text) == text
