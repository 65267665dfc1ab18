"""The rules of data/countdown. grpo.py calls reward(); the text of a model is parsed here, and never executed."""

import re
from fractions import Fraction


def reward(prompt, response, answer):
    """accuracy and format, each 0.0 to 1.0, of a response such as '<3+8=11,11*2=22;3*8=24,24+2=26>3*8+2\\n'

    Right is each expression that uses every number of the prompt once and has exactly the target as its value; well
    formed is an expression of numbers, + - * / and parentheses. The answer is one solution of many, and is not needed.
    """
    match = re.fullmatch(r'<[^<>\n]*>([-+*/()0-9]{1,100})\n', response)
    numbers, target = prompt.removesuffix('=').split(':')
    try:
        value, used = evaluate(match[1])
    except (TypeError, ValueError):  # no response of the form, or no expression
        return 0.0, 0.0
    right = value == int(target) and sorted(used) == sorted(map(int, numbers.split(',')))
    return float(right), 1.0


def evaluate(expression):
    """'(1+2)*3' -> its value as a Fraction (None if it divides by zero), and the numbers in it; else ValueError"""
    tokens = re.findall(r'[1-9][0-9]*|[-+*/()]', expression)
    if ''.join(tokens) != expression:
        raise ValueError('a number that begins with 0, or another character')
    used = [int(token) for token in tokens if token.isdigit()]
    try:
        value = terms(tokens)
    except ZeroDivisionError:
        return None, used
    if tokens:
        raise ValueError('something follows the expression')
    return value, used


def terms(tokens):
    """Takes the longest sum or difference of products from the front of the tokens -> its value"""
    value = factors(tokens)
    while tokens and tokens[0] in '+-':
        sign = 1 if tokens.pop(0) == '+' else -1
        value += sign * factors(tokens)
    return value


def factors(tokens):
    value = operand(tokens)
    while tokens and tokens[0] in '*/':
        value = value * operand(tokens) if tokens.pop(0) == '*' else value / operand(tokens)
    return value


def operand(tokens):
    """A number, or an expression in parentheses."""
    token = tokens.pop(0) if tokens else ''
    if token == '(':
        value = terms(tokens)
        if not tokens or tokens.pop(0) != ')':
            raise ValueError('( without )')
        return value
    if not token.isdigit():
        raise ValueError('a number is missing')
    return Fraction(int(token))
