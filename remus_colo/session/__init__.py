# SPDX-License-Identifier: LGPL-2.1-or-later
"""A protection as it runs: one session on the primary, one on the backup, each one event loop."""
