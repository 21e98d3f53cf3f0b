"""Threads follow affinity and the container's quota; a thread that waits is seen to."""

import os
import time

import pytest

from fastgen.core.threads import CpuShare, allowed_cpus, threads_per_process


def group(folder, text):
    (folder / "cpu.max").write_text(text)
    return folder


@pytest.fixture(autouse=True)
def sixteen_cpus(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)), raising=False)
    for name in ("OMP_NUM_THREADS", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    "text, cpus",
    [("max 100000\n", 16), ("250000 100000\n", 2), ("50000 100000", 1), ("9900000 100000", 16), ("odd", 16)],
)
def test_allowed_cpus_follow_affinity_and_quota(tmp_path, text, cpus):
    assert allowed_cpus(group(tmp_path, text)) == cpus


def test_allowed_cpus_of_the_first_version_of_control_groups(tmp_path):
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu/cpu.cfs_period_us").write_text("100000\n")
    (tmp_path / "cpu/cpu.cfs_quota_us").write_text("400000\n")
    assert allowed_cpus(tmp_path) == 4
    (tmp_path / "cpu/cpu.cfs_quota_us").write_text("-1\n")
    assert allowed_cpus(tmp_path) == 16


def test_threads_are_shared_by_the_processes_of_a_machine(tmp_path, monkeypatch):
    limited = group(tmp_path, "600000 100000")
    assert threads_per_process(0, 8, limited) == 6
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert threads_per_process(0, 8, limited) == 1
    assert threads_per_process(5, 8, limited) == 5, "a number that is set is kept"
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert threads_per_process(0, 3, limited) == 3


def test_cpu_share_tells_computing_from_waiting():
    share = CpuShare()
    time.sleep(0.1)
    waiting = share.since()
    end = time.thread_time() + 0.05
    while time.thread_time() < end:
        pass
    assert waiting < 0.3 and share.since() > waiting


def test_a_run_that_gets_little_of_the_cpu_is_warned_once(monkeypatch, capsys):
    clock = {"wall": 0.0, "cpu": 0.0}
    monkeypatch.setattr(time, "monotonic", lambda: clock["wall"])
    monkeypatch.setattr(time, "thread_time", lambda: clock["cpu"])
    share = CpuShare()

    def after(wall, cpu):
        clock["wall"] += wall
        clock["cpu"] += cpu
        return share.since(), capsys.readouterr().err

    assert after(20, 19) == (0.95, "")
    assert after(2, 0.5) == (0.25, ""), "too short to say"
    low, said = after(20, 8)
    assert low == 0.4 and said.startswith("warning: the CPU is shared") and "train.num_threads" in said
    assert after(20, 8) == (0.4, ""), "once"
