"""
Break the code on purpose, one place at a time, and see that the quick suite notices.

    python tests/by_hand/mutants.py              # all, on two cores about 25 minutes
    python tests/by_hand/mutants.py 3 17 train   # these numbers, and the mutants of files with these names

Each mutant is (file, text, its replacement, test files). A mutant survives if its test files pass. A text that no
longer stands in the file exactly once is said too: the list must follow the code.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
MUTANTS = [
    # the model
    ('model.py', 'place = slice(pos, pos + x.size(1))', 'place = slice(0, x.size(1))', 'model'),
    ('model.py', 'pos.clamp(max=self.config.block_size - 1)', 'pos.clamp(max=self.config.block_size - 2)', 'decode'),
    ('model.py', 'gates = scores.gather(1, experts)', 'gates = biased.gather(1, experts)', 'model'),
    ('model.py', 'y = y * row_gates.to(y.dtype)', 'y = y', 'model'),
    ('model.py', 'x = module.combine(self.transformer.drop(self.transformer.wte(token)), h)',
     'x = module.combine(self.transformer.wte(token), h)', 'model train'),
    ('model.py', '| (labels[-1] == self.config.eos_token_id)', '', 'model'),
    ('model.py', 'share = valid / counts.unsqueeze(1)', 'share = valid / valid.sum(dim=1, keepdim=True)',
     'model train'),
    ('model.py', '(best & counted).sum(dim=2) / T', 'best.sum(dim=2) / T', 'model'),
    ('model.py', 'torch.sign(load.float().mean(dim=1, keepdim=True) - load)',
     'torch.sign(load - load.float().mean(dim=1, keepdim=True))', 'model'),
    ('model.py', 'terms = 2 * self.config.n_layer if residual else 1', 'terms = 1', 'model'),
    ('model.py', 'done |= token == stop_token', 'done |= token == -1', 'model sample'),
    ('model.py', "'weight_decay': 0.0}]", "'weight_decay': weight_decay}]", 'model optim train'),
    ('model.py', 'low, high = max(math.floor(low), 0)', 'low, high = 0', 'model convert'),
    ('model.py', 'strength = groups.topk(best, dim=-1).values.sum(dim=-1)',
     'strength = groups.topk(1, dim=-1).values.sum(dim=-1)', 'model convert'),
    ('model.py', 'f.flush()\n            os.fsync(f.fileno())\n\n    def remove', 'f.flush()\n\n    def remove',
     'train reliability'),
    ('model.py', 'os.replace(new, path)\n        sync_folder(', 'os.replace(new, path)\n        str(',
     'train reliability'),
    ('model.py', 'logits.topk(top_k, dim=-1).values[..., -1:]', 'logits.topk(top_k, dim=-1).values[..., :1]',
     'model sample'),
    # the loop
    ('train.py', 'if it > lr_decay_iters:', 'if it > 2 * lr_decay_iters:', 'train'),
    ('train.py', 'ratio = (it - warmup_iters)', 'ratio = it', 'train'),
    ('train.py', 'if iter_num >= mtp_late_from * max_iters', 'if iter_num >= mtp_late_from * lr_decay_iters',
     'train'),
    ('train.py', 'improved = val_loss < best_val_loss', 'improved = train_loss < best_val_loss', 'train'),
    ('train.py', "seen = loaded.get('micro_batches', iter_num * gradient_accumulation_steps)",
     'seen = iter_num * gradient_accumulation_steps', 'reliability'),
    ('train.py', 'label_counts = all_reduce(labels) / gradient_accumulation_steps', 'label_counts = None',
     'reliability'),
    ('train.py', 'label_counts = all_reduce(labels) / gradient_accumulation_steps',
     'label_counts = labels / accumulation', 'reliability'),
    ('train.py', 'model.set_requires_all_reduce(micro_step == accumulation - 1)',
     'model.set_requires_all_reduce(False)',
     'parallel'),
    ('train.py', 'model.require_backward_grad_sync = micro_step == accumulation - 1',
     'model.require_backward_grad_sync = micro_step == 0', 'train parallel two_files'),
    ('train.py', 'grad_clip if grad_clip > 0 else math.inf', 'math.inf', 'train'),
    ('train.py', 'raw_model.update_balance(load.masked_fill(bad, 0))', 'raw_model.update_balance(load)',
     'reliability'),
    ('train.py', "load = all_reduce(stats['load'])", "load = stats['load']", 'train parallel two_files'),
    ('train.py', 'in_a_row = skipped + bad, (in_a_row + 1) * bad', 'in_a_row = skipped + bad, in_a_row + bad',
     'reliability'),
    ('train.py', "targets = rows if mask is None else np.where(mask[places], rows, -1)", 'targets = rows',
     'reliability'),
    ('train.py', "scaler.load_state_dict(loaded['scaler'])", 'pass', 'two_files'),
    ('train.py', 'names = (\'ckpt\', \'ckpt_best\') if always_save_checkpoint else (\'ckpt_last\', \'ckpt\')',
     "names = ('ckpt', 'ckpt_best')", 'train reliability'),
    ('train.py', "os._exit(130)", "pass", 'train bad_input reliability'),
    ('train.py', "raw_model.eval()\n    out = {}", "out = {}", 'train'),
    # suspicion
    ('extras/guard.py', "need(size % size_of == 0 and", "need(", 'bad_input data'),
    ('extras/integrity.py', "raise Mistake(missing(path))", "pass", 'bad_input train reliability'),
    ('extras/guard.py', "if fault == 0:\n            return", "return", 'train bad_input'),
    ('extras/guard.py', "need(fault < 2,", "need(True,", 'reliability'),
    ('extras/folder.py', 'max(filter(os.path.lexists, paths), key=iteration)', 'next(filter(os.path.exists, paths))',
     'train reliability'),
    ('extras/folder.py', 'fcntl.flock(locks[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)', 'pass', 'reliability train'),
    ('extras/folder.py', 'os.rename(folder, old)', 'shutil.rmtree(folder)', 'train reliability'),
    ('extras/scripts.py', "config = checkpoint.get('config') or {}\n    guard.need(", "config = {}\n    guard.need(",
     'bad_input sample'),
    ('configurator.py', 'code = 130 if kind is KeyboardInterrupt else 1 if line is None else 2', 'code = 1',
     'configurator bad_input'),
    ('configurator.py', 'if type(value) is kind:', 'if True:', 'configurator'),
    # speed
    ('extras/experts.py', 'hidden = swiglu(hidden.masked_fill(~chosen.t().unsqueeze(-1), 0), limit)',
     'hidden = swiglu(hidden, limit)',
     'model decode'),
    ('extras/experts.py', 'return N <= (256 if on_gpu else 16) and E <= 2 * N * K', 'return False',
     'model decode fakegpu'),
    ('extras/decode.py', 'rest = (p_a - q_a).clamp(min=0)', 'rest = p_a', 'decode'),
    ('extras/decode.py', '(places < s.end.unsqueeze(1))', '(places <= s.end.unsqueeze(1))', 'decode sample'),
    ('extras/decode.py', 'stops.cumsum(dim=1) > stops.long()', 'stops.cumsum(dim=1) > 1', 'decode'),
    ('extras/decode.py', 'left := len(prompt) + max_new_tokens - len(row)) > 0',
     'left := len(prompt) + max_new_tokens - len(row)) > 1', 'decode sample'),
    ('extras/fp8.py', 'quantise(grad, tile, recipe.grad_dtype, two)',
     'quantise(grad, tile, torch.float8_e5m2, two)', 'fp8'),
    ('extras/fp8.py', 'return *gradient(grad * g),', 'return *gradient(grad),', 'fp8'),
    ('extras/optim.py', 'nesterov = torch._foreach_lerp(grads, momenta, self.MOMENTUM)', 'nesterov = momenta',
     'optim'),
    ('extras/optim.py', "alpha=-group['lr'] * 0.2 * math.sqrt(max(m, n))", "alpha=-group['lr'] * 0.2 * math.sqrt(m)",
     'optim'),
    # size
    ('extras/parallel.py', 'w.register_hook(lambda grad: grad / N)', 'pass', 'parallel'),
    ('extras/parallel.py', 'meshes.setdefault(p.grad.device_mesh, [])', "meshes.setdefault('', [])", 'parallel'),
    ('extras/dcp.py', 'sync_folder(folder)\n    except', 'pass\n    except', 'parallel reliability train'),
    ('extras/dcp.py', '[best_path, path] if best_path else [path]', '[path, best_path] if best_path else [path]',
     'parallel reliability train'),
    # GRPO
    ('grpo.py', 'ratio.clamp(1 - clip_low, 1 + clip_high)', 'ratio.clamp(1 - clip_high, 1 + clip_high)', 'grpo'),
    ('grpo.py', 'centred = centred.masked_fill(equal, 0.0)', 'pass', 'grpo'),
    ('grpo.py', 'targets = slice(len(prompt) - 1,', 'targets = slice(len(prompt),', 'grpo'),
    ('grpo.py', 'return delta.exp() - delta - 1', 'return -delta', 'grpo'),
    # Hugging Face's format, data
    ('extras/hf.py', "settings['first_k_dense_replace'] = config.n_layer", 'pass', 'convert'),
    ('extras/hf.py', "view.copy_(read(tensors, part))", "view.copy_(read(tensors, part).bfloat16())", 'convert'),
    ('data/dataset.py', "        remove(folder, ['train.bin'])\n", '', 'data'),
    ('data/dataset.py', "key=lambda name: name == 'train.bin'", "key=lambda name: name != 'train.bin'", 'data'),
    ('extras/integrity.py', 'crc32_of(path) == kept', 'True', 'data'),
    ('extras/output.py', 'ours = MARK.encode() in f.read()', 'ours = True', 'plot inside'),
    ('extras/output.py', "with open(unfinished, 'wb') as f:", "with open(target, 'wb') as f:", 'plot inside'),
    ('data/dataset.py', 'n = int(len(text) * 0.9)', 'n = int(len(text) * 0.8)', 'data'),
    ('data/dataset.py', '* len(prompt) + [1] * len(response)', '* (len(prompt) + 1) + [1] * (len(response) - 1)',
     'data grpo'),
]


def try_mutant(number, clone):
    """-> a line: what became of MUTANTS[number], in a copy of the project"""
    file, text, replacement, tests = MUTANTS[number]
    path = clone / file
    source = path.read_text()
    name = f'{number:2d} {file}: {" ".join(text.split())[:70]}'
    if source.count(text) != 1:
        return f'? {name}: the text stands there {source.count(text)} times'
    path.write_text(source.replace(text, replacement))
    files = [f'tests/test_{test}.py' for test in tests.split()]
    try:
        pytest = [sys.executable, '-m', 'pytest', '-x', '-n0', '-p', 'no:cacheprovider']
        done = subprocess.run([*pytest, *files], cwd=clone, env=os.environ | {'OMP_NUM_THREADS': '1'},
                              capture_output=True, text=True, timeout=1200)
        failed = re.findall(r'^(?:FAILED|ERROR) (\S+)', done.stdout, re.M)
        return f'killed {name}: {failed[0]}' if failed else f'SURVIVED {name} (exit code {done.returncode})'
    except subprocess.TimeoutExpired:
        return f'killed {name}: no end within 20 minutes'
    finally:
        path.write_text(source)


def main():
    chosen = [n for n, mutant in enumerate(MUTANTS)
              if not sys.argv[1:] or str(n) in sys.argv[1:] or Path(mutant[0]).stem in sys.argv[1:]]
    with tempfile.TemporaryDirectory() as folder:
        ignore = shutil.ignore_patterns('.venv', '.git', 'out', 'out-*', '__pycache__', '.pytest_cache')
        clones = [Path(shutil.copytree(ROOT, Path(folder, str(n)), ignore=ignore)) for n in range(2)]

        def work(numbers, clone):
            for number in numbers:
                print(try_mutant(number, clone), flush=True)

        with ThreadPoolExecutor(2) as pool:
            list(pool.map(work, (chosen[::2], chosen[1::2]), clones))


if __name__ == '__main__':
    main()
