"""Property tests judge results. A time limit on a busy machine judges the machine."""

from __future__ import annotations

try:
    from hypothesis import settings
except ModuleNotFoundError:  # the environment of `make test-train-distributed` has none
    pass
else:
    settings.register_profile("no deadline", deadline=None)
    settings.load_profile("no deadline")
