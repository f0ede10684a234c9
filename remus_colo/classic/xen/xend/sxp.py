# SPDX-License-Identifier: LGPL-2.1-or-later
"""S-expressions: :mod:`remus_colo.sxp` under the name that it had in xend."""

from __future__ import annotations

from remus_colo.sxp import *  # noqa: F403
from remus_colo.sxp import __all__ as __all__
