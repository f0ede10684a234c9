# SPDX-License-Identifier: LGPL-2.1-or-later
"""What scripts for Xen 4.4's Remus import: the package ``xen`` below, and how Python finds it."""
