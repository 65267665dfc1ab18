"""runs/scale.py: its formulas beside what torch and the kernel count, its simulation beside the papers, its tables."""

import json
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT, TINY

sys.path.insert(0, str(ROOT / 'runs'))
import scale
from scale import Layout

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
    v3 = scale.without_memory(**{**vars(scale.MODELS['V3'].gpt.config), 'num_nextn_predict_layers': 0})
    assert round(v3.get_num_params(non_embedding=False) / 1e9) == 671
    assert 37 <= scale.active(v3) / 1e9 < 38
    assert f'{scale.MODELS["V2-Lite"].gpt.get_num_params(non_embedding=False) / 1e9:.1f}' == '15.7'
    assert f'{scale.MODELS["Moonlight"].gpt.get_num_params(non_embedding=False) / 1e9:.1f}' == '16.0'


@pytest.mark.parametrize('world', [2, pytest.param(4, marks=pytest.mark.slow)])
@needs_namespace
def test_states_and_traffic_are_what_torch_and_the_kernel_count(world):
    found = json.loads(in_a_namespace(torchrun(world, f"tests/traffic.py '{json.dumps(SETTINGS)}'")))
    gpt = scale.without_memory(**SETTINGS)
    dense, experts, outside = scale.sizes(gpt)
    in_blocks = dense + experts
    n = in_blocks + outside
    sent, states = found['ddp']
    assert states == scale.states(gpt, world, Layout())
    assert sent == pytest.approx(scale.ddp_bytes(n, world), rel=0.02)
    gloo = scale.reduce_scatter(4 * n, world)  # its reduce-scatter sends twice a ring's bytes
    sent, states = found['fsdp']
    assert states == pytest.approx(scale.states(gpt, world, Layout(shard=world)), rel=0.01)
    assert sent == pytest.approx(scale.fsdp_bytes(in_blocks, outside, world, 1) + gloo, rel=0.02)
    if world == 4:
        sent, states = found['hsdp']
        want = scale.fsdp_bytes(in_blocks, outside, 2, 1) + scale.ddp_bytes(n / 2, 2)
        assert states == pytest.approx(scale.states(gpt, 4, Layout(shard=2)), rel=0.01)
        assert sent == pytest.approx(want + scale.reduce_scatter(4 * n, 2), rel=0.02)
    one_layer = scale.without_memory(**SETTINGS | dict(n_layer=1, num_nextn_predict_layers=0))
    copies, _ = scale.expert_copies(one_layer, world)
    assert found['experts'] == pytest.approx(scale.expert_bytes(one_layer, SETTINGS['block_size'], copies), rel=0.03)


@pytest.mark.slow
@needs_namespace
def test_a_pipelines_traffic_is_what_the_kernel_counts(small):
    """Of runs/pipeline.py, by its 3rd to 12th iteration."""
    totals = []
    for steps in (2, 12):
        script = f'runs/pipeline.py --dataset=abc --device=cpu --max_iters={steps} --out_dir=out-{steps}'
        printed = in_a_namespace(torchrun(2, script) + ' && cat /proc/net/dev', cwd=small)
        totals.append(int(re.search(r'lo:\s*(?:\d+\s+){8}(\d+)', printed)[1]))
    gpt = scale.without_memory(block_size=64, vocab_size=65, n_layer=8, n_head=4, n_embd=64)
    want = 16 * scale.pipeline_bytes(gpt, 4 * 64, P=2)
    assert (totals[1] - totals[0]) / 10 / 2 == pytest.approx(want, rel=0.03)


def test_an_expert_rank_holds_its_share():
    whole, half = (scale.without_memory(**SETTINGS | {'n_routed_experts': E}) for E in (8, 4))
    routers = sum(moe.gate.weight.numel() for moe in half.moe_layers())
    want = half.get_num_params(non_embedding=False) + routers  # each rank routes among all
    assert sum(scale.local_sizes(whole, 2, Layout(ep=2))) == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize('dense', [False, True])
def test_activations_are_those_of_a_real_block(dense):
    """And grow with the sequence as memory does that no two tokens share."""
    config = GPTConfig(**TINY | {'block_size': 256, 'n_embd': 128})
    assert scale.saved_bytes(config, dense, fake=False) == scale.saved_bytes(config, dense)
    longer = scale.saved_bytes(GPTConfig(**TINY | {'block_size': 512, 'n_embd': 128}), dense)
    assert longer == pytest.approx(2 * scale.saved_bytes(config, dense), rel=0.02)
    # at least the residual stream, q, k, v and the attention's output, and what the experts or the FFN multiply with
    width = config.num_experts_per_tok * config.moe_intermediate_size if not dense else config.intermediate_size
    assert scale.saved_bytes(config, dense) > 256 * (4 * 128 + 4 * 2 * 128 + 3 * 2 * width)


def test_the_main_runs_peak_is_near_that_of_torchs_allocator():
    table = (ROOT / 'docs/gpu.md').read_text()
    measured = float(re.search(r'\| 9\.0 \| eager \|.*\| ([\d.]+) \| [\d.]+ \|', table)[1])
    formula = scale.memory(scale.MODELS['main run'].gpt, 1, Layout(), 12, recompute=False) / 2**30
    assert formula == pytest.approx(measured, rel=0.1)
    assert f'the formulas give {formula:.1f} GiB' in (ROOT / 'docs/scale.md').read_text()


@pytest.mark.parametrize('P', [2, 4, 8])
def test_simulated_bubbles_are_the_papers(P):
    """Exactly where F = I = W, for any number of micro-batches; with other times 1F1B's still, the others' nearly."""
    for M in (2 * P, 2 * P + 3, 5 * P):
        for times in ((1, 1, 1), (1, 1.2, 0.8)):
            for schedule, formula in scale.BUBBLES.items():
                each = [2 * t for t in times] if schedule == '1F1B' else times
                step, spans = scale.simulate(schedule, P, M, scale.constant(*each))
                bubble = step - 2 * M * sum(times)
                exact = times == (1, 1, 1) or schedule == '1F1B'
                assert bubble == pytest.approx(formula(P, *each), abs=1e-6 if exact else 0.25 * P), (schedule, M)
                if schedule == 'ZB-V' and exact:  # ranks never wait between their first and their last action
                    for rank in range(P):
                        mine = [(start, end) for r, *_, start, end in spans if r == rank]
                        assert max(end for _, end in mine) - min(start for start, _ in mine) == 2 * M * sum(times)


def test_a_simulated_step_keeps_the_order_of_stages():
    P, M, send = 4, 9, 0.3
    _, spans = scale.simulate('DualPipeV', P, M, scale.constant(1, 1.5, 0.5), send)
    at = {(kind, stage, m): (start, end) for _, kind, stage, m, start, end in spans}
    assert len([kind for kind, *_ in at if kind == 'F']) == 2 * P * M
    for stage in range(1, 2 * P):
        gap = min(at['F', stage, m][0] - at['F', stage - 1, m][1] for m in range(M))
        assert gap == pytest.approx(0 if stage == P else send)  # stages P - 1 and P lie on one rank


def test_the_plan_fits_and_links_matter(monkeypatch):
    model = scale.MODELS['Moonlight']
    plan = scale.choose(model, 8, pipelines=False)
    assert plan.bytes <= scale.MEMORY and 0.3 < plan.mfu < model.efficiency
    assert scale.choose(model, 1, pipelines=False) is None  # 16 bytes a parameter are 255 GB
    monkeypatch.setattr(scale, 'NVLINK', scale.NVLINK / 20)
    slower = scale.predict(model, 8, *plan[:3])
    assert slower.step > 1.5 * plan.step and slower.bytes == plan.bytes


def test_the_page_holds_the_tables_that_the_script_computes():
    text = (ROOT / 'docs/scale.md').read_text()
    assert scale.filled(text) == text
