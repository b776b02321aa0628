"""Units that the processes of a launch do together, each with a shard of the model; tables byte-equal to "local"."""

import os
from pathlib import Path

import pytest

import spawn
from pairs import some_pairs
from sepo import engines, processes, work
from sepo.data.tables import write_table
from sepo.engines import files
from sepo.errors import DoneElsewhere, UserError
from sepo.forward.scoring import Types
from sepo.models.saving import save_model
from sepo.stages import logps
from tiny_models import tiny_model, tiny_tokenizer
from toy_units import make_job, make_source, tables

HERE = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("groups")
    save_model(tiny_model("llama_tied", initializer_range=0.1), tiny_tokenizer(), folder / "model")
    write_table(folder / "pairs", some_pairs(20), 5)
    logps.logps_pass(str(folder / "model"), folder / "pairs", folder / "local", device="cpu", types=Types("float32"))
    return folder


def launches(place: Path, case: str) -> list[tuple[int, float]]:
    """Run a case; returns rank and share of the weights of each process that opened the model."""
    (place / "opened").unlink(missing_ok=True)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent / "src")])}
    done = spawn.run([str(HERE / "sharded_units.py"), place, case], env=environment | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    assert tables(place / case / "logps") == tables(place / "local")
    rows = [line.split() for line in (place / "opened").read_text().splitlines()]
    return [(int(rank), float(share)) for rank, share in rows]


@pytest.mark.slow
def test_two_processes_do_units_together_for_a_command_that_cannot(place):
    opened = launches(place, "alone")
    assert sorted(rank for rank, _ in opened) == [0, 1]
    assert all(share < 0.7 for _, share in opened)  # the LM head stays whole


@pytest.mark.nightly
def test_a_command_in_a_launch_does_its_units_with_all_processes(place):
    assert sorted(rank for rank, _ in launches(place, "launch")) == [0, 1]


@pytest.mark.nightly
def test_when_a_process_of_a_group_dies_another_group_does_the_unit(place):
    assert sorted(rank for rank, _ in launches(place, "killed")) == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        ("ray@2", "only files does a unit in several processes"),
        ("local@2", "only files does a unit in several processes"),
        ("files@0", "expected a number of processes after the @"),
        ("files@two:x", "expected a number of processes after the @"),
        ("file@2", "did you mean 'files'"),
    ],
)
def test_engines_without_groups_and_wrong_numbers_are_refused_in_one_line(engine, message):
    with pytest.raises(UserError, match=message):
        engines.check_engine(engine)
    engines.check_engine("files@4")
    engines.check_engine("files@4:some/folder")
    with pytest.raises(UserError, match="leave @4 out"), engines.use("files@4", Path("x")):
        pass


def test_one_process_waits_for_a_group_and_leaves_its_units(place, tmp_path, monkeypatch, capsys):
    """Units of kinds that need no group are done all the same."""

    class Stop(Exception):
        pass

    def stop(seconds):
        raise Stop

    monkeypatch.setattr(files.time, "sleep", stop)
    with engines.use("files@2", tmp_path / "out", passes=True), pytest.raises(Stop):
        logps.logps_pass(str(place / "model"), place / "pairs", tmp_path / "out" / "logps", device="cpu")
    assert (
        "waiting for units of workers of 2 processes (torchrun --standalone --nproc-per-node 2 -m sepo work"
        in capsys.readouterr().err
    )
    assert not list((tmp_path / "out").glob(".units/*/claims/*"))
    with pytest.raises(Stop):
        files.serve(tmp_path / "out", 60, "cpu")
    assert not list((tmp_path / "out").glob(".units/*/claims/*"))
    monkeypatch.undo()
    with engines.use("files@2", tmp_path / "toy", passes=True):
        assert len(work.do(make_job(make_source(tmp_path / "source"), tmp_path / "toy"))) == 6


def test_what_the_others_do_while_the_main_process_works(monkeypatch):
    """Messages of `ask` come before the result; a command that another process finished ends all processes well."""
    asked, sent = [], []
    monkeypatch.setattr(processes, "size", lambda: 2)
    monkeypatch.setattr(processes, "_broadcast", lambda text: sent.append(text) if text else sent.pop(0))
    monkeypatch.setattr(processes, "helper", asked.append)

    def asking():
        processes.ask({"unit": 1})
        processes.ask({"unit": 2})
        return [3]

    monkeypatch.setattr(processes, "is_main", lambda: True)
    assert processes.on_main(asking) == [3]
    monkeypatch.setattr(processes, "is_main", lambda: False)
    assert processes.on_main(asking) == [3]
    assert asked == [{"unit": 1}, {"unit": 2}]

    def elsewhere():
        raise DoneElsewhere("finished")

    for main_process in (True, False):
        monkeypatch.setattr(processes, "is_main", lambda here=main_process: here)
        with pytest.raises(DoneElsewhere, match="finished"):
            processes.on_main(elsewhere)
