"""
Sharded checkpoints by torch.distributed.checkpoint (DCP), for train.py --checkpoint=dcp: each rank writes its shards
while the training goes on, and any number of ranks in any layout reads them.

    python -m extras.dcp OUT_DIR    # ckpt.dcp and ckpt_best.dcp there -> ckpt.pt and ckpt_best.pt beside them

A checkpoint is a folder, ckpt-ITERATION.dcp, or ckpt-ITERATION-N.dcp if that name is taken. The links ckpt.dcp and
ckpt_best.dcp point to two such folders.
"""

import contextlib
import itertools
import os
import pathlib
import pickle
import re
import shutil
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

import model as model_file
from extras import architecture
from extras.integrity import check_checkpoint, check_context, check_stored, check_tensors, crc32_of
from model import Mistake, PlainUnpickler, first_line, sync_folder

warnings.filterwarnings('ignore', 'torch.distributed is disabled')  # one process is one process
writer, saving, group = None, None, None  # the thread, what it does now, and the ranks' group for it


def save_checkpoint(checkpoint, path, best_path=None):
    """As model.save_checkpoint(), but each rank writes its shards while the training goes on; all ranks take part.

    The folder is written under another name, forced to the disk and renamed, and then the links point to it, best_path
    first: a kill at any instant leaves the last one whole. finish() waits for it.
    """
    global writer, saving, group
    finish()  # the checkpoint before
    new = os.path.join(os.path.dirname(path), 'ckpt.dcp.new')
    if writer is None:
        writer = ThreadPoolExecutor(1)
        group = dist.new_group(backend='gloo') if dist.is_initialized() else None
    if not dist.is_initialized() or dist.get_rank() == 0:
        remove_unlinked(os.path.dirname(path) or '.')  # a kill may have left them
    rest, weights, optimizer = dict(checkpoint), dict(checkpoint['model']), checkpoint['optimizer']
    if rest['model_args']['tie_word_embeddings']:
        del weights['lm_head.weight']
    tensors = {f'model.{name}': x for name, x in weights.items()}
    tensors |= {f'optimizer.{i}.{key}': x for i, state in optimizer['state'].items() for key, x in state.items()}
    del rest['model']
    rest['optimizer'] = {'param_groups': optimizer['param_groups']}
    written = dcp.async_save(tensors, storage_writer=dcp.FileSystemWriter(new), process_group=group)
    saving = writer.submit(publish, written, rest, new, [best_path, path] if best_path else [path])


def publish(written, rest, new, links):
    """What follows when the shards are written. Each rank computes the checksums of its files, rank 0 does the rest."""
    folder, n, rank = os.path.dirname(new), 1, dist.get_rank() if dist.is_initialized() else 0
    target = os.path.join(folder, f'ckpt-{rest["iter_num"]}.dcp')
    try:
        written.result()
        crc32 = {name: crc32_of(os.path.join(new, name)) for name in os.listdir(new)
                 if name.startswith(f'__{rank}_') or rank == 0 and not name.startswith('__')}
        if dist.is_initialized():
            parts = [None] * dist.get_world_size()
            dist.all_gather_object(parts, crc32, group)
            crc32 = {name: value for part in parts for name, value in part.items()}
        if rank > 0:
            return
        rest['crc32'] = crc32
        with open(os.path.join(new, 'rest.pt'), 'wb') as f:
            torch.save(rest, f)
            f.flush()
            os.fsync(f.fileno())
        sync_folder(new)
        while os.path.exists(target):
            n += 1
            target = os.path.join(folder, f'ckpt-{rest["iter_num"]}-{n}.dcp')
        os.rename(new, target)
        new = target
        for link in links:
            if os.path.isdir(link) and not os.path.islink(link):  # copied by a program that follows links
                os.rename(link, link + '.old')
            with contextlib.suppress(FileNotFoundError):
                os.remove(link + '.tmp')
            os.symlink(os.path.basename(target), link + '.tmp')
            os.replace(link + '.tmp', link)
        sync_folder(folder)
    except BaseException:
        if os.path.realpath(new) not in map(os.path.realpath, links):
            shutil.rmtree(new, ignore_errors=True)
        raise
    remove_unlinked(folder)


def remove_unlinked(folder):
    """Remove what was not written to its end, and the checkpoints to which no link in the folder points."""
    names = os.listdir(folder)
    linked = {os.path.realpath(os.path.join(folder, name)) for name in names
              if os.path.islink(os.path.join(folder, name))}
    for name in names:
        path = os.path.join(folder, name)
        if re.fullmatch(r'ckpt\.dcp\.new|ckpt-\d+(-\d+)?\.dcp', name) and os.path.realpath(path) not in linked:
            shutil.rmtree(path, ignore_errors=True)


def finish():
    """Wait until the last save() is on the disk; a Mistake if it cannot be."""
    global saving
    try:
        if saving:
            saving.result()
    except (dcp.api.CheckpointException, OSError, RuntimeError) as e:
        raise Mistake(f'the checkpoint could not be written, what was saved before is whole: {cause(e)}') from None
    finally:
        saving = None


def cause(e):
    """In words, of an error or of torch's collection of all ranks' errors."""
    return first_line(next(iter(e.failures.values()))[0] if isinstance(e, dcp.api.CheckpointException) else e)


def tensors_of(model):
    """Parameters, a tied one once, and the buffers that checkpoints hold, by name."""
    kept = model.state_dict().keys()
    return dict(model.named_parameters()) | {name: b for name, b in model.named_buffers() if name in kept}


class Reader(dcp.FileSystemReader):
    """torch's, but for the pickle of names and sizes: it holds these classes alone, and so runs nothing. Without
    BytesStorageMetadata no entry can be a pickle either, which torch would load. It is read once.
    """
    metadata = None
    PLAIN = {'torch.distributed.checkpoint.metadata': (
                 'Metadata', 'TensorStorageMetadata', 'TensorProperties', 'ChunkStorageMetadata', 'MetadataIndex',
                 'StorageMeta', '_MEM_FORMAT_ENCODING'),
             'torch.distributed.checkpoint.filesystem': ('_StorageInfo',), 'torch.serialization': ('_get_layout',)}

    class Unpickler(PlainUnpickler):
        def find_class(self, module, name):
            plain = module == 'torch' and (name == 'Size' or isinstance(getattr(torch, name, None), torch.dtype))
            if (module, name) in itertools.product(('pathlib', 'pathlib._local'), ('PosixPath', 'WindowsPath')):
                return pathlib.PurePath  # the other system's Path cannot be made here
            if plain or name in Reader.PLAIN.get(module, ()):
                return pickle._Unpickler.find_class(self, module, name)
            return super().find_class(module, name)

    def read_metadata(self, *args, **kwargs):
        if self.metadata is None:
            with open(os.path.join(self.path, '.metadata'), 'rb') as f:
                self.metadata = self.Unpickler(f).load()
        return self.metadata


def load_tensors(reader, tensors):
    """Into these tensors, by name; each rank reads what its shards need."""
    try:
        dcp.load(tensors, storage_reader=reader, no_dist=True)
    except (dcp.api.CheckpointException, Exception) as e:
        raise Mistake(f'{reader.path} is no checkpoint of this model: {cause(e)}') from None


def load_optimizer(state, params=None, reader=None):
    """What from_checkpoint() left of the optimizer's state dict -> the state dict, in shards like the params."""
    reader, tensors = reader or Reader(state['folder']), {}
    try:
        for name, about in reader.read_metadata().state_dict_metadata.items():
            if re.fullmatch(r'optimizer\.\d+\.\w+', name):
                i, dtype = int(name.split('.')[1]), about.properties.dtype
                if params and (i >= len(params) or about.size not in (params[i].shape, ())):  # (): a step
                    raise ValueError(name)
                tensors[name] = torch.zeros_like(params[i].detach(), dtype=dtype) if params and about.size else \
                    torch.zeros(about.size, dtype=dtype)
    except (AttributeError, TypeError, ValueError):
        raise Mistake(f'the optimizer in {state["folder"]} is damaged, or does not fit: resume with the --optimizer of '
                      'its run') from None
    load_tensors(reader, tensors)
    entries = {}
    for name, x in tensors.items():
        _, i, key = name.split('.')
        entries.setdefault(int(i), {})[key] = x
    return {'state': entries, 'param_groups': state['param_groups']}


def check_shards(reader, config):
    """ValueError if the tensors that .metadata names are not those of the config's model, or have more bytes than the
    folder.
    """
    sizes = {file.name: file.stat().st_size for file in os.scandir(reader.path) if file.is_file()}
    if '.metadata' not in sizes:  # a pipe would never answer
        raise ValueError('.metadata is no regular file')
    try:
        metadata = reader.read_metadata()
    except Exception as e:  # damaged, in many ways
        raise ValueError(f'.metadata: {first_line(e)}') from None
    if not {part.relative_path for part in metadata.storage_data.values()} <= set(sizes):
        raise ValueError('.metadata names something else than files of the folder')
    tensors = {name: torch.empty(about.size, dtype=about.properties.dtype, device='meta')
               for name, about in metadata.state_dict_metadata.items()}
    needed, size = sum(x.nbytes for x in tensors.values()), sum(sizes.values())
    if needed > size:
        raise ValueError(f'its tensors are {needed:,} bytes, and it has {size:,}')
    weights = {name.removeprefix('model.'): x for name, x in tensors.items() if name.startswith('model.')}
    if config.tie_word_embeddings:
        weights['lm_head.weight'] = weights['transformer.wte.weight']
    check_tensors(config, weights, size)


def from_checkpoint(path, device='cpu', assign=False, with_optimizer=True, **overrides):
    """As GPT.from_checkpoint(), for a sharded one. With assign, the tensors stay in its files: see load_optimizer()."""
    reader = Reader(path)
    try:
        check_stored(os.path.join(path, 'rest.pt'))
        rest = torch.load(os.path.join(path, 'rest.pt'), map_location='cpu', weights_only=True)
        GPT, GPTConfig = architecture.of_args(rest['model_args'])
        config = GPTConfig(**rest['model_args'])
        check_shards(reader, config)
        check_context(path, replace(config, **overrides))
        rest['optimizer']['folder'] = path
    except Exception as e:  # a damaged file, another program's
        raise Mistake(f'{path} is no checkpoint of this model: {type(e).__name__}: {first_line(e)}') from None
    with torch.device('meta') if assign else contextlib.nullcontext():
        model = GPT(replace(config, **overrides))
    if not assign:
        load_tensors(reader, {f'model.{name}': x.detach() for name, x in tensors_of(model.to(device)).items()})
        rest['optimizer'] = load_optimizer(rest['optimizer'], reader=reader) if with_optimizer else None
    return model, rest


def main():
    """Sharded checkpoints to whole ones beside them."""
    import configurator  # noqa: F401 (a mistake is one line and exit code 2)
    if {'--help', '-h'} & {*sys.argv}:
        return print(__doc__.strip())
    if len(sys.argv) != 2:
        raise Mistake('python -m extras.dcp OUT_DIR')
    found = [os.path.join(sys.argv[1], f'{name}.dcp') for name in ('ckpt', 'ckpt_best', 'ckpt_last')]
    if not any(map(os.path.exists, found)):
        raise Mistake(f'{sys.argv[1]} has no ckpt.dcp')
    for path in filter(os.path.exists, found):
        whole_path = path.removesuffix('.dcp') + '.pt'
        if os.path.exists(whole_path):
            raise Mistake(f'{whole_path} exists already: remove it or rename it')
        model, rest = from_checkpoint(path)
        check_checkpoint(path, model, rest)
        rest.pop('crc32', None)
        model_file.save_checkpoint(rest | {'model': model.state_dict()}, whole_path)
        print(f'wrote {whole_path}')
        del model, rest  # before the next one is read


if __name__ == '__main__':
    main()
