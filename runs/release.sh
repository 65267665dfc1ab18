#!/usr/bin/env bash
# A small model from nothing to a folder that opens in transformers, on two CPU cores, without a network.
# docs/huggingface.md has its time.
#
#   bash runs/release.sh                                        # writes out-release/ and hf-release/
#   bash runs/release.sh --max_iters=20 --lr_decay_iters=20     # each step once, in short; flags go to train.py
set -euo pipefail
cd "$(dirname "$0")/.."
trap 'exit 130' INT  # train.py ends a Ctrl-C with a checkpoint and exit code 0
fail() { echo "$1" >&2; exit 2; }
test ! -e hf-release || fail 'hf-release exists already: remove or rename it first'
case " $*" in *' --out_dir'*) fail 'leave out --out_dir: the model goes to out-release' ;; esac
python -c 'import tokenizers, transformers' 2> /dev/null || fail 'this needs transformers: pip install transformers'

# the text: the modules of this Python's standard library, without its tests (PSF license)
python - <<'PYTHON'
import shutil, sys, sysconfig
from pathlib import Path

library, text = Path(sysconfig.get_path('stdlib')), Path('build/stdlib')
shutil.rmtree(text, ignore_errors=True)
for path in sorted(library.rglob('*.py')):
    parts = path.relative_to(library).parts
    if parts[0].removesuffix('.py') in sys.stdlib_module_names and not {'test', 'tests', 'idle_test'} & {*parts}:
        (text / path.relative_to(library)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, text / path.relative_to(library))
PYTHON
python data/pydocs_char/prepare.py --input=build/stdlib --glob='*.py' --vocab=2048 --name=stdlib-bpe

python train.py config/release.py "$@"
python sample.py --out_dir=out-release --device=cpu --start='def ' --num_samples=1 --max_new_tokens=100
python convert.py export --out_dir=out-release --hf_dir=hf-release
cat hf-release/README.md
python - <<'PYTHON'
import torch
from transformers import AutoConfig, AutoTokenizer, DeepseekV3ForCausalLM

module = AutoConfig.from_pretrained('hf-release').num_hidden_layers  # the MTP module's number, as the card says
DeepseekV3ForCausalLM._keys_to_ignore_on_load_unexpected = [rf'model\.layers\.{module}\.']
model, tokenizer = (kind.from_pretrained('hf-release') for kind in (DeepseekV3ForCausalLM, AutoTokenizer))
ids = tokenizer('def ', return_tensors='pt').input_ids
torch.manual_seed(0)
print(tokenizer.decode(model.generate(ids, max_new_tokens=100, do_sample=True)[0]))
PYTHON
