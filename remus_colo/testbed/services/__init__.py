# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the guest runs: its init, its services' configurations, and the C source of its small services."""
