"""The example of sharded decoding, in one process and in two that talk to each other."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[1] / "examples" / "sharded_decode.py"


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize("processes", [1, 2])
def test_example_decodes_as_one_device_does(processes):
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    command = [sys.executable, EXAMPLE, f"--processes={processes}", f"--address=127.0.0.1:{free_port()}"]
    running = [
        subprocess.Popen([*command, f"--process={i}"], env=environment, text=True, stdout=-1, stderr=-1)
        for i in range(processes)
    ]
    try:
        outputs = [process.communicate(timeout=300) for process in running]
    finally:
        for process in running:
            process.kill()
    for i, (process, (out, err)) in enumerate(zip(running, outputs, strict=True)):
        assert process.returncode == 0, err
        assert f"process {i} of {processes}: 4 devices, each with 25% of the codes" in out
        assert [float(error) < 1e-5 for error in re.findall(r"difference to one device (\S+)", out)] == [True]
