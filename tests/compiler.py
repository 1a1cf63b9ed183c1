"""A mark for tests that need a C++ compiler."""

import shutil

import pytest

compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
