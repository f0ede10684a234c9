# SPDX-License-Identifier: LGPL-2.1-or-later
"""``import xen`` with this work tree on PYTHONPATH; installed, remus_colo.pth does this, and this file is not there."""

from __future__ import annotations

import os

from remus_colo.classic import finder

__path__ = [os.path.join(finder.HERE, "xen")]
finder.extend(__path__, __name__)
