# SPDX-License-Identifier: LGPL-2.1-or-later
"""``xen`` as scripts of Xen 4.4's time know it: its Remus and xend parts, beside the distribution's own bindings."""

from remus_colo.classic import finder

finder.extend(__path__, __name__)
