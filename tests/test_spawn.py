"""A command in a fork ends, and shows its surroundings, as in an interpreter of its own."""

import os
import signal

import pytest

import spawn


def test_a_child_has_the_arguments_variables_folder_and_streams_that_it_was_given(tmp_path):
    code = "import os, sys; print(os.getpid(), sys.argv[1], os.environ['COLOUR'], os.getcwd()); sys.exit('why')"
    done = spawn.run(["-c", code, "word"], env={**os.environ, "COLOUR": "red"}, cwd=tmp_path)
    pid, *rest = done.stdout.split()
    assert int(pid) != os.getpid()
    assert rest == ["word", "red", str(tmp_path)]
    assert (done.returncode, done.stderr) == (1, "why\n")


def test_a_module_and_a_script_run_and_gradients_are_computed(tmp_path):
    """Threads of PyTorch that the parent had started would make a backward pass fail."""
    (tmp_path / "neighbour.py").write_text("name = 'beside'")
    (tmp_path / "script.py").write_text(
        "import atexit, torch, neighbour\natexit.register(print, 'the end')\n"
        "x = torch.ones(3, requires_grad=True)\nx.sum().backward()\n"
        "print(__name__, neighbour.name, x.grad.sum().item())\n"
    )
    assert spawn.run([tmp_path / "script.py"]).stdout == "__main__ beside 3.0\nthe end\n"
    done = spawn.run(["-m", "sepo", "run", "nowhere.yaml"], cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, -2), (signal.SIGTERM, -15), (signal.SIGKILL, -9)])
def test_a_signal_ends_a_child(number, code):
    child = spawn.start(["-c", "import time; time.sleep(60)"])
    assert child.poll() is None
    child.send_signal(number)
    assert child.wait(30) == code
