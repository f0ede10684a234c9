# SPDX-License-Identifier: LGPL-2.1-or-later
"""What must stop, hold and let go together with the guest: network output and disks."""
