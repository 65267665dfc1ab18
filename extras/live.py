"""The weights of a model as extras/live.js reads them, which is model.py in JavaScript."""

import copy

from extras import guard

MOST_FP16 = 8_000_000  # bytes; above, the matrices are int8


# -----------------------------------------------------------------------------
# the weights

def rounded(model):
    """-> a copy of the model with the weights that the page holds, these as parts, and their bytes.

    Norms, biases, b and the routers are float32. Other matrices are float16, or, if this takes more than MOST_FP16
    bytes, int8 with a scale for each row.
    """
    model, parts, content = copy.deepcopy(model), [], bytearray()
    small = 2 * sum(p.numel() for p in model.parameters()) <= MOST_FP16
    state = model.state_dict()
    if model.config.tie_word_embeddings:
        del state['transformer.wte.weight']  # the head's
    for name, x in state.items():
        part = {'name': name, 'start': len(content), 'size': x.numel()}
        if x.dim() < 2 or name.endswith('.gate.weight'):
            part |= {'kind': 'float32'}
            content += x.numpy().astype('<f4').tobytes()
        elif small:
            half = x.half()
            guard.need(half.isfinite().all(), f'{name} holds weights beyond 65,504, the largest float16')
            part |= {'kind': 'float16'}
            content += half.numpy().astype('<f2').tobytes()
            x.copy_(half)
        else:
            scale = (x.abs().amax(dim=-1, keepdim=True) / 127).clamp(min=1e-30)
            steps = (x / scale).round()
            part |= {'kind': 'int8', 'rows': scale.numel()}
            content += scale.numpy().astype('<f4').tobytes() + steps.numpy().astype('i1').tobytes()
            x.copy_(steps * scale)
        content += bytes(-len(content) % 4)
        parts.append(part)
    return model, parts, bytes(content)
