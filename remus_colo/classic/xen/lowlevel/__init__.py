# SPDX-License-Identifier: LGPL-2.1-or-later
"""``checkpoint`` and ``netlink`` are ours; ``xc`` and ``xs`` the distribution's."""

from remus_colo.classic import finder

finder.extend(__path__, __name__)
