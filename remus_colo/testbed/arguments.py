# SPDX-License-Identifier: LGPL-2.1-or-later
"""Types of command line arguments, for argparse: what cannot be meant is refused before a bed is brought up for it."""

from __future__ import annotations

import argparse
import math


def finite(text: str) -> float:
    """A number, of seconds for one."""
    number = float(text)
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"{text} is no number that could be reached")
    return number


def not_negative(text: str) -> float:
    """A number from 0 on."""
    number = finite(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{text} is no number from 0 on")
    return number


def positive(text: str) -> float:
    """A number above 0."""
    number = not_negative(text)
    if number == 0:
        raise argparse.ArgumentTypeError("0 is too short")
    return number


def count(text: str) -> int:
    """A whole number from 0 on."""
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{number} is negative")
    return number


def some(text: str) -> int:
    """A whole number from 1 on."""
    number = count(text)
    if number == 0:
        raise argparse.ArgumentTypeError("0 is none")
    return number
