"""How a process of sandbox.py drops its privileges: another user, namespaces, limits, and few system calls.

Imported by a file's path, and importing nothing of the package.
"""

import ctypes
import errno
import os
import resource
import signal
from typing import Any

__all__ = ["confine"]

LIBRARY = "libseccomp.so.2"
NOBODY = 65534
PR_SET_PDEATHSIG, PR_SET_DUMPABLE = 1, 4
# CLONE_NEW: NS, CGROUP, UTS, IPC, USER, PID, NET
NAMESPACES = 0x00020000 | 0x02000000 | 0x04000000 | 0x08000000 | 0x10000000 | 0x20000000 | 0x40000000

ALLOW = 0x7FFF0000
REFUSE = 0x00050000 | errno.EPERM
EQUAL = 4  # libseccomp's comparison
# What computing takes, and using descriptors that are open. No file is opened, none is looked at: neither /proc nor
# the files of the user can be read, whatever namespaces the system has. clone3 and all else is refused.
ALLOWED = """
read readv write writev lseek close fstat dup poll ppoll select pselect6
mmap mprotect munmap mremap madvise brk futex membarrier rseq set_robust_list
rt_sigaction rt_sigprocmask rt_sigreturn sigaltstack restart_syscall
getrandom clock_gettime clock_getres clock_nanosleep nanosleep gettimeofday time times
getpid getppid gettid getuid geteuid getgid getegid
getrusage getrlimit sched_yield sched_getaffinity exit exit_group
""".split()
# Allowed with one value of an argument: name, the argument, the value.
RESTRICTED: list[tuple[str, int, int]] = [
    ("prlimit64", 2, 0),  # asking, not setting
    *(("ioctl", 1, request) for request in (0x5401, 0x5451)),  # TCGETS: isatty; FIOCLEX
    *(("fcntl", 1, command) for command in (1, 2, 3, 1030)),  # F_GETFD, F_SETFD, F_GETFL, F_DUPFD_CLOEXEC
]


class ArgumentRule(ctypes.Structure):
    """libseccomp's scmp_arg_cmp."""

    _fields_ = [
        ("arg", ctypes.c_uint), ("op", ctypes.c_int), ("datum_a", ctypes.c_uint64), ("datum_b", ctypes.c_uint64)
    ]  # fmt: skip


def confine(seconds: float, memory: int, parent: int) -> None:
    """From here on, the process computes and uses what is open, and nothing else. Raises OSError without seccomp.

    It goes on as a child of the process that called, in namespaces of its own, where the system grants those. It ends
    when ``parent``, the process that started it, does.
    """
    library, libc = ctypes.CDLL(LIBRARY), ctypes.CDLL(None, use_errno=True)
    _become_nobody(libc)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # not before: a change of user clears it
    if os.getppid() != parent:
        os._exit(1)
    if _unshare(libc):
        _continue_as_child(libc)
        os.chroot(".")
        os.chdir("/")
    _limit(seconds, memory)
    _filter(library)


def _become_nobody(libc: Any) -> None:
    """Another user than root, who may do too much. What is not permitted stays as it is."""
    if os.getuid() != 0:
        return
    try:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    except OSError:
        return
    libc.prctl(PR_SET_DUMPABLE, 1, 0, 0, 0)  # or it could not write its own uid_map


def _unshare(libc: Any) -> bool:
    """Namespaces of its own, with a user that is nobody; False where the system does not grant them."""
    uid, gid = os.getuid(), os.getgid()
    if libc.unshare(NAMESPACES) != 0:
        return False
    for name, text in (("setgroups", "deny"), ("uid_map", f"{NOBODY} {uid} 1"), ("gid_map", f"{NOBODY} {gid} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    return True


def _continue_as_child(libc: Any) -> None:
    """Only children are in the new PID namespace. The parent ends as its child does."""
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # again, for what this user may do has changed
    child = os.fork()
    if child == 0:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        return
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.kill(os.getpid(), os.WTERMSIG(status))
    os._exit(os.WEXITSTATUS(status))


def _limit(seconds: float, memory: int) -> None:
    """Bounds that also hold where nobody is there to keep the time."""
    cpu = int(seconds) + 1
    for name, value in (
        ("RLIMIT_CPU", cpu), ("RLIMIT_AS", memory), ("RLIMIT_FSIZE", 1 << 16), ("RLIMIT_NOFILE", 64),
        ("RLIMIT_NPROC", 0), ("RLIMIT_CORE", 0),
    ):  # fmt: skip
        resource.setrlimit(getattr(resource, name), (value, value))


def _filter(library: Any) -> None:
    library.seccomp_init.restype = ctypes.c_void_p
    library.seccomp_init.argtypes = [ctypes.c_uint32]
    library.seccomp_rule_add_array.argtypes = [
        ctypes.c_void_p, ctypes.c_uint32, ctypes.c_int, ctypes.c_uint, ctypes.POINTER(ArgumentRule)
    ]  # fmt: skip
    library.seccomp_load.argtypes = [ctypes.c_void_p]
    library.seccomp_syscall_resolve_name.argtypes = [ctypes.c_char_p]
    rules = library.seccomp_init(REFUSE)
    if not rules:
        raise OSError("seccomp_init failed")
    for name in ALLOWED:
        _allow(library, rules, name, [])
    for name, argument, value in RESTRICTED:
        _allow(library, rules, name, [ArgumentRule(argument, EQUAL, value, 0)])
    if status := library.seccomp_load(rules):
        raise OSError(f"seccomp_load failed: {os.strerror(-status)}")


def _allow(library: Any, rules: int, name: str, argument_rules: list[ArgumentRule]) -> None:
    """Add a rule; a system call that this architecture does not have is refused anyway."""
    number = library.seccomp_syscall_resolve_name(name.encode())
    array = (ArgumentRule * len(argument_rules))(*argument_rules)
    status = 0 if number == -1 else library.seccomp_rule_add_array(rules, ALLOW, number, len(argument_rules), array)
    if status not in (0, -errno.EDOM):
        raise OSError(f"seccomp refused the rule for {name}: {os.strerror(-status)}")
