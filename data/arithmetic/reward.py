"""The rules that score a response in data/arithmetic. grpo.py calls reward(); --reward_file=FILE names another's."""

import re


def reward(prompt, response, answer):
    """accuracy and format, each 0.0 to 1.0, of a response such as '<8+6=14,7+5+1=13,4+3+1=8>834\n'.

    response: the text after the prompt, its newline included if the model ended it. Only the answer is held against the
    rules: what stands between < and > is the model's own affair (R1 section 2.2.2).
    """
    match = re.fullmatch(r'<[^<>\n]*>(\d+)\n', response)
    return float(match is not None and match[1] == answer), float(match is not None)
