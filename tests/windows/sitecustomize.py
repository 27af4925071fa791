"""Take away from Python on Linux what Windows does not have, before anything else is imported.

Python imports this file by itself from a folder of PYTHONPATH, also in child processes; see
:func:`tests.windows.commands.environment`. It plays:

- signals: Ctrl-C, SIGTERM and SIGBREAK alone; ``os.kill`` ends a process at once; ``os.kill(pid,
  0)``, which sends Ctrl-C there, is reported as a fault;
- no fcntl, resource, pwd, grp, termios for this package; no fork, no links, no affinity;
  processes are spawned; a parent's number stays after its death;
- files that a process has open or mapped can't be replaced, moved or removed, nor can a folder of
  them; a folder is not replaced; ``os.fsync`` needs a file that is open for writing;
- names that Windows refuses, and paths of 260 characters;
- text is cp1252 where nothing else is asked for, and so is standard output, strictly;
- ``msvcrt.locking``, of regions, held by a handle.

It does not play: backslashes and drive letters, names without case, read-only files, scanners that
hold files, long paths allowed by the registry, the console, DLLs, wheels, NTFS.
"""

import builtins
import errno
import fcntl
import functools
import io
import locale
import multiprocessing
import multiprocessing.context
import multiprocessing.popen_spawn_posix
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import PurePosixPath

import psutil

NO_MODULES = {"fcntl", "resource", "pwd", "grp", "termios"}
NO_SIGNALS = (
    "SIGALRM SIGCONT SIGHUP SIGKILL SIGPIPE SIGQUIT SIGSTOP SIGTSTP SIGTTIN SIGTTOU SIGUSR1 SIGUSR2"
).split()
NO_FUNCTIONS = {
    os: "fork forkpty killpg getegid getgroups getpgid getpgrp setsid "
    "sched_getaffinity sched_setaffinity nice getloadavg mkfifo chown wait",
    signal: "alarm setitimer getitimer pthread_kill pthread_sigmask sigwait",
    time: "tzset",
}
OUR_CODE = ("olvae", "tests", "examples", "study", "scripts")

# Linux has no SIGBREAK: a number that it has for something else, and that Windows has for SIGBREAK.
SIGBREAK = 21
ALLOWED = {signal.SIGINT, signal.SIGILL, signal.SIGABRT, signal.SIGFPE, signal.SIGSEGV}
ALLOWED |= {signal.SIGTERM, SIGBREAK}
REFUSED = re.compile(r'[<>:"|?*\x00-\x1f]|[. ]$')
DEVICES = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)
IN_USE = "The process cannot access the file because it is being used by another process"


def caller() -> str:
    """The module of the function that called the caller of this one."""
    return str(sys._getframe(2).f_globals.get("__name__"))


def fault(text: str) -> None:
    os.write(2, f"WINDOWS: {text}\n".encode())


# Signals and processes.
_kill = os.kill


def kill(pid: int, number: int) -> None:
    if number == 0 and not caller().startswith("psutil"):
        fault(f"os.kill({pid}, 0) sends Ctrl-C")
        raise OSError(errno.EINVAL, "os.kill(pid, 0)")
    if number == 1:  # CTRL_BREAK_EVENT
        _kill(pid, SIGBREAK)
    else:
        _kill(pid, 9 if number else 0)


def end(process) -> None:
    process.send_signal(9)


_set_handler = signal.signal


def set_handler(number, handler):
    # SIGCHLD: torch's on Linux.
    if number not in ALLOWED and number != signal.SIGCHLD:
        raise ValueError(f"invalid signal value: {number}")
    return _set_handler(number, handler)


def play_processes() -> None:
    for name in NO_SIGNALS:
        delattr(signal, name)
    for module, names in NO_FUNCTIONS.items():
        for name in names.split():
            delattr(module, name)
    signal.SIGBREAK, signal.CTRL_C_EVENT, signal.CTRL_BREAK_EVENT = SIGBREAK, 0, 1
    signal.signal, os.kill = set_handler, kill
    signal.valid_signals = lambda: ALLOWED
    subprocess.Popen.kill = subprocess.Popen.terminate = end
    popen = multiprocessing.popen_spawn_posix.Popen
    popen.kill = popen.terminate = lambda self: self._send_signal(9)
    parent = os.getppid()
    os.getppid = lambda: parent

    # Where the package asks for fork on Linux, it gets what it has there.
    contexts = multiprocessing.context._concrete_contexts
    contexts["fork"] = contexts["forkserver"] = contexts["spawn"]
    multiprocessing.set_start_method("spawn", force=True)

    # Lightning's own signals.
    system = platform.system
    platform.system = lambda: "Windows" if caller().startswith("lightning") else system()


# Modules.
_import = builtins.__import__


def import_module(name, globals=None, locals=None, fromlist=(), level=0):
    importer = str((globals or {}).get("__name__"))
    ours = importer.split(".")[0] in OUR_CODE
    if name in NO_MODULES and ours:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    return _import(name, globals, locals, fromlist, level)


def locking(descriptor: int, mode: int, size: int) -> None:
    """Lock or free a region from the current position on; another handle gets EACCES."""
    import struct

    start = os.lseek(descriptor, 0, os.SEEK_CUR)
    kind = fcntl.F_UNLCK if mode == 0 else fcntl.F_WRLCK
    region = struct.pack("hhqqi4x", kind, os.SEEK_SET, start, size, 0)
    try:
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, region)
    except BlockingIOError:
        raise PermissionError(errno.EACCES, "Permission denied") from None


# Files.
def real(path, folder=-1) -> str:
    if isinstance(path, int):
        return ""
    path = os.fsdecode(path)
    if isinstance(folder, int) and folder >= 0:
        path = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), path)
    return os.path.join(os.path.realpath(os.path.dirname(path) or "."), os.path.basename(path))


def our_processes():
    yield "self"
    mark = f"PLAYS_WINDOWS={os.environ.get('PLAYS_WINDOWS')}".encode()
    for pid in os.listdir("/proc"):
        if pid.isdigit() and int(pid) != os.getpid():
            try:
                file = os.open(f"/proc/{pid}/environ", os.O_RDONLY)
                text = os.read(file, 1 << 20)
                os.close(file)
            except OSError:
                continue
            if mark in text.split(b"\0"):
                yield pid


def open_paths(pid: str):
    """Paths that a process has open or mapped."""
    try:
        for descriptor in os.listdir(f"/proc/{pid}/fd"):
            yield os.readlink(f"/proc/{pid}/fd/{descriptor}")
    except OSError:
        pass
    try:
        with open(f"/proc/{pid}/maps", "rb") as maps:
            lines = maps.read().decode(errors="surrogateescape").splitlines()
    except OSError:
        return
    for line in lines:
        words = line.split(maxsplit=5)
        if len(words) == 6:
            yield words[5]


def refuse_open(path: str) -> None:
    """Refuse to move or remove what any of our processes has open, or a folder that has it."""
    if path.startswith("/dev/"):  # shared memory, which Windows has no files for
        return
    for pid in our_processes():
        for other in open_paths(pid):
            if other == path or other.startswith(f"{path}/"):
                if os.environ.get("WINDOWS_LOG"):
                    fault(f"{path} is open in process {pid}")
                raise PermissionError(errno.EACCES, IN_USE, path)


def refuse_name(path: str) -> None:
    if path.startswith(("/dev/", "/proc/", "/sys/")):
        return
    for part in PurePosixPath(path).parts[1:]:
        if REFUSED.search(part) or DEVICES.fullmatch(part) or len(part) > 255:
            raise OSError(errno.EINVAL, "Invalid argument", path)
    if len(path) > 259:
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", path)


def on_open(path, mode, flags) -> None:
    if flags & os.O_CREAT and isinstance(path, str | bytes | os.PathLike):
        refuse_name(real(path))


def on_rename(source, target, source_folder, target_folder) -> None:
    old, new = real(source, source_folder), real(target, target_folder)
    refuse_name(new)
    refuse_open(old)
    refuse_open(new)
    if os.path.isdir(new):
        raise PermissionError(errno.EACCES, "Access is denied", new)


def on_link(*_) -> None:
    raise OSError(errno.EPERM, "A required privilege is not held by the client")


HOOKS = {
    "open": on_open,
    "os.mkdir": lambda path, mode, folder: refuse_name(real(path, folder)),
    "os.rename": on_rename,
    "os.remove": lambda path, folder: refuse_open(real(path, folder)),
    "os.symlink": on_link,
}


def hook(event, arguments) -> None:
    if event in HOOKS:
        HOOKS[event](*arguments)


_open = io.open


@functools.wraps(_open)
def open_text(
    file,
    mode="r",
    buffering=-1,
    encoding=None,
    errors=None,
    newline=None,
    closefd=True,
    opener=None,
):
    if "b" not in mode:
        encoding = "cp1252" if encoding in (None, "locale") else encoding
        # Lines end as there, also in files of UTF-8; read, each end is a line's.
        if newline is None and "r" not in mode:
            newline = "\r\n"
    return _open(file, mode, buffering, encoding, errors, newline, closefd, opener)


_fsync = os.fsync


def fsync(descriptor: int) -> None:
    if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
        raise OSError(errno.EBADF, "Bad file descriptor")
    _fsync(descriptor)


_rename = os.rename


def rename(source, target, **folders) -> None:
    if os.path.lexists(target):
        raise FileExistsError(errno.EEXIST, "File exists", os.fspath(target))
    _rename(source, target, **folders)


def play_files() -> None:
    os.fsync, os.rename = fsync, rename
    builtins.open = io.open = open_text
    shutil._use_fd_functions = False
    shutil.rmtree.avoids_symlink_attacks = False
    os.supports_dir_fd = set()
    locale.getpreferredencoding = lambda *_: "cp1252"
    locale.getencoding = lambda: "cp1252"
    sys.addaudithook(hook)


def play() -> None:
    memory = psutil.Process.memory_info
    psutil.Process.memory_info = lambda self: types.SimpleNamespace(peak_wset=memory(self).rss)
    # What needs the real modules, before they are gone.
    play_processes()
    msvcrt = types.ModuleType("msvcrt")
    msvcrt.locking, msvcrt.LK_UNLCK, msvcrt.LK_LOCK, msvcrt.LK_NBLCK = locking, 0, 1, 2
    sys.modules["msvcrt"] = msvcrt
    builtins.__import__ = import_module
    play_files()
    sys.stdout.reconfigure(encoding="cp1252", errors="strict")
    sys.stderr.reconfigure(encoding="cp1252", errors="backslashreplace")


if os.environ.get("PLAYS_WINDOWS"):
    play()
