"""model_v4.py: with everything off it is model.py; each idea against a plain or foreign twin."""

import dataclasses

import pytest
import torch
from conftest import TINY, run_inside, torchrun, train

import model
import model_v4
from extras import architecture
from model import Mistake

V4 = '--architecture=model_v4'


@pytest.mark.parametrize('overrides', [{}, {'dropout': 0.1}, {'n_routed_experts': 0, 'tie_word_embeddings': False}])
def test_with_everything_off_it_is_model_py(overrides):
    def computed(module):
        torch.manual_seed(3)
        gpt = module.GPT(module.GPTConfig(**TINY | overrides))
        idx = torch.randint(61, (2, 32))
        loss = gpt(idx, idx)[1]
        loss.backward()
        state = gpt.state_dict()
        return loss, *state.values(), *(p.grad for p in gpt.parameters()), gpt.eval().generate(idx[:, :5], 10)

    assert model.GPT(model.GPTConfig(**TINY)).state_dict().keys() == \
        model_v4.GPT(model_v4.GPTConfig(**TINY)).state_dict().keys()
    for a, b in zip(computed(model), computed(model_v4), strict=True):
        torch.testing.assert_close(a, b, atol=0, rtol=0)


def test_every_field_is_checked_and_says_what_it_is_for():
    for field in dataclasses.fields(model_v4.GPTConfig):
        with pytest.raises(Mistake, match=f'{field.name} must be'):
            model_v4.GPTConfig(**{field.name: [0]})


def test_a_run_says_its_architecture_and_the_scripts_read_it_back(small):
    """By a flag or by a line of the config file; then sample.py, grpo.py and a resume know it from the checkpoint."""
    (small / 'v4.py').write_text("architecture = 'model_v4'\nmax_iters = 3\n")
    plain = train(small, '--max_iters=3')
    for how in (V4,), ('v4.py',):
        said = train(small, *how, '--max_iters=3')
        lines = [line for line in said.splitlines() if line.startswith('step ')]
        assert lines and lines == [line for line in plain.splitlines() if line.startswith('step ')]
    GPT, GPTConfig = architecture.of_file(small / 'out/ckpt.pt')
    assert (GPT, GPTConfig) == (model_v4.GPT, model_v4.GPTConfig)
    code, printed, said = run_inside('sample.py', '--out_dir=out', '--start=01', '--num_samples=1',
                                     '--max_new_tokens=5', '--device=cpu', cwd=small)
    assert (code, said) == (0, '') and '01' in printed
    assert 'iteration 3 of 6' in train(small, V4, '--init_from=resume')


def test_architectures_that_are_none(small):
    for name in ('model_v5', 'sample', '../model', ''):
        said = train(small, f'--architecture={name}', code=2)
        assert said.splitlines()[-1].startswith(f'architecture={name!r} must be one of the files model, model_v4')
    train(small, V4, '--max_iters=3')
    said = train(small, '--init_from=resume', code=2)
    assert "'architecture'" in said.splitlines()[-1]


def test_its_fields_are_flags_and_stand_in_the_help(small):
    code, printed, said = run_inside('train.py', V4, '--help', cwd=small)
    assert (code, said) == (0, '')
    for field in dataclasses.fields(model_v4.GPTConfig):
        assert f'  --{field.name}=' in printed


def test_two_ranks_are_as_one(small):
    one = train(small, V4)
    code, printed = torchrun(small, V4)
    assert code == 0, printed
    steps = [[line for line in said.splitlines() if line.startswith('step ')] for said in (one, printed)]
    assert steps[0] == steps[1] and len(steps[0]) == 3
