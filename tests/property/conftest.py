# SPDX-License-Identifier: LGPL-2.1-or-later
"""Hypothesis without the clock: a busy machine is no counter-example."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")
