"""The parent process around serving processes that load nothing: what it answers, when it starts another, how it ends.

The real engine's start, death and drain are in test_endpoint.py.
"""

import json
import pickle
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import openai
import pytest

from serve.launch import listen

# A parent: argv is the listening socket, the child's program and what the child is told.
_PARENT = """
import asyncio, socket, sys
from qpack import terminal
from qpack.errors import QpackError
from serve import supervisor
terminal.configure_logging(verbose=False, quiet=False)
supervisor.FIRST_PAUSE_SECONDS = 0.2
listener = socket.socket(fileno=int(sys.argv[1]))
async def main():
    await supervisor.Supervisor(
        [sys.executable, sys.argv[2]], sys.argv[3], listener, drain_timeout=100, on_ready=lambda: print("ready")
    ).run()
try:
    asyncio.run(main())
except QpackError as error:
    print(f"error: {error}", flush=True)
    sys.exit(1)
print("torch" in sys.modules or "vllm" in sys.modules, flush=True)
"""

# A child: it serves when the file `go` is there; a request can make it die, or last until it is drained.
_CHILD = """
import os, socket, sys, threading, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from serve.control import Parent
listener, control = (socket.socket(fileno=int(n)) for n in sys.argv[1:3])
parent = Parent(control)
folder = Path(parent.receive())
while not (folder / "go").exists():
    time.sleep(0.02)
if (folder / "shares").exists():
    from multiprocessing.shared_memory import SharedMemory
    shared = SharedMemory(create=True, size=1)
    (folder / "shares").write_text(shared.name)
if (folder / "broken").exists():
    parent.failed("the engine did not start: out of memory")
    sys.exit(1)
drained = threading.Event()

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/die":
            os._exit(3)
        if self.path == "/stream":
            (folder / "streams").touch()
            drained.wait()
            time.sleep(0.3)
        self.send_response(200)
        self.end_headers()
        self.wfile.write(str(os.getpid()).encode())
    def log_message(self, *args):
        pass

server = ThreadingHTTPServer(("", 0), Handler, bind_and_activate=False)
server.daemon_threads = False
server.socket = listener
server.server_activate()
def drain():
    drained.set()
    if not (folder / "stuck").exists():
        threading.Thread(target=server.shutdown).start()
parent.on_drain(drain)
parent.ready()
server.serve_forever()
server.server_close()
"""


class Supervised:
    """A parent whose child waits for the file ``go``."""

    def __init__(self, folder: Path, listener: socket.socket) -> None:
        self.folder = folder
        (folder / "child.py").write_text(_CHILD)
        number = listener.fileno()
        command = [sys.executable, "-u", "-c", _PARENT, str(number), str(folder / "child.py"), str(folder)]
        with (folder / "log").open("w") as log:
            self.process = subprocess.Popen(command, pass_fds=[number], stdout=log, stderr=subprocess.STDOUT)
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"

    @property
    def output(self) -> str:
        return (self.folder / "log").read_text()

    def go(self) -> None:
        (self.folder / "go").touch()

    def get(self, path: str = "/", data: bytes | None = None) -> tuple[int, str]:
        """Ask, and return status and body; (0, "") where there is no whole answer."""
        try:
            with urlopen(Request(self.url + path, data=data), timeout=20) as answer:
                return int(answer.status), answer.read().decode()
        except HTTPError as error:
            with error:
                assert error.headers["Retry-After"] == "5"
                return error.code, error.read().decode()
        except (URLError, OSError):
            return 0, ""

    def until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 30
        while not condition():
            assert time.monotonic() < deadline, self.output
            time.sleep(0.02)

    def serves(self) -> bool:
        return self.get()[0] == 200


@pytest.fixture
def supervised(tmp_path: Path) -> Iterator[Supervised]:
    with listen("127.0.0.1", 0) as listener:
        parent = Supervised(tmp_path, listener)
        yield parent
        with suppress(ProcessLookupError):
            parent.process.send_signal(signal.SIGKILL)
        parent.process.wait()


def test_nobody_is_refused_from_start_to_drain(supervised: Supervised) -> None:
    supervised.until(lambda: supervised.get()[0] == 503)
    status, body = supervised.get("/v1/completions", data=b"x" * 500_000)
    assert status == 503
    assert json.loads(body)["error"]["message"] == "the engine is loading, ask again"
    assert supervised.get("/health") == (503, '{"status": "loading"}')
    with openai.OpenAI(base_url=f"{supervised.url}/v1", api_key="any", max_retries=0) as client:
        with pytest.raises(openai.InternalServerError, match="the engine is loading, ask again") as told:
            client.completions.create(model="any", prompt="hello")
    assert (told.value.status_code, told.value.type) == (503, "ServiceUnavailableError")

    supervised.go()
    supervised.until(supervised.serves)
    assert supervised.output.splitlines().count("ready") == 1
    first = supervised.get()[1]

    # It dies: those in flight get nothing, the next ones 503, and then another one serves.
    (supervised.folder / "go").unlink()
    assert supervised.get("/die") == (0, "")
    supervised.until(lambda: supervised.get()[0] == 503)
    supervised.go()
    supervised.until(supervised.serves)
    assert supervised.get()[1] != first
    assert "the engine died (status 3); what it wrote last says why; starting it again in 0 s" in supervised.output

    # It drains: what is in flight ends well.
    program = f"from urllib.request import urlopen; print(urlopen('{supervised.url}/stream', timeout=60).status)"
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as client:
        supervised.until((supervised.folder / "streams").exists)
        supervised.process.send_signal(signal.SIGTERM)
        assert supervised.process.wait(60) == 0
        assert client.communicate()[0] == "200\n"
    assert supervised.output.splitlines()[-1] == "False", "the parent has imported torch or vLLM"


def test_what_never_starts_is_not_tried_again(supervised: Supervised) -> None:
    (supervised.folder / "broken").touch()
    supervised.go()
    assert supervised.process.wait(60) == 1
    assert supervised.output == "error: the engine did not start: out of memory\n"


def test_what_keeps_dying_is_given_up(supervised: Supervised) -> None:
    supervised.go()
    supervised.until(supervised.serves)
    (supervised.folder / "broken").touch()
    supervised.get("/die")
    assert supervised.process.wait(60) == 1
    assert supervised.output.splitlines()[-1].endswith("out of memory; that was 5 times in 10 minutes")


def test_a_second_signal_does_not_wait(supervised: Supervised) -> None:
    (supervised.folder / "stuck").touch()
    supervised.go()
    supervised.until(supervised.serves)
    child = int(supervised.get()[1])
    supervised.process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert supervised.process.poll() is None
    supervised.process.send_signal(signal.SIGINT)
    assert supervised.process.wait(60) == 0
    assert not Path(f"/proc/{child}").exists()


def test_what_is_killed_leaves_no_shared_memory(supervised: Supervised) -> None:
    """As that of vLLM's engine and its workers, which only multiprocessing's tracker removes."""
    for file in ("stuck", "shares"):
        (supervised.folder / file).touch()
    supervised.go()
    supervised.until(supervised.serves)
    shared = Path("/dev/shm") / (supervised.folder / "shares").read_text()
    assert shared.exists()
    supervised.process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    supervised.process.send_signal(signal.SIGINT)
    assert supervised.process.wait(10) == 0
    assert not shared.exists()


def test_a_signal_ends_a_load(supervised: Supervised) -> None:
    supervised.until(lambda: supervised.get()[0] == 503)
    supervised.process.send_signal(signal.SIGTERM)
    assert supervised.process.wait(60) == 0


def test_a_child_does_not_outlive_its_parent(supervised: Supervised) -> None:
    supervised.go()
    supervised.until(supervised.serves)
    child = int(supervised.get()[1])
    supervised.process.send_signal(signal.SIGKILL)
    supervised.until(lambda: not _alive(child))


def test_a_child_ends_though_its_parent_died_without_listening() -> None:
    """The stream then ends in an error."""
    program = (
        "import socket, sys, time\n"
        "from serve.control import Parent\n"
        "parent = Parent(socket.socket(fileno=int(sys.argv[1])))\n"
        "parent.receive()\n"
        "parent.ready()\n"
        "time.sleep(60)\n"
    )
    ours, theirs = socket.socketpair()
    with theirs, ours:
        child = subprocess.Popen([sys.executable, "-c", program, str(theirs.fileno())], pass_fds=[theirs.fileno()])
        theirs.close()
        ours.sendall(pickle.dumps("what to serve"))
        assert ours.recv(1, socket.MSG_PEEK), "it is ready, and nobody reads that"
    assert child.wait(30) == -signal.SIGTERM


def _alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()[0]
    except OSError:
        return False
