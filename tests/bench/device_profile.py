"""What a GPU did during a run: each kernel and copy, how often, and how long, from JAX's own profiler."""

import collections
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax


class Work(NamedTuple):
    """Kernels or copies of one name: how many, and microseconds of all of them."""

    name: str
    times: int
    microseconds: float


class Profile(NamedTuple):
    """All work of a run, the longest first, and the microseconds from the first start to the last end."""

    work: list[Work]
    span: float

    @property
    def busy(self) -> float:
        """Microseconds during which something ran, where nothing ran at once."""
        return sum(each.microseconds for each in self.work)

    def copies_to_host(self) -> int:
        """Count the copies from device to host: each makes the host wait."""
        return sum(each.times for each in self.work if "dtoh" in each.name.lower() or "d2h" in each.name.lower())

    def show(self, steps: int, most: int = 14) -> None:
        """Print it, for each of `steps` steps."""
        print(f"  a step: {self.span / steps:,.1f} us, of them busy {self.busy / steps:,.1f}")
        for each in self.work[:most]:
            print(f"  {each.microseconds / steps:>10,.1f} us{each.times / steps:>8,.1f} x  {each.name[:90]}")


def profile(run: Callable[[], Any]) -> Profile:
    """Run it once under the profiler; it must have run before."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(run())
        (file,) = Path(folder).glob("**/*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(file))
        times, counts = collections.Counter(), collections.Counter()
        first, last = float("inf"), 0.0
        for plane in data.planes:
            if not plane.name.startswith("/device:GPU"):
                continue
            for line in plane.lines:
                if not line.name.startswith("Stream"):
                    continue
                for event in line.events:
                    times[event.name] += event.duration_ns / 1e3
                    counts[event.name] += 1
                    first, last = min(first, event.start_ns), max(last, event.start_ns + event.duration_ns)
    work = [Work(name, counts[name], spent) for name, spent in times.most_common()]
    return Profile(work, max(0.0, last - first) / 1e3)
