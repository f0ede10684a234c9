# SPDX-License-Identifier: LGPL-2.1-or-later
"""What Remus scripts use of xend, which Xen has no more: options, S-expressions, save and restore."""
