import time
from pathlib import Path

import pytest

from metrics.speed import peak_memory, size_on_disk, time_frames


def test_frame_time_is_the_median_after_the_warm_up():
    drawn = []

    def render(i):
        drawn.append(i)
        time.sleep(0.2 if i < 2 else 0.1 if i == 3 else 0.01)  # two slow first frames, one outlier

    measured = time_frames(render, frames=5, warm_up=2)
    assert drawn == list(range(7)) and measured.frames == 5
    assert 0.01 <= measured.fastest <= measured.median < 0.1 <= measured.slowest < 0.2
    assert measured.frames_per_second == pytest.approx(1 / measured.median)


def test_size_on_disk_counts_every_file_of_a_folder(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "a").write_bytes(b"x" * 10)
    (tmp_path / "deep" / "b").write_bytes(b"x" * 7)
    assert size_on_disk(tmp_path) == 17 and size_on_disk(tmp_path / "a") == 10
    with pytest.raises(FileNotFoundError):
        size_on_disk(tmp_path / "absent")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc to compare with")
def test_peak_memory_is_what_the_kernel_says_in_bytes():
    lines = Path("/proc/self/status").read_text().splitlines()
    kilobytes = int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
    assert peak_memory() == pytest.approx(kilobytes * 1024, rel=0.02)  # the two counters are updated in batches
