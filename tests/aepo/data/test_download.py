import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from urllib.parse import unquote, urlsplit

import huggingface_hub
import minari
import numpy as np
import pytest
from huggingface_hub import constants

from aepo import cli, tasks
from aepo.data import download as downloading
from aepo.data import staging
from aepo.data.combine import combine
from aepo.data.download import download, leave_addresses
from aepo.errors import ConfigError, DataError, ResourceError

SHA = "0123456789abcdef0123456789abcdef01234567"
HUMAN, EXPERT = "D4RL/pen/human-v2", "D4RL/pen/expert-v2"
FILES = ("main_data.hdf5", "metadata.json")


class Hub(ThreadingHTTPServer):
    """As much of the Hugging Face hub as its client needs to list and fetch the data sets of one author.

    Like the real one it keeps large files elsewhere: here under another name of this machine.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = {}
        """Repository -> path -> content."""
        self.seen = []
        """(method, path, Range) of each request."""
        self.tokens = []
        """(path, Authorization) of each request."""
        self.end = None
        """Byte of each HDF5 file at which the connection breaks."""
        self.trickle = False
        """Go on at that byte, but slowly."""
        self.refuse = {}
        """End of a path -> HTTP status."""
        self.with_ranges = True

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def publish(self, dataset_id, /, **metadata):
        """Move the only local data set to the hub; `metadata` replaces what it says of itself."""
        root = Path(os.environ["MINARI_DATASETS_PATH"])
        repository, _, name = dataset_id.partition("/")
        files = self.files.setdefault(repository, {"README.md": b"about", ".gitattributes": b""})
        for path in (root / dataset_id / "data").iterdir():
            content = path.read_bytes()
            if metadata and path.suffix == ".json":
                content = json.dumps(json.loads(content) | metadata).encode()
            files[f"{name}/data/{path.name}"] = content
        namespace = json.loads(files.get("namespace_metadata.json", b'{"datasets": [], "namespaces": []}'))
        namespace["datasets"].append(dataset_id)
        namespace["namespaces"].append(f"{repository}/{name.rpartition('/')[0]}")
        files["namespace_metadata.json"] = json.dumps(namespace).encode()
        files[f"{name.rpartition('/')[0]}/namespace_metadata.json"] = b"{}"
        shutil.rmtree(root)

    def ranges(self):
        """Return what was asked for of large files."""
        return [asked for method, path, asked in self.seen if method == "GET" and path.startswith("/elsewhere/")]

    def handle_error(self, *_):
        """A client that went away is no news."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.answer(with_body=False)

    def do_GET(self):
        self.answer(with_body=True)

    def log_message(self, *_):
        pass

    def answer(self, *, with_body):
        hub, path = self.server, unquote(urlsplit(self.path).path)
        hub.seen.append((self.command, path, self.headers.get("Range")))
        hub.tokens.append((path, self.headers.get("Authorization")))
        status = next((status for end, status in hub.refuse.items() if path.endswith(end)), None)
        if status is not None:
            return self.send(status, b"no", {})
        if path == "/api/datasets":
            return self.send_json([{"id": f"farama-minari/{name}"} for name in hub.files])
        if match := re.fullmatch(r"/api/datasets/farama-minari/([^/]+)/tree/.*", path):
            return self.send_json([self.entry(*item) for item in hub.files[match[1]].items()])
        if match := re.fullmatch(r"/api/datasets/farama-minari/([^/]+)(/revision/main)?", path):
            if match[1] not in hub.files:
                return self.send(404, b"", {"X-Error-Code": "RepoNotFound"})
            siblings = [self.sibling(*item) for item in hub.files[match[1]].items()]
            return self.send_json({"id": f"farama-minari/{match[1]}", "sha": SHA, "siblings": siblings})
        if match := re.fullmatch(r"/(?:datasets/farama-minari|elsewhere)/([^/]+)/resolve/[^/]+/(.*)", path):
            content = hub.files[match[1]].get(match[2])
            if content is not None and path.endswith(".hdf5") and path.startswith("/datasets/"):
                other = f"http://localhost:{hub.server_port}{path.replace('/datasets/farama-minari', '/elsewhere')}"
                linked = {"X-Linked-Etag": f'"{digest(path, content)}"', "X-Linked-Size": len(content)}
                return self.send(302, b"", {"Location": other, "X-Repo-Commit": SHA, **linked})
            if content is not None:
                return self.send_file(match[2], content, with_body=with_body)
        return self.send(404, b"", {"X-Error-Code": "EntryNotFound"})

    def send_json(self, document):
        self.send(200, json.dumps(document).encode(), {"Content-Type": "application/json"})

    def send(self, status, body, headers):
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_file(self, name, content, *, with_body):
        hub, start = self.server, 0
        if hub.with_ranges and (match := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")):
            start = int(match[1])
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", len(content) - start)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("X-Repo-Commit", SHA)
        self.send_header("ETag", f'"{digest(name, content)}"')
        self.end_headers()
        if not with_body:
            return
        end = len(content) if hub.end is None or not name.endswith(".hdf5") else max(start, hub.end)
        self.wfile.write(content[start:end])
        for byte in range(end, len(content)):
            if not hub.trickle:
                self.close_connection = True
                return
            self.wfile.write(content[byte : byte + 1])
            time.sleep(0.02)

    @staticmethod
    def sibling(name, content):
        lfs = {"sha256": digest(name, content), "size": len(content), "pointerSize": 130}
        blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        own = {"rfilename": name, "size": len(content), "blobId": blob}
        return own | ({"lfs": lfs} if name.endswith(".hdf5") else {})

    @staticmethod
    def entry(name, content):
        return {"type": "file", "path": name, "size": len(content), "oid": digest(name, content)}


def digest(name, content):
    if name.endswith(".hdf5"):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def point_client_at(url, monkeypatch, tmp_path):
    """huggingface_hub reads its environment when it is imported; here it has been."""
    settings = {
        "ENDPOINT": url,
        "HUGGINGFACE_CO_URL_TEMPLATE": url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(tmp_path / "hf" / "hub"),
        "HF_TOKEN_PATH": str(tmp_path / "hf" / "token"),
        "HF_HUB_DISABLE_TELEMETRY": True,
        "HF_HUB_DISABLE_XET": True,
    }
    for name, value in settings.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(downloading, "WAIT_S", 0.01)
    monkeypatch.delenv("MINARI_REMOTE", raising=False)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with Hub() as server:
        point_client_at(server.url, monkeypatch, tmp_path)
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join()
        huggingface_hub.close_session()


@pytest.fixture
def root(tmp_path):
    """The local library."""
    return tmp_path / "minari"


def episodes(dataset_id):
    return list(minari.load_dataset(dataset_id).iterate_episodes())


def assert_same_episodes(got, wanted):
    assert len(got) == len(wanted)
    for one, other in zip(got, wanted, strict=True):
        for field in ("observations", "actions", "rewards", "terminations", "truncations"):
            a, b = getattr(one, field), getattr(other, field)
            np.testing.assert_array_equal(a, b)
            assert a.dtype == b.dtype


def test_importing_it_loads_neither_minari_nor_its_client():
    code = "import sys, aepo.data.download; print([m for m in sys.modules if m in sys.argv])"
    heavy = ["minari", "huggingface_hub", "gymnasium", "h5py"]
    done = subprocess.run([sys.executable, "-c", code, *heavy], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_downloaded_set_is_the_one_that_was_published(hub, root, make_dataset, capsys):
    make_dataset(HUMAN)
    original = episodes(HUMAN)
    hub.publish(HUMAN)
    (summary,) = download([HUMAN])
    assert_same_episodes(episodes(HUMAN), original)
    assert (summary.dataset, summary.path, summary.downloaded) == (HUMAN, str(root / HUMAN), True)
    assert (summary.num_episodes, summary.num_steps) == (3, 120)
    assert (summary.ref_min, summary.ref_max) == (-1200, -150)
    assert summary.num_bytes == sum(len(hub.files["D4RL"][f"pen/human-v2/data/{name}"]) for name in FILES)
    assert sorted(path.name for path in root.rglob("*") if path.is_file()) == sorted(FILES)
    assert list(minari.list_local_datasets()) == [HUMAN]
    out, err = capsys.readouterr()
    assert out == ""
    assert "D4RL/pen/human-v2: 120 steps" in err


def test_the_command_takes_tasks_and_ids_and_joins_what_minari_has_in_parts(hub, make_dataset, capsys):
    parts = ["mujoco/hopper/medium-v0", "mujoco/hopper/expert-v0"]
    for dataset_id in (HUMAN, *parts):
        make_dataset(dataset_id)
        hub.publish(dataset_id)
    assert cli.run(["data", "download", "pen-human-v1", "hopper-medium-expert-v2", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["dataset"] for row in rows] == [HUMAN, *parts, "local/minari/hopper-medium-expert-v0"]
    assert rows[-1]["num_steps"] == 240
    assert (rows[-1]["ref_min"], rows[-1]["ref_max"]) == (-20.272305, 3234.3)  # the row's
    assert cli.run(["data", "combine", "pen-human-v1"]) == 2
    assert "pen-human-v1 is one data set" in capsys.readouterr().err
    assert cli.run(["data", "download", "hopper-medium-replay-v2"]) == 2
    assert "has no data of source 'minari'" in capsys.readouterr().err
    assert cli.run(["data", "download"]) == 2


def test_it_gets_the_files_that_minari_gets(hub, root, make_dataset, monkeypatch, tmp_path):
    make_dataset(HUMAN)
    hub.publish(HUMAN)
    download([HUMAN])
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "other"))
    minari.download_dataset(HUMAN)
    for name in FILES:
        wanted = (tmp_path / "other" / HUMAN / "data" / name).read_bytes()
        assert (root / HUMAN / "data" / name).read_bytes() == wanted


def test_a_token_is_shown_to_the_hub_and_to_nobody_else(hub, make_dataset, tmp_path):
    make_dataset(HUMAN)
    hub.publish(HUMAN)
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "token").write_text("hf_secret")
    download([HUMAN])
    for path, token in hub.tokens:
        assert token == (None if path.startswith("/elsewhere/") else "Bearer hf_secret")


def test_several_come_at_once_in_the_order_asked_for(hub, make_dataset, monkeypatch):
    names = [EXPERT, "mujoco/hopper/medium-v0", HUMAN]
    for num_episodes, name in enumerate(names, 1):
        make_dataset(name, num_episodes=num_episodes)
        hub.publish(name)
    running, most = [], []
    one = downloading._download_one

    def watched(*args, **kwargs):
        running.append(args[0])
        time.sleep(0.1)
        most.append(len(running))
        summary = one(*args, **kwargs)
        running.remove(args[0])
        return summary

    monkeypatch.setattr(downloading, "_download_one", watched)
    summaries = download([*names, EXPERT], jobs=2)
    assert [summary.dataset for summary in summaries] == names
    assert [summary.num_episodes for summary in summaries] == [1, 2, 3]
    assert max(most) == 2
    assert [path for _, path, _ in hub.seen if path.startswith("/api")] == [
        "/api/datasets/farama-minari/D4RL",
        "/api/datasets/farama-minari/mujoco",
    ]


def test_an_interrupted_transfer_shows_no_data_set_and_goes_on_where_it_ended(hub, root, make_dataset):
    make_dataset(HUMAN)
    original = episodes(HUMAN)
    hub.publish(HUMAN)
    size = len(hub.files["D4RL"]["pen/human-v2/data/main_data.hdf5"])
    hub.end = size // 2
    with pytest.raises(DataError, match="the same command goes on") as caught:
        download([HUMAN])
    assert HUMAN in str(caught.value)
    assert minari.list_local_datasets() == {}
    assert not (root / HUMAN).exists()
    assert hub.ranges() == [None] + [f"bytes={size // 2}-"] * (downloading.TRIES - 1)
    hub.end = None
    hub.seen.clear()
    (summary,) = download([HUMAN])
    assert hub.ranges() == [f"bytes={size // 2}-"]
    assert summary.num_bytes == size - size // 2
    assert_same_episodes(episodes(HUMAN), original)
    assert [path.name for path in root.iterdir()] == ["D4RL"]


def test_a_connection_that_breaks_once_is_taken_up_again(hub, make_dataset, monkeypatch):
    make_dataset(HUMAN)
    hub.publish(HUMAN)
    size = len(hub.files["D4RL"]["pen/human-v2/data/main_data.hdf5"])
    hub.end, receive = size // 3, downloading._receive

    def receive_and_mend(*args, **kwargs):
        try:
            receive(*args, **kwargs)
        finally:
            if hub.ranges():
                hub.end = None

    monkeypatch.setattr(downloading, "_receive", receive_and_mend)
    (summary,) = download([HUMAN])
    assert summary.num_bytes == sum(len(hub.files["D4RL"][f"pen/human-v2/data/{name}"]) for name in FILES)
    assert hub.ranges() == [None, f"bytes={size // 3}-"]


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_process_shows_no_data_set_and_the_next_goes_on(sent, hub, root, make_dataset, tmp_path):
    make_dataset(HUMAN)
    original = episodes(HUMAN)
    hub.publish(HUMAN)
    size = len(hub.files["D4RL"]["pen/human-v2/data/main_data.hdf5"])
    hub.end, hub.trickle = size // 2, True
    interruptible = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"  # also under nohup
    code = f"{interruptible}\nfrom aepo.data.download import download; download([{HUMAN!r}])"
    environment = os.environ | {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    child = subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.PIPE, text=True)
    (part,) = wait_for(lambda: [p for p in root.rglob(".*/data/main*.part") if p.stat().st_size >= size // 2])
    child.send_signal(sent)
    error = child.communicate(timeout=60)[1]
    assert child.returncode != 0
    assert ("KeyboardInterrupt" in error) == (sent == signal.SIGINT)
    kept = part.stat().st_size
    assert size // 2 <= kept < size
    assert minari.list_local_datasets() == {}
    hub.end = None
    hub.seen.clear()
    download([HUMAN])
    assert hub.ranges() == [f"bytes={kept}-"]
    assert_same_episodes(episodes(HUMAN), original)


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.01)
    raise AssertionError("waited in vain")


def test_a_server_without_ranges_sends_it_anew(hub, make_dataset):
    make_dataset(HUMAN)
    original = episodes(HUMAN)
    hub.publish(HUMAN)
    hub.end = 5000
    with pytest.raises(DataError):
        download([HUMAN])
    hub.end, hub.with_ranges = None, False
    download([HUMAN])
    assert_same_episodes(episodes(HUMAN), original)


def test_a_half_of_an_older_version_is_not_completed_with_the_new_one(hub, root, make_dataset):
    make_dataset(HUMAN)
    hub.publish(HUMAN)
    hub.end = 5000
    with pytest.raises(DataError):
        download([HUMAN])
    hub.end = None
    make_dataset(HUMAN, num_episodes=5)
    newer = episodes(HUMAN)
    hub.publish(HUMAN)
    hub.seen.clear()
    download([HUMAN])
    assert hub.ranges() == [None]
    assert_same_episodes(episodes(HUMAN), newer)
    assert sorted(path.name for path in root.rglob("*") if path.is_file()) == sorted(FILES)


def test_damaged_bytes_are_refused_and_fetched_again(hub, root, make_dataset):
    make_dataset(HUMAN)
    hub.publish(HUMAN)
    name = "pen/human-v2/data/main_data.hdf5"
    hub.end = len(hub.files["D4RL"][name]) // 2
    with pytest.raises(DataError):
        download([HUMAN])
    hub.end = None
    (part,) = root.rglob(".*/data/main*.part")
    part.write_bytes(bytes(part.stat().st_size))
    with pytest.raises(DataError, match=r"main_data.hdf5: what arrived is not what the remote lists"):
        download([HUMAN])
    assert minari.list_local_datasets() == {}
    download([HUMAN])
    assert (root / HUMAN / "data" / "main_data.hdf5").read_bytes() == hub.files["D4RL"][name]


def test_one_that_fails_does_not_stop_the_others(hub, root, make_dataset):
    for name in (HUMAN, EXPERT):
        make_dataset(name)
        hub.publish(name)
    hub.refuse = {"pen/human-v2/data/main_data.hdf5": 503}
    with pytest.raises(DataError) as caught:
        download(["mujoco/hopper/medium-v0", HUMAN, "D4RL/pen/humans-v2", EXPERT])
    message = str(caught.value)
    assert list(minari.list_local_datasets()) == [EXPERT]
    assert "\n" not in message
    assert re.search(
        r"mujoco/hopper/medium-v0: hf://farama-minari at http://\S+ RepositoryNotFoundError: HTTP 404", message
    )
    assert re.search(r"D4RL/pen/human-v2: .*HTTP 503 from http://\S+main_data.hdf5", message)
    assert "D4RL/pen/humans-v2: it is not at hf://farama-minari; did you mean D4RL/pen/human-v2" in message
    assert "`minari download ID`" in message
    assert isinstance(caught.value.__cause__, ExceptionGroup)


def test_without_network_the_error_says_how_to_do_without(root, monkeypatch, tmp_path, capsys):
    point_client_at("http://127.0.0.1:9", monkeypatch, tmp_path)
    with pytest.raises(DataError) as caught:
        download([HUMAN])
    message = str(caught.value)
    assert "\n" not in message
    assert f"not downloaded: {HUMAN}: hf://farama-minari at http://127.0.0.1:9: ConnectError: " in message
    assert f"`minari download {HUMAN}`" in message
    assert f"~/.minari/datasets/{HUMAN}" in message
    assert f"here as {root / HUMAN}" in message
    assert capsys.readouterr().out == ""
    assert minari.list_local_datasets() == {}


def test_listed_addresses_lead_to_files_which_wget_puts_where_the_library_has_them(hub, make_dataset, tmp_path):
    make_dataset(HUMAN)
    hub.publish(HUMAN)
    said = leave_addresses([HUMAN, "other/x-v0"], tmp_path / "lists")
    (words,) = re.findall(r"`(wget [^`]*addresses-D4RL.txt)`", said)
    above = int(re.search(r"--cut-dirs=(\d+)", words)[1])
    lines = (tmp_path / "lists" / "addresses-D4RL.txt").read_text().split()
    for line in lines:  # as `--force-directories --no-host-directories --cut-dirs --directory-prefix` do
        path = tmp_path / "minari" / "D4RL" / Path(*urlsplit(line).path.strip("/").split("/")[above:])
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(urllib.request.urlopen(line, timeout=10).read())
    assert [episode.id for episode in episodes(HUMAN)] == [0, 1, 2]
    assert "other/resolve/main/x-v0/data/metadata.json" in (tmp_path / "lists" / "addresses-other.txt").read_text()


def test_a_benchmark_without_network_leaves_the_addresses(monkeypatch, tmp_path, capsys):
    point_client_at("http://127.0.0.1:9", monkeypatch, tmp_path)
    words = ["--task", "pen-human-v1", "hopper-medium-expert-v2", "--folder", str(tmp_path / "lists")]
    assert cli.run(["benchmark", "minari", "fetch", *words]) == 3
    assert "--input-file=addresses-D4RL.txt" in capsys.readouterr().err.replace("\n", " ")
    parts = tasks.find("hopper-medium-expert-v2", "minari").origin.split()
    for repository, wanted in (("D4RL", [HUMAN]), ("mujoco", parts)):
        lines = (tmp_path / "lists" / f"addresses-{repository}.txt").read_text()
        found = re.findall(r"main/(.*)/data/main_data.hdf5", lines)
        assert [f"{repository}/{name}" for name in found] == wanted


def test_a_server_that_never_answers_is_given_up(hub, monkeypatch):
    monkeypatch.setattr(Handler, "answer", lambda self, *, with_body: time.sleep(1))
    monkeypatch.setattr(downloading, "TIMEOUT_S", 0.2)
    with pytest.raises(DataError, match="ReadTimeout"):
        download([HUMAN])


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (
            {"dataset_id": EXPERT},
            r"pen/human-v2/data/metadata.json: dataset_id 'D4RL/pen/expert-v2', wanted 'D4RL/pen/human",
        ),
        ({"minari_version": "9.9.9"}, r"metadata.json: written by Minari 9.9.9, which the installed \S+ cannot read"),
    ],
)
def test_what_is_not_the_data_set_is_refused_before_its_bulk_is_fetched(metadata, message, hub, make_dataset):
    make_dataset(HUMAN)
    hub.publish(HUMAN, **metadata)
    with pytest.raises(DataError, match=message) as caught:
        download([HUMAN])
    assert "minari download" not in str(caught.value)
    assert hub.ranges() == []
    assert minari.list_local_datasets() == {}


def test_a_set_that_is_broken_on_the_remote_never_becomes_visible(hub, make_dataset):
    make_dataset(HUMAN)
    hub.publish(HUMAN)
    hub.files["D4RL"]["pen/human-v2/data/main_data.hdf5"] = b"no HDF5" * 100
    with pytest.raises(DataError, match="no complete data set"):
        download([HUMAN])
    assert minari.list_local_datasets() == {}


def test_a_remote_file_that_leads_out_of_the_folder_is_refused(hub, root, make_dataset):
    make_dataset(HUMAN)
    hub.publish(HUMAN)
    hub.files["D4RL"]["pen/human-v2/data/../../../../../out"] = b"evil"
    with pytest.raises(DataError, match="leads out of the data set's folder"):
        download([HUMAN])
    assert not list(root.parent.rglob("out"))


@pytest.mark.parametrize(
    "dataset_id",
    [
        "../../evil-v0",
        "/etc/evil-v0",
        "a/../evil-v0",
        "hf://evil/D4RL/pen-v0",
        "gcp://b/x-v0",
        "D4RL//pen-v0",
        "D4RL/pen",
        "",
    ],
)
def test_what_is_no_id_is_refused_before_anything_is_touched(dataset_id, hub, root):
    for call in (
        lambda: download([HUMAN, dataset_id]),
        lambda: combine(dataset_id, [HUMAN, EXPERT], description="", ref_min=None, ref_max=None),
        lambda: combine(HUMAN, [EXPERT, dataset_id], description="", ref_min=None, ref_max=None),
    ):
        with pytest.raises(DataError, match="is no Minari id"):
            call()
    assert hub.seen == []
    assert not root.exists()


def test_a_set_that_is_there_is_left_alone_unless_it_is_to_be_replaced(hub, root, make_dataset, capsys):
    make_dataset(HUMAN, num_episodes=4)
    hub.publish(HUMAN)
    make_dataset(HUMAN)
    mine = (root / HUMAN / "data" / "main_data.hdf5").read_bytes()
    (summary,) = download([HUMAN])
    assert (summary.downloaded, summary.num_bytes, summary.num_episodes) == (False, 0, 3)
    assert hub.seen == []
    assert "was left alone" in capsys.readouterr().err
    assert (root / HUMAN / "data" / "main_data.hdf5").read_bytes() == mine
    hub.end = 5000
    with pytest.raises(DataError):
        download([HUMAN], overwrite=True)
    assert (root / HUMAN / "data" / "main_data.hdf5").read_bytes() == mine
    hub.end = None
    (summary,) = download([HUMAN], overwrite=True)
    assert (summary.downloaded, summary.num_episodes) == (True, 4)
    assert [path.name for path in root.iterdir() if path.name.startswith(".")] == []


def test_what_minari_left_half_done_is_no_data_set(hub, root, make_dataset):
    make_dataset(HUMAN)
    half = (root / HUMAN / "data" / "main_data.hdf5").read_bytes()[:5000]
    hub.publish(HUMAN)
    (root / HUMAN / "data").mkdir(parents=True)
    (root / HUMAN / "data" / "metadata.json").write_bytes(hub.files["D4RL"]["pen/human-v2/data/metadata.json"])
    (root / HUMAN / "data" / "main_data.hdf5").write_bytes(half)
    with pytest.raises(DataError, match=r"is no complete data set .* --overwrite replaces it"):
        download([HUMAN])
    download([HUMAN], overwrite=True)
    assert len(episodes(HUMAN)) == 3


def test_two_processes_do_not_write_into_each_others_files(hub, make_dataset):
    make_dataset(HUMAN)
    hub.publish(HUMAN)
    with (
        staging.locked_staging(HUMAN, "downloading"),
        pytest.raises(DataError, match="another process is downloading it"),
    ):
        download([HUMAN])
    download([HUMAN])


def test_a_disk_that_is_too_small_is_said_before_it_is_full(hub, root, make_dataset, monkeypatch):
    make_dataset(HUMAN)
    hub.publish(HUMAN)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    place = re.escape(str(root / "D4RL/pen"))
    with pytest.raises(ResourceError, match=rf"{HUMAN}: .* MB free in {place}; make room") as caught:
        download([HUMAN])
    assert "minari download" not in str(caught.value)


def test_settings_that_cannot_be_are_refused(hub, monkeypatch):
    with pytest.raises(ConfigError, match="jobs >= 1"):
        download([HUMAN], jobs=0)
    monkeypatch.setenv("MINARI_REMOTE", "gcp://minari-remote")
    with pytest.raises(ConfigError, match="MINARI_REMOTE is 'gcp://minari-remote'"):
        download([HUMAN])
    monkeypatch.delenv("MINARI_REMOTE")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ResourceError, match=r'pip install "minari\[hf\]"'):
        download([HUMAN])
    assert hub.seen == []
