"""What runs inside the sandbox: reads a program and its tests from stdin, gives itself up, runs them, says how it went.

Not imported, and importing nothing of the package: sandbox.py starts it with an interpreter of its own.
"""

import ctypes
import errno
import json
import os
import resource
import sys
from typing import Any

ALLOW = 0x7FFF0000
REFUSE = 0x00050000 | errno.EPERM
EQUAL, MASKED_EQUAL = 4, 7  # libseccomp's comparisons
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

# What computing, importing and reading take. clone3 and all else is refused.
ALLOWED = """
read readv pread64 write writev lseek close fstat stat lstat newfstatat statx access faccessat faccessat2
readlink readlinkat getcwd getdents getdents64 dup poll ppoll select pselect6
mmap mprotect munmap mremap madvise brk futex membarrier rseq set_robust_list
rt_sigaction rt_sigprocmask rt_sigreturn sigaltstack restart_syscall
getrandom clock_gettime clock_getres clock_nanosleep nanosleep gettimeofday time times
getpid getppid gettid getuid geteuid getgid getegid getgroups
uname sysinfo getrusage getrlimit sched_yield sched_getaffinity exit exit_group
""".split()
# Allowed with some arguments: name, then (argument, comparison, mask or value, value).
RESTRICTED: list[tuple[str, tuple[int, ...]]] = [
    ("open", (1, MASKED_EQUAL, WRITING, 0)),
    ("openat", (2, MASKED_EQUAL, WRITING, 0)),
    ("prlimit64", (2, EQUAL, 0, 0)),  # asking, not setting
    *(("ioctl", (1, EQUAL, request, 0)) for request in (0x5401, 0x5451)),  # TCGETS: isatty; FIOCLEX
    *(("fcntl", (1, EQUAL, command, 0)) for command in (1, 2, 3, 1030)),  # F_GETFD, F_SETFD, F_GETFL, F_DUPFD_CLOEXEC
]


class Comparison(ctypes.Structure):
    """libseccomp's scmp_arg_cmp."""

    _fields_ = [
        ("arg", ctypes.c_uint), ("op", ctypes.c_int), ("datum_a", ctypes.c_uint64), ("datum_b", ctypes.c_uint64)
    ]  # fmt: skip


def limit(seconds: float, memory: int, output: int) -> None:
    """Bounds that also hold where the parent should not be there to keep the time."""
    cpu = int(seconds) + 1
    for name, value in (
        ("RLIMIT_CPU", cpu), ("RLIMIT_AS", memory), ("RLIMIT_FSIZE", output), ("RLIMIT_NOFILE", 64),
        ("RLIMIT_NPROC", 0), ("RLIMIT_CORE", 0),
    ):  # fmt: skip
        resource.setrlimit(getattr(resource, name), (value, value))


def allow(library: Any, rules: int, name: str, comparisons: list[tuple[int, ...]]) -> None:
    """Add a rule; a system call that this architecture does not have is refused anyway."""
    number = library.seccomp_syscall_resolve_name(name.encode())
    array = (Comparison * len(comparisons))(*[Comparison(*values) for values in comparisons])
    status = 0 if number == -1 else library.seccomp_rule_add_array(rules, ALLOW, number, len(comparisons), array)
    if status not in (0, -errno.EDOM):
        raise OSError(f"seccomp refused the rule for {name}: {os.strerror(-status)}")


def confine() -> None:
    """From here on, only what is allowed above. Raises OSError where that can't be had."""
    library = ctypes.CDLL("libseccomp.so.2")
    library.seccomp_init.restype = ctypes.c_void_p
    library.seccomp_init.argtypes = [ctypes.c_uint32]
    library.seccomp_rule_add_array.argtypes = [
        ctypes.c_void_p, ctypes.c_uint32, ctypes.c_int, ctypes.c_uint, ctypes.POINTER(Comparison)
    ]  # fmt: skip
    library.seccomp_load.argtypes = [ctypes.c_void_p]
    library.seccomp_syscall_resolve_name.argtypes = [ctypes.c_char_p]
    rules = library.seccomp_init(REFUSE)
    if not rules:
        raise OSError("seccomp_init failed")
    for name in ALLOWED:
        allow(library, rules, name, [])
    for name, comparison in RESTRICTED:
        allow(library, rules, name, [comparison])
    if status := library.seccomp_load(rules):
        raise OSError(f"seccomp_load failed: {os.strerror(-status)}")


def outcome(program: str, tests: str, entry_point: str) -> str:
    """Run it all; "passed", or the name of what was raised."""
    try:
        names: dict[str, Any] = {"__name__": "solution"}
        exec(compile(program, "program.py", "exec"), names)
        exec(compile(tests, "tests.py", "exec"), names)
        names["check"](names[entry_point])
    except BaseException as error:
        return type(error).__name__
    return "passed"


def main() -> None:
    job = json.load(sys.stdin)
    report, nowhere = os.dup(1), os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    answer = {"seal": job["seal"]}
    try:
        limit(**job["limits"])
        confine()
    except (OSError, ValueError) as error:
        answer["unconfined"] = str(error)
    else:
        answer["outcome"] = outcome(job["program"], job["tests"], job["entry_point"])
    os.write(report, json.dumps(answer).encode())
    os._exit(0)


if __name__ == "__main__":
    main()
