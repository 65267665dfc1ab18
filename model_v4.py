"""
What DeepSeek added after V3, each idea with a switch that is off by default. With all of them off the model is
model.py's, number for number. A run chooses it by --architecture=model_v4, or by `architecture` in its config file.

Letters in the shape comments as in model.py.
"""

from dataclasses import dataclass

import model


@dataclass
class GPTConfig(model.GPTConfig):
    """model.py's fields, then those of the later ideas, named as in the released configs."""
    architecture: str = 'model_v4'

    def __post_init__(self):
        model.check_config(self, CHECKS)
        super().__post_init__()


CHECKS = [  # as in model.py
    ('architecture', lambda x, c: x == 'model_v4', "must be 'model_v4'"),
]


class Block(model.Block):
    pass


class MTP(model.MTP):
    pass


class GPT(model.GPT):
    config_class, block, module = GPTConfig, Block, MTP
