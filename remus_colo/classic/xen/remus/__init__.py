# SPDX-License-Identifier: LGPL-2.1-or-later
"""The ``xen.remus`` modules of Xen 4.4: thin faces of ``remus_colo``. See docs/classic.rst."""
