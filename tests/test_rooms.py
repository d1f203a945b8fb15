"""Moved to tests/test_import_layers.py; this name runs its quick test until callers follow."""

from tests.test_import_layers import test_imports_point_downward  # noqa: F401
