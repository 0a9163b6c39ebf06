from __future__ import annotations

from running import data, fork  # noqa: F401 - fixtures
