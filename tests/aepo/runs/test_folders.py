"""Where a run's files lie: one owner, full disks, other users' files, names of any length, two file systems."""

import collections
import errno
import json
import math
import os
import pathlib
import stat
import subprocess
import sys
import tempfile
import threading

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from aepo import checkpoint, cli, console, files, kernels, policy, tasks
from aepo.config import RunConfig
from aepo.console import emit_table, results_only
from aepo.data import staging, transitions
from aepo.data.transitions import cache_folder, load_transitions
from aepo.errors import BusyError, ConfigError, DataError, ResourceError, from_machine, lacks_space
from aepo.names import MAX_BYTES, bounded
from aepo.presets import preset
from aepo.runs import evaluation, run, rundir, spool
from aepo.runs.stage_store import StageStore
from tune import sweep, trainable
from tune.plan import RUN_FOLDERS, write_manifest
from tune.runs_table import write_rows
from tune.spec import Resources

CPU = torch.device("cpu")
FULL = OSError(errno.ENOSPC, "No space left on device")
TINY = ["--preset", "iql-smoke", "--set", *(f"{name}.steps=20" for name in ("critic", "actor"))]


def execute(config, folder, **kwargs):
    return run.execute(config, folder, run.FolderStore(folder), device=CPU, **kwargs)


@pytest.fixture
def umask():
    """A function that sets the umask; it is given back."""
    before = os.umask(0)
    os.umask(before)
    yield os.umask
    os.umask(before)


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


# -- one owner ---------------------------------------------------------------------------------------------


def test_a_second_process_in_a_runs_folder_is_refused_before_it_touches_a_file(make_dataset, tiny_config, tmp_path):
    config, seen = tiny_config(make_dataset()), []

    def files():
        return {path.name: path.read_bytes() for path in tmp_path.joinpath("run").iterdir()}

    def intrude(progress):
        if (progress.stage, progress.step) == ("critic", 30):
            before = files()
            for how in (execute, lambda *args: run.advance(*args, run.FolderStore(args[1]), num_rounds=1, device=CPU)):
                with pytest.raises(BusyError, match=rf"is being trained already, by process {os.getpid()} on .*; wait"):
                    how(config, tmp_path / "run")
            seen.append(before == files())

    result = execute(config, tmp_path / "run", on_progress=intrude)
    assert seen == [True]
    rows = spool.read_spool(tmp_path / "run" / rundir.METRICS)[0]
    counts = collections.Counter((row["stage"], row["step"], *row["metrics"]) for row in rows)
    counts.pop(("energy", 60, *rows[-1]["metrics"]))  # what guidance costs, at the run's end
    assert (len(counts), max(counts.values())) == (180, 1)
    assert result.status == "finished"


def test_a_worker_that_waits_takes_the_result_of_the_one_before_it(make_dataset, tiny_config, tmp_path):
    config, second = tiny_config(make_dataset()), []
    waiting = threading.Thread(target=lambda: second.append(execute(config, tmp_path, wait_s=60.0)))

    def begin(progress):
        if (progress.stage, progress.step) == ("behavior", 30):
            waiting.start()

    first = execute(config, tmp_path, on_progress=begin)
    waiting.join()
    assert second == [first]


def test_a_killed_process_holds_nothing(tmp_path):
    code = "import fcntl, sys; file = open(sys.argv[1], 'a'); fcntl.flock(file, fcntl.LOCK_EX); print('held'); input()"
    words = [sys.executable, "-c", code, str(tmp_path / "lock")]
    child = subprocess.Popen(words, stdout=subprocess.PIPE, stdin=subprocess.PIPE)
    assert child.stdout.readline() == b"held\n"
    with (
        pytest.raises(BusyError, match="x already, by another process; y"),
        files.hold(tmp_path / "lock", what="x", advice="y"),
    ):
        pass
    child.kill()
    with child, files.hold(tmp_path / "lock", what="x", advice="y"):
        assert (tmp_path / "lock").read_text().startswith(f"process {os.getpid()} on ")


def test_train_says_in_one_line_who_holds_its_folder(make_dataset, tmp_path, capsys):
    argv = ["train", "--dataset", make_dataset(), "--out", str(tmp_path / "runs"), *TINY, "--json"]
    assert cli.run(argv) == 0
    (folder,) = (tmp_path / "runs").iterdir()
    (folder / rundir.RESULT).unlink()
    capsys.readouterr()
    with files.hold(folder / rundir.LOCK, what="", advice=""):
        assert cli.run(argv) == ResourceError.exit_status
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith(f"error: {folder} is being trained already, by process {os.getpid()} on ")


def test_a_worker_leaves_a_run_to_another_that_does_not_end(make_dataset, tiny_config, tmp_path, monkeypatch):
    config = tiny_config(make_dataset())
    write_manifest(tmp_path, [config])
    place = tmp_path / RUN_FOLDERS / config.name
    place.mkdir(parents=True)
    monkeypatch.setattr(trainable, "WAIT_S", 0.0)
    values = {"run": config.name, "sweep": str(tmp_path), "cpus": 1.0, "gpus": 0.0, "checkpoint_s": 60.0, "stages": ""}
    with files.hold(place / rundir.LOCK, what="", advice=""), pytest.raises(BusyError):
        trainable._perform(values, run.execute)
    assert rundir.read_result(place) is None
    assert trainable._perform(values, run.execute).status == "finished"


def test_a_failed_run_is_repeated_and_is_not_failed_meanwhile(make_dataset, tiny_config, tmp_path, monkeypatch):
    config = tiny_config(make_dataset())
    with monkeypatch.context() as patch:
        patch.setattr("aepo.stages.fast.expectile_loss", lambda u_B, _: u_B.sum() * math.nan)
        with pytest.raises(Exception, match="critic/loss is nan"):
            execute(config, tmp_path)
    assert rundir.read_result(tmp_path).status == "failed"
    meanwhile = []
    execute(config, tmp_path, on_progress=lambda _: meanwhile.append(rundir.read_result(tmp_path)))
    assert set(map(str, meanwhile)) == {"None"}
    assert rundir.read_result(tmp_path).status == "finished"


# -- full disks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [rundir.CONFIG, rundir.KERNELS, checkpoint.FILE, rundir.POLICY, rundir.RESULT])
def test_a_disk_that_is_full_at_any_file_ends_the_run_and_the_same_again_goes_on(
    name, make_dataset, tiny_config, tmp_path, monkeypatch
):
    config = tiny_config(make_dataset(), method="iql")
    write = files.write_atomically

    def full(path, data):
        if path.name == name:
            raise FULL
        write(path, data)

    with monkeypatch.context() as patch:
        for module in (files, checkpoint, policy):
            patch.setattr(module, "write_atomically", full)
        with pytest.raises(ResourceError, match=r"no space left for .*; make room and start the run again") as caught:
            execute(config, tmp_path / "run", checkpoint_s=0.0)
    assert "--retry-failed" not in str(caught.value)
    whole = execute(config, tmp_path / "whole")
    again = execute(config, tmp_path / "run")
    assert (again.status, again.evaluations) == ("finished", whole.evaluations)
    spools = [spool.read_spool(tmp_path / folder / rundir.METRICS)[0] for folder in ("run", "whole")]
    assert [(row["stage"], row["step"]) for row in spools[0]] == [(row["stage"], row["step"]) for row in spools[1]]


def test_metrics_that_cannot_be_written_end_the_run_and_close_its_environments(
    make_dataset, tiny_config, tmp_path, monkeypatch
):
    closed = []
    monkeypatch.setattr("aepo.evaluate.Evaluator.close", lambda _: closed.append(1))
    with monkeypatch.context() as patch:
        for method in ("write", "close"):
            patch.setattr(spool.Spool, method, lambda *_: (_ for _ in ()).throw(FULL))
        with pytest.raises(ResourceError, match="no space left"):
            execute(tiny_config(make_dataset()), tmp_path)
    assert closed == [1]


def test_a_failure_that_cannot_be_written_down_is_said_all_the_same(
    make_dataset, tiny_config, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(run, "write_json", lambda *_: (_ for _ in ()).throw(FULL))
    monkeypatch.setattr(rundir, "write_json", lambda *_: (_ for _ in ()).throw(FULL))
    with pytest.raises(ResourceError, match="no space left"):
        execute(tiny_config(make_dataset()), tmp_path)
    assert "warning: the failure is not recorded in" in capsys.readouterr().err
    assert rundir.read_result(tmp_path) is None


def test_a_heat_map_that_cannot_be_drawn_costs_no_result(make_dataset, tiny_config, tmp_path, monkeypatch, capsys):
    settings = {"grid_beta": "1", "grid_guidance_scale": "2", "num_grid_episodes": 1}
    config = tiny_config(make_dataset(), **{f"evaluation__{key}": value for key, value in settings.items()})
    monkeypatch.setattr(run, "draw_grid", lambda *_, **__: (_ for _ in ()).throw(FULL))
    assert len(execute(config, tmp_path).grid) == 1
    assert "warning: no heat map" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "lacks"),
    [
        ("Error while serializing: I/O error: No space left on device (os error 28)", True),
        (
            "Can't decrement id ref count (file write failed: errno = 28, error message = 'No space left on device')",
            True,
        ),
        ("[Errno 122] Disk quota exceeded", True),
        ("[Errno 27] File too large", True),
        ("Permission denied (os error 13)", False),
        ("", False),
    ],
)
def test_want_of_space_is_known_whichever_library_says_it(text, lacks):
    assert lacks_space(RuntimeError(text)) == lacks
    assert lacks_space(OSError(errno.EDQUOT, text))


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (errno.ENOSPC, ResourceError),
        (errno.EFBIG, ResourceError),
        (errno.EACCES, ResourceError),
        (errno.EROFS, ResourceError),
        (errno.ENOTDIR, ConfigError),
        (errno.EEXIST, ConfigError),
        (errno.ENAMETOOLONG, ConfigError),
        (errno.ENOENT, ResourceError),
        (errno.EIO, ResourceError),
    ],
)
def test_what_the_system_refuses_is_a_known_error_of_every_command(code, kind, monkeypatch, capsys):
    def refuse(_):
        raise OSError(code, os.strerror(code), "a/b\nc")

    monkeypatch.setattr("aepo.commands.runs.Toy.run", refuse)
    assert cli.run(["toy"]) == kind.exit_status
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: a/b\\nc: ")
    assert from_machine(OSError(errno.EACCES, "of a socket")) is None


def test_a_command_that_needs_a_home_says_so(monkeypatch, capsys):
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda uid: (_ for _ in ()).throw(KeyError(f"uid not found: {uid}")))
    monkeypatch.setattr("aepo.commands.runs.Toy.run", lambda _: pathlib.Path.home())
    assert cli.run(["toy"]) == ResourceError.exit_status
    assert "error: this user has no home" in capsys.readouterr().err


# -- caches and other users --------------------------------------------------------------------------------


@pytest.mark.parametrize(("mask", "wanted"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600), (0o002, 0o664)])
def test_files_are_readable_as_the_umask_says(mask, wanted, umask, make_dataset, tiny_config, tmp_path):
    umask(mask)
    config = tiny_config(make_dataset(), method="iql")
    store = StageStore(tmp_path / "stages")
    execute(config, tmp_path / "run", stage_store=store)
    write_rows(tmp_path / "run", [])
    found = {path: mode(path) for name in ("cache", "run", "stages") for path in (tmp_path / name).iterdir()}
    assert len(found) > 8
    assert {path: bits for path, bits in found.items() if bits != wanted} == {}


def test_a_library_that_writes_files_for_their_owner_alone_leaves_them_as_the_umask_says(umask, tmp_path):
    umask(0o022)

    def write(path):
        with files.replacing(path) as temporary:
            temporary.unlink()
            os.close(os.open(temporary, os.O_CREAT | os.O_WRONLY, 0o600))

    write(tmp_path / "file")
    assert (mode(tmp_path / "file"), list(tmp_path.iterdir())) == (0o644, [tmp_path / "file"])


@pytest.mark.parametrize(
    "error", [PermissionError(13, "Permission denied"), transitions.SafetensorError("denied"), FULL]
)
def test_a_cache_that_cannot_be_written_is_one_warning(error, make_dataset, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(transitions, "save_file", lambda *_, **__: (_ for _ in ()).throw(error))
    assert len(load_transitions(make_dataset())) == 120
    assert capsys.readouterr().err.count("warning: no cache of decoded data in") == 1
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_cache_of_another_user_that_cannot_be_read_is_decoded_again(make_dataset, monkeypatch):
    dataset_id = make_dataset()
    first = load_transitions(dataset_id)

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(transitions, "safe_open", refuse)
    assert load_transitions(dataset_id).digest == first.digest


def test_a_table_of_processors_that_cannot_be_read_is_one_warning(monkeypatch, tmp_path, capsys):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    (tmp_path / "kernels.csv").touch()
    kernels._warn_once.cache_clear()
    monkeypatch.setattr(kernels, "read_text", refuse)
    with pytest.raises(PermissionError):
        kernels.read_own(tmp_path / "kernels.csv")
    monkeypatch.setattr(kernels, "read_table", lambda _: [])
    monkeypatch.setattr(kernels, "files", lambda _: tmp_path)
    monkeypatch.setattr(kernels, "read_own", refuse)
    monkeypatch.setattr(pathlib.Path, "read_text", lambda _: "")
    assert [kernels.choose(tmp_path / "kernels.csv") for _ in range(2)] == ["torch", "torch"]
    assert capsys.readouterr().err.count("is not heeded: Permission denied") == 1


@pytest.mark.parametrize(
    ("variables", "wanted"),
    [
        ({"AEPO_CACHE": "/a", "XDG_CACHE_HOME": "/x", "HOME": "/h"}, "/a"),
        ({"XDG_CACHE_HOME": "/x", "HOME": "/h"}, "/x/aepo"),
        ({"XDG_CACHE_HOME": "x/y", "HOME": "/h"}, "/h/.cache/aepo"),
        ({"XDG_CACHE_HOME": "", "HOME": "/h"}, "/h/.cache/aepo"),
        ({}, "/nonexistent/.cache/aepo"),
    ],
)
def test_the_cache_lies_where_the_environment_says(variables, wanted, monkeypatch):
    for name in ("AEPO_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if "HOME" not in variables:  # nor an entry among the users
        monkeypatch.setattr(pathlib.Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert str(cache_folder()) == wanted


def test_stages_that_may_only_be_read_are_taken_and_the_rest_is_trained(
    make_dataset, tiny_config, tmp_path, monkeypatch, capsys
):
    dataset_id = make_dataset()
    store = StageStore(tmp_path / "stages")
    execute(tiny_config(dataset_id, method="iql"), tmp_path / "one", stage_store=store)

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("aepo.runs.stage_store.open_lock", refuse)
    monkeypatch.setattr("aepo.runs.stage_store.write_atomically", refuse)
    capsys.readouterr()
    changed = tiny_config(dataset_id, method="iql", actor__learning_rate=0.01)
    result = execute(changed, tmp_path / "two", stage_store=store)
    assert (result.status, result.steps_reused) == ("finished", 60)
    assert capsys.readouterr().err.count("warning:") == 1
    monkeypatch.setattr(pathlib.Path, "read_bytes", refuse)
    assert StageStore(tmp_path / "stages").claim(next((tmp_path / "stages").glob("*.stage")).stem) is None


def test_a_lock_file_of_another_user_can_be_held(tmp_path, monkeypatch):
    (tmp_path / "lock").touch()
    open_ = pathlib.Path.open

    def refuse(path, how="r", *args):
        if how != "r":
            raise PermissionError(13, "Permission denied", str(path))
        return open_(path, how, *args)

    monkeypatch.setattr(pathlib.Path, "open", refuse)
    with (
        files.hold(tmp_path / "lock", what="x", advice="y"),
        pytest.raises(BusyError),
        files.hold(tmp_path / "lock", what="x", advice="y"),
    ):
        pass


def test_a_private_ray_lies_where_nobody_else_may_enter(tiny_config, monkeypatch):
    import ray

    seen = {}

    def init(**where):
        above = pathlib.Path(where["_temp_dir"]).parent
        seen.update(above=above, mode=mode(above), length=len(where["_temp_dir"]))
        raise RuntimeError("far enough")

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setenv("TMPDIR", "/tmp/" + 80 * "x")
    with pytest.raises(ResourceError, match="far enough"), sweep.on_ray(Resources(), [tiny_config()]):
        pass
    assert (seen["mode"], seen["above"].exists()) == (0o700, False)
    assert seen["length"] < 45  # sockets below it have 62 more, of 107


# -- names -------------------------------------------------------------------------------------------------


@given(
    st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"])), st.text(st.characters(codec="ascii"))
)
def test_a_derived_name_is_short_and_its_own(name, other):
    found = bounded(name)
    assert len(os.fsencode(found)) <= MAX_BYTES
    assert (found == name) == (len(os.fsencode(name)) <= MAX_BYTES)
    assert "/" not in found
    long = 3 * MAX_BYTES * "x"
    assume(name != other)
    assert bounded(long + name) != bounded(long + other)


def test_runs_of_every_task_are_called_as_they_were():
    for row in tasks.rows():
        config = preset("iql-smoke", row, 0)
        assert config.name == f"{row.task}-s0-{config.fingerprint}"


@given(st.integers(0, 240), st.sampled_from(["x", "_", "9"]))
def test_a_run_on_a_data_set_of_any_name_has_a_folder(length, letter):
    config = preset("iql-smoke", tasks.for_dataset(f"own/{letter * length}y-v0"), 0)
    assert isinstance(config, RunConfig)
    assert len(config.name) <= MAX_BYTES + 30
    assert config.name.endswith(f"-s0-{config.fingerprint}")


def test_a_data_set_of_the_longest_name_trains_and_can_be_staged(make_dataset, tmp_path, capsys):
    name = f"own/{'x' * 240}-v0"
    assert cli.run(["train", "--dataset", make_dataset(name), "--out", str(tmp_path / "runs"), *TINY]) == 0
    with staging.locked_staging(name, "downloading") as folder:
        assert len(folder.name) < 150
    assert cli.run(["train", "--dataset", f"own/{'x' * 300}-v0", "--out", str(tmp_path / "runs"), *TINY]) == 3
    capsys.readouterr()


# -- two file systems --------------------------------------------------------------------------------------


@pytest.fixture
def other_disk(tmp_path, monkeypatch):
    """A folder that nothing can be renamed into, or out of, as if it were on another file system."""
    disk, rename = tmp_path / "disk", pathlib.Path.rename
    disk.mkdir()

    def on_disk(path):
        return disk in pathlib.Path(path).parent.resolve().parents or pathlib.Path(path).parent.resolve() == disk

    def across(source, target):
        if on_disk(source) != on_disk(target):
            raise OSError(errno.EXDEV, "Invalid cross-device link", str(source))
        return rename(source, target)

    monkeypatch.setattr(pathlib.Path, "rename", across)
    return disk


def make(dataset_id):
    """Stand for what makes a data set within `staged`."""
    library = pathlib.Path(os.environ["MINARI_DATASETS_PATH"])
    (library / dataset_id / "data").mkdir(parents=True)
    (library / dataset_id / "data" / "main_data.hdf5").write_text("episodes")


@pytest.mark.parametrize("linked", ["local", "local/a-v0"])
def test_a_namespace_or_data_set_on_another_disk_is_written_there(linked, other_disk, tmp_path):
    place = tmp_path / "minari" / linked
    place.parent.mkdir(parents=True)
    place.symlink_to(other_disk / "big")
    for overwrite in (False, True):
        with staging.staged("local/a-v0", overwrite=overwrite):
            make("local/a-v0")
        assert (tmp_path / "minari/local/a-v0/data/main_data.hdf5").read_text() == "episodes"
    with staging.locked_staging("local/a-v0", "downloading") as folder:
        (folder / "data").mkdir()
        (folder / "data" / "new").touch()
        assert staging.publish(folder, "local/a-v0", overwrite=True)
    assert [path.name for path in (tmp_path / "minari/local/a-v0/data").iterdir()] == ["new"]
    assert place.is_symlink()
    assert [path for path in tmp_path.rglob(".*") if path.is_dir()] == []


def test_what_cannot_be_renamed_is_copied_whole(tmp_path, monkeypatch):
    """As where a mount point or a layer of a container lies between two folders beside each other."""
    rename = pathlib.Path.rename

    def across(source, target):
        if not source.name.startswith(".moving."):
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        return rename(source, target)

    (tmp_path / "a" / "data").mkdir(parents=True)
    (tmp_path / "a" / "data" / "file").write_text("all")
    monkeypatch.setattr(pathlib.Path, "rename", across)
    staging._move(tmp_path / "a", tmp_path / "b")
    assert [path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.rglob("*"))] == [
        "b", "b/data", "b/data/file",
    ]  # fmt: skip
    assert (tmp_path / "b" / "data" / "file").read_text() == "all"


def test_a_data_set_that_cannot_be_replaced_stays(tmp_path, monkeypatch):
    with staging.staged("local/a-v0"):
        make("local/a-v0")
    rename = pathlib.Path.rename

    def refuse(source, target):
        if source.name == "a-v0" and ".making-" in str(source):
            raise PermissionError(13, "Permission denied")
        return rename(source, target)

    monkeypatch.setattr(pathlib.Path, "rename", refuse)
    with pytest.raises(PermissionError), staging.staged("local/a-v0", overwrite=True):
        make("local/a-v0")
    assert (tmp_path / "minari/local/a-v0/data/main_data.hdf5").read_text() == "episodes"


@pytest.mark.parametrize(("error", "kind"), [(FULL, ResourceError), (PermissionError(13, "denied"), DataError)])
def test_a_place_that_cannot_be_written_is_refused_before_anything_is_collected(error, kind, monkeypatch, capsys):
    monkeypatch.setattr("aepo.data.pointmaze.record", lambda *_, **__: pytest.fail("collected"))
    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "TemporaryDirectory", lambda **_: (_ for _ in ()).throw(error))
        assert cli.run(["data", "collect", "maze2d-open", "--steps", "100"]) == kind.exit_status
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", lambda *_: (_ for _ in ()).throw(FULL))
        assert cli.run(["data", "collect", "maze2d-open", "--steps", "100"]) == ResourceError.exit_status
    err = capsys.readouterr().err
    assert "error: no space left for " in err
    assert "unexpected" not in err


def test_the_room_of_episodes_is_there_before_hdf5_writes_them(make_dataset, tmp_path):
    from minari import load_dataset

    dataset = load_dataset(make_dataset())
    wanted = sum(staging._num_bytes(episode) for episode in dataset.iterate_episodes())
    assert (tmp_path / "minari/tests/pendulum/random-v0/data/main_data.hdf5").stat().st_size < wanted


# -- what is printed ---------------------------------------------------------------------------------------


@given(st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs", "Zl", "Zp"])))
def test_names_are_printed_as_they_are(name):
    for print_, wanted in ((console.say, f"{name}\n"), (console.warn, f"warning: {name}\n")):
        with console.err.capture() as captured:
            print_(name)
        assert captured.get() == wanted


def test_a_folder_of_any_name_takes_a_run(make_dataset, tmp_path, monkeypatch, capsys):
    dataset_id = make_dataset()
    for name in ("with space", "100%", "a#b", "new\nline", "\N{GRINNING FACE}", "[/red]", ":smile:", "-dash"):
        argv = ["train", "--dataset", dataset_id, f"--out={tmp_path / 'x' / name}", *TINY]
        assert cli.run(argv) == 0, name
        assert len(list((tmp_path / "x" / name).iterdir())) == 1
        assert cli.run([*argv, "--json"]) == 0
    (tmp_path / "file").touch()
    assert cli.run(["train", "--dataset", dataset_id, "--out", str(tmp_path / "file"), *TINY]) == 2
    monkeypatch.chdir(tmp_path)
    assert cli.run(["train", "--dataset", dataset_id, "--stage-store", "file", *TINY]) == 2
    capsys.readouterr()
    with results_only():
        emit_table("a [/b] :smile:", [{"x": 1}])
    assert "a [/b] :smile:" in capsys.readouterr().out


def test_a_figure_that_cannot_be_written_is_refused_before_the_roll_outs(make_dataset, tmp_path, monkeypatch, capsys):
    argv = [
        "train",
        "--dataset",
        make_dataset(),
        "--out",
        str(tmp_path / "runs"),
        "--preset",
        "smoke",
        "--json",
        "--set",
    ]
    assert cli.run([*argv, *(f"{name}.steps=20" for name in ("behavior", "critic", "energy"))]) == 0
    folder = json.loads(capsys.readouterr().out)["folder"]
    monkeypatch.setattr(evaluation, "evaluate", lambda *_, **__: pytest.fail("rolled out"))
    assert cli.run(["evaluate", folder, "--figure", str(tmp_path)]) == 2
    assert "Is a directory" in capsys.readouterr().err
