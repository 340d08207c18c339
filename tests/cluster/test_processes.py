"""Which processes are ours, and the end of them and of all that they started."""

import signal
import subprocess

from cluster import processes
from cluster.processes import Process
from tests.examples import wait_for


def start(*words, **kwargs):
    process = subprocess.Popen(words, start_new_session=True, **kwargs)
    return process, Process(process.pid, processes.start_ticks(process.pid))


def test_a_family_ends_with_its_orphans_and_those_in_sessions_of_their_own():
    script = "sleep 300 & setsid sleep 301 & wait"
    process, leader = start("sh", "-c", script)
    wait_for(lambda: len(processes.process_tree(leader)) == 3)
    members = processes.process_tree(leader)
    processes.end_process_tree(leader, signal.SIGTERM, timeout_s=1.0)
    assert not any(processes.is_alive(member) for member in members)
    process.wait()


def test_what_a_killed_leader_leaves_in_its_session_ends_too():
    process, leader = start("sh", "-c", "sleep 300 & wait")
    wait_for(lambda: len(processes.process_tree(leader)) == 2)
    (orphan,) = processes.process_tree(leader) - {leader}
    process.kill()
    process.wait()
    assert processes.is_alive(orphan)
    processes.end_process_tree(leader, signal.SIGTERM, timeout_s=1.0)
    assert not processes.is_alive(orphan)


def test_a_process_that_has_taken_a_number_over_is_never_signalled():
    process, now = start("sleep", "300")
    before = Process(now.pid, now.ticks - 1)  # what had the number when it was written down
    assert not processes.is_alive(before)
    assert processes.process_tree(before) == set()
    processes.end_process_tree(before, signal.SIGKILL, timeout_s=0.2)
    processes.send(before, signal.SIGKILL)
    assert process.poll() is None
    assert processes.is_alive(now)
    process.kill()
    process.wait()
