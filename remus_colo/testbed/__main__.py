# SPDX-License-Identifier: LGPL-2.1-or-later
import sys

from remus_colo.testbed.cli import main

sys.exit(main())
