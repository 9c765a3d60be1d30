"""Strict settings for every test: no implicit dtype promotion, eight simulated devices, no GPU needed."""

import os
from pathlib import Path

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")


def pytest_addoption(parser):
    parser.addoption("--skipped", type=Path, help="write the names of skipped tests, one a line; run them with @FILE")


def pytest_terminal_summary(terminalreporter, config):
    file = config.getoption("--skipped")
    if file:
        names = dict.fromkeys(report.nodeid for report in terminalreporter.stats.get("skipped", []))
        file.write_text("".join(f"{name}\n" for name in names), encoding="utf-8")


@pytest.fixture(autouse=True, scope="module")
def compiled_programs_are_dropped():
    """Thousands of them in one process run out of memory maps, and the compiler dies of it."""
    yield
    jax.clear_caches()
