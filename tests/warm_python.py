"""An interpreter that starts at once: processes of the tests are forked from one that has imported the libraries.

Importing torch, Transformers, datasets and peft takes 3 to 10 s of CPU, more than most tests' work. `python()` is the
path of a program that takes Python's arguments (`script`, `-m module`, `-c code`, `-u`) and behaves as the interpreter
does: an environment, a folder, streams and an exit status of its own; its subprocesses are started alike. classp_hf
is not imported beforehand. With other variables of `READ_AT_IMPORT` or other options it is the real interpreter, and
so it is as rank 1 of several: forked ones alone would share the seed of hashes, and with it the order of sets. A
killed program takes its process with it. The process's parent and group are the server's, not the program's.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
import types
from collections.abc import Mapping
from pathlib import Path

import numpy as np

READ_AT_IMPORT = ("CUDA_", "DS_", "HF_", "HOME", "KMP_", "MKL_", "OMP_", "PYTHONHASHSEED", "PYTORCH_", "TORCHDYNAMO_")
READ_AT_IMPORT += ("TORCH_LOGS", "TRANSFORMERS_", "XDG_")
LIBRARIES = (
    "accelerate.commands.launch",
    "datasets",
    "peft",
    "sentence_transformers",
    "torch.distributed.run",
    "torch.optim",
    "transformers.integrations",
    "transformers.models.auto.modeling_auto",
    "transformers.models.bert.modeling_bert",
    "transformers.models.llama.modeling_llama",
    "transformers.trainer_seq2seq",
    "pandas",
)

PROGRAM = """#!{executable} -IS
import json, os, signal, socket, sys
words, rest = sys.argv[1:], [w for w in sys.argv[1:] if w != "-u"]
rank = os.environ.get("LOCAL_RANK")
changed = rank == "1" or {{k: v for k, v in os.environ.items() if k.startswith({prefixes!r})}} != {environment!r}
if changed or not rest or (rest[0][0] == "-" and rest[0] not in ("-m", "-c")) or rest[1:2] in (["pip"], ["venv"]):
    os.execv({executable!r}, [{executable!r}, *words])
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
socket.send_fds(server, [b"fds"], [0, 1, 2])
server.sendall(json.dumps([words, dict(os.environ), os.getcwd()]).encode())
server.shutdown(socket.SHUT_WR)
def answer():
    number = server.recv(8)
    if len(number) != 8:
        sys.exit("tests/warm_python.py: the process is lost")
    return int.from_bytes(number, "big")
pid = answer()
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda number, frame: os.kill(pid, number))
status = os.waitstatus_to_exitcode(answer())
if status < 0:
    if -status != signal.SIGKILL:
        signal.signal(-status, signal.SIG_DFL)
    os.kill(os.getpid(), -status)
sys.exit(status)
"""


def python(environment: Mapping[str, str] = os.environ) -> str:
    """Path of the program for processes with these variables of `READ_AT_IMPORT`, by default this process's own.

    Its server lives as long as this process. Elsewhere than on Linux the real interpreter.
    """
    read = {k: v for k, v in environment.items() if k.startswith(READ_AT_IMPORT)}
    return _program(tuple(sorted(read.items()))) if hasattr(os, "pidfd_open") else sys.executable


@functools.cache
def _program(read: tuple[tuple[str, str], ...]) -> str:
    folder = tempfile.TemporaryDirectory(prefix="warm_python_")
    atexit.register(folder.cleanup)
    address, program = str(Path(folder.name, "socket")), Path(folder.name, "python")
    filled = {"executable": sys.executable, "prefixes": READ_AT_IMPORT, "environment": dict(read), "address": address}
    program.write_text(PROGRAM.format(**filled))
    program.chmod(0o755)
    others = {k: v for k, v in os.environ.items() if not k.startswith(READ_AT_IMPORT)}
    command = [sys.executable, __file__, address, program]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, env={**others, **dict(read)})
    atexit.register(server.kill)
    while not Path(address).exists():
        assert server.poll() is None, "the server of tests/warm_python.py has ended"
        select.select([], [], [], 0.05)
    return str(program)


def serve(address: str) -> tuple[list[str], dict[str, str], str]:
    """Fork a process for every request; only in those this returns, with what was asked for."""
    for name in LIBRARIES:
        with contextlib.suppress(ImportError):  # of another version
            importlib.import_module(name)
    gc.freeze()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address + ".new")
    listener.listen(64)
    os.rename(address + ".new", address)
    while True:
        ready = select.select([listener, 0], [], [])[0]
        while _reap():
            pass
        if 0 in ready:  # the tests' process has ended
            os._exit(0)
        client = listener.accept()[0]
        if os.fork():
            client.close()
            continue
        listener.close()
        streams = socket.recv_fds(client, 3, 3)[1]
        request = client.makefile("rb").read()
        pid = os.fork()
        if pid:
            _watch(client, pid)
        client.close()
        for target, stream in enumerate(streams):
            os.dup2(stream, target)
            os.close(stream)
        return json.loads(request)


def _reap() -> bool:
    try:
        return os.waitpid(-1, os.WNOHANG)[0] != 0
    except ChildProcessError:
        return False


def _watch(client: socket.socket, pid: int) -> None:
    """Tell the program how its process ends; kill it if the program is killed first."""
    client.sendall(pid.to_bytes(8, "big"))
    process = os.pidfd_open(pid)
    gone = select.poll()
    gone.register(process, select.POLLIN)
    gone.register(client, 0)  # hung up
    if process not in [fd for fd, _ in gone.poll()]:
        os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    with contextlib.suppress(OSError):
        client.sendall(status.to_bytes(8, "big"))
    os._exit(0)


def run(words: list[str], environment: dict[str, str], folder: str) -> None:
    """What the interpreter does with its arguments."""
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    np.random.seed()
    own = environment.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:1] = filter(None, own)
    while words[0] == "-u":
        words = words[1:]
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(line_buffering=True)
    if words[0] == "-m":
        sys.path.insert(0, folder)
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    elif words[0] == "-c":
        sys.path.insert(0, "")
        sys.argv = ["-c", *words[2:]]
        sys.modules["__main__"] = main = types.ModuleType("__main__")
        exec(compile(words[1], "<string>", "exec", dont_inherit=True), vars(main))
    else:
        sys.path.insert(0, str(Path(words[0]).resolve().parent))
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    request = serve(sys.argv[1])
    sys.executable, status = sys.argv[2], 0
    try:
        run(*request)
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # freeing all the libraries made takes a second
