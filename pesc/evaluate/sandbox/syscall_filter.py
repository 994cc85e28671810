"""A seccomp-BPF allow list: what a Python program needs to read, compute and print, and nothing else.

Everything that is not listed fails with EPERM (unknown numbers and the three calls that glibc can do without fail with ENOSYS, so
that it falls back).  Not listed, hence impossible: sockets other than a socket pair, new processes, exec, signals to others, ptrace,
mounts, namespaces, key rings, io_uring, shared memory, and every call that changes a file system.  Opening is allowed for reading.

Numbers are those of the kernel's unistd.h for x86_64 and aarch64 (both little-endian 64-bit).  This module imports nothing of pesc
and is loaded by the guard process from its file.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct

AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
NUMBERS: dict[str, dict[str, int]] = {
    "x86_64": {
        "access": 21, "alarm": 37, "arch_prctl": 158, "brk": 12, "chdir": 80, "clock_getres": 229, "clock_gettime": 228,
        "clock_nanosleep": 230, "clone": 56, "clone3": 435, "close": 3, "close_range": 436, "dup": 32, "dup2": 33, "dup3": 292,
        "epoll_create": 213, "epoll_create1": 291, "epoll_ctl": 233, "epoll_pwait": 281, "epoll_pwait2": 441, "epoll_wait": 232,
        "eventfd": 284, "eventfd2": 290, "exit": 60, "exit_group": 231, "faccessat": 269, "faccessat2": 439, "fadvise64": 221,
        "fchdir": 81, "fcntl": 72, "fstat": 5, "fstatfs": 138, "futex": 202, "futex_waitv": 449, "get_robust_list": 274, "getcpu": 309,
        "getcwd": 79, "getdents": 78, "getdents64": 217, "getegid": 108, "geteuid": 107, "getgid": 104, "getgroups": 115,
        "getitimer": 36, "getpeername": 52, "getpgid": 121, "getpgrp": 111, "getpid": 39, "getppid": 110, "getpriority": 140,
        "getrandom": 318, "getresgid": 120, "getresuid": 118, "getrlimit": 97, "getrusage": 98, "getsid": 124, "getsockname": 51,
        "getsockopt": 55, "gettid": 186, "gettimeofday": 96, "getuid": 102, "ioctl": 16, "lseek": 8, "lstat": 6, "madvise": 28,
        "membarrier": 324, "mincore": 27, "mmap": 9, "mprotect": 10, "mremap": 25, "msync": 26, "munmap": 11, "nanosleep": 35,
        "newfstatat": 262, "open": 2, "openat": 257, "openat2": 437, "pause": 34, "pipe": 22, "pipe2": 293, "poll": 7, "ppoll": 271,
        "prctl": 157, "pread64": 17, "preadv": 295, "preadv2": 327, "prlimit64": 302, "pselect6": 270, "pwrite64": 18, "read": 0,
        "readahead": 187, "readlink": 89, "readlinkat": 267, "readv": 19, "recvfrom": 45, "restart_syscall": 219, "rseq": 334,
        "rt_sigaction": 13, "rt_sigpending": 127, "rt_sigprocmask": 14, "rt_sigreturn": 15, "rt_sigsuspend": 130,
        "rt_sigtimedwait": 128, "sched_get_priority_max": 146, "sched_get_priority_min": 147, "sched_getaffinity": 204,
        "sched_getparam": 143, "sched_getscheduler": 145, "sched_yield": 24, "select": 23, "sendto": 44, "set_robust_list": 273,
        "set_tid_address": 218, "setitimer": 38, "shutdown": 48, "sigaltstack": 131, "socketpair": 53, "stat": 4, "statfs": 137,
        "statx": 332, "sysinfo": 99, "tgkill": 234, "time": 201, "timer_create": 222, "timer_delete": 226, "timer_getoverrun": 225,
        "timer_gettime": 224, "timer_settime": 223, "times": 100, "umask": 95, "uname": 63, "wait4": 61, "waitid": 247, "write": 1,
        "writev": 20,
    },
    "aarch64": {
        "brk": 214, "chdir": 49, "clock_getres": 114, "clock_gettime": 113, "clock_nanosleep": 115, "clone": 220, "clone3": 435,
        "close": 57, "close_range": 436, "dup": 23, "dup3": 24, "epoll_create1": 20, "epoll_ctl": 21, "epoll_pwait": 22,
        "epoll_pwait2": 441, "eventfd2": 19, "exit": 93, "exit_group": 94, "faccessat": 48, "faccessat2": 439, "fadvise64": 223,
        "fchdir": 50, "fcntl": 25, "fstat": 80, "fstatfs": 44, "futex": 98, "futex_waitv": 449, "get_robust_list": 100, "getcpu": 168,
        "getcwd": 17, "getdents64": 61, "getegid": 177, "geteuid": 175, "getgid": 176, "getgroups": 158, "getitimer": 102,
        "getpeername": 205, "getpgid": 155, "getpid": 172, "getppid": 173, "getpriority": 141, "getrandom": 278, "getresgid": 150,
        "getresuid": 148, "getrlimit": 163, "getrusage": 165, "getsid": 156, "getsockname": 204, "getsockopt": 209, "gettid": 178,
        "gettimeofday": 169, "getuid": 174, "ioctl": 29, "lseek": 62, "madvise": 233, "membarrier": 283, "mincore": 232, "mmap": 222,
        "mprotect": 226, "mremap": 216, "msync": 227, "munmap": 215, "nanosleep": 101, "newfstatat": 79, "openat": 56, "openat2": 437,
        "pipe2": 59, "ppoll": 73, "prctl": 167, "pread64": 67, "preadv": 69, "preadv2": 286, "prlimit64": 261, "pselect6": 72,
        "pwrite64": 68, "read": 63, "readahead": 213, "readlinkat": 78, "readv": 65, "recvfrom": 207, "restart_syscall": 128,
        "rseq": 293, "rt_sigaction": 134, "rt_sigpending": 136, "rt_sigprocmask": 135, "rt_sigreturn": 139, "rt_sigsuspend": 133,
        "rt_sigtimedwait": 137, "sched_get_priority_max": 125, "sched_get_priority_min": 126, "sched_getaffinity": 123,
        "sched_getparam": 121, "sched_getscheduler": 120, "sched_yield": 124, "sendto": 206, "set_robust_list": 99,
        "set_tid_address": 96, "setitimer": 103, "shutdown": 210, "sigaltstack": 132, "socketpair": 199, "statfs": 43, "statx": 291,
        "sysinfo": 179, "tgkill": 131, "timer_create": 107, "timer_delete": 111, "timer_getoverrun": 109, "timer_gettime": 108,
        "timer_settime": 110, "times": 153, "umask": 166, "uname": 160, "wait4": 260, "waitid": 95, "write": 64, "writev": 66,
    },
}  # fmt: skip
NEWEST_KNOWN = 451
"""Calls added to the kernel after this number do not exist for the candidate (ENOSYS), so that glibc takes the older way."""
ABSENT = ("clone3", "openat2")
"""Their arguments lie behind a pointer and cannot be checked; glibc falls back when they do not exist."""

_O_TMPFILE = 0o20000000
WRITING_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND | _O_TMPFILE
_CLONE_THREAD = 0x00010000
_IOCTLS = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)  # TCGETS TIOCGWINSZ FIONREAD FIONBIO FIONCLEX FIOCLEX
_FCNTLS = (0, 1, 2, 3, 4, 1030)  # DUPFD GETFD SETFD GETFL SETFL DUPFD_CLOEXEC
_PRCTLS = (15, 16, 0x53564D41)  # SET_NAME GET_NAME SET_VMA

_LOAD, _JEQ, _JGE, _JSET, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_X32_BIT = 0x40000000


def _instruction(code: int, jump_true: int, jump_false: int, value: int) -> bytes:
    return struct.pack("<HBBI", code, jump_true, jump_false, value & 0xFFFFFFFF)


def _give(value: int) -> bytes:
    return _instruction(_RETURN, 0, 0, value)


def _fail(number: int) -> bytes:
    return _give(_ERRNO | number)


def _load_argument(index: int) -> bytes:
    return _instruction(_LOAD, 0, 0, 16 + 8 * index)


def _one_of(index: int, values: tuple[int, ...]) -> list[bytes]:
    """Allow the call when argument `index` is one of `values`."""
    checks = [part for value in values for part in (_instruction(_JEQ, 0, 1, value), _give(_ALLOW))]
    return [_load_argument(index), *checks, _fail(errno.EPERM)]


def _without_bits(index: int, bits: int) -> list[bytes]:
    """Allow the call when none of `bits` is set in argument `index`."""
    return [_load_argument(index), _instruction(_JSET, 0, 1, bits), _fail(errno.EACCES), _give(_ALLOW)]


def _with_bits(index: int, bits: int) -> list[bytes]:
    """Allow the call when one of `bits` is set in argument `index`."""
    return [_load_argument(index), _instruction(_JSET, 0, 1, bits), _give(_ALLOW), _fail(errno.EPERM)]


def build_filter(machine: str, pid: int) -> bytes:
    """The BPF program for one process (`pid` may signal itself only).  Raises KeyError for an unknown machine."""
    numbers = NUMBERS[machine]
    conditional = {
        "open": _without_bits(1, WRITING_FLAGS), "openat": _without_bits(2, WRITING_FLAGS),
        "clone": _with_bits(0, _CLONE_THREAD), "ioctl": _one_of(1, _IOCTLS), "fcntl": _one_of(1, _FCNTLS), "prctl": _one_of(0, _PRCTLS),
        "tgkill": _one_of(0, (pid,)), "prlimit64": _one_of(0, (0, pid)), **{name: [_fail(errno.ENOSYS)] for name in ABSENT},
    }  # fmt: skip
    program = [_instruction(_LOAD, 0, 0, 4), _instruction(_JEQ, 1, 0, AUDIT_ARCH[machine]), _give(_KILL), _instruction(_LOAD, 0, 0, 0)]
    program += [_instruction(_JGE, 0, 1, _X32_BIT), _give(_KILL)]
    for name, number in numbers.items():
        body = conditional.get(name, [_give(_ALLOW)])
        program += [_instruction(_JEQ, 0, len(body), number), *body]
    program += [_instruction(_JGE, 0, 1, NEWEST_KNOWN + 1), _fail(errno.ENOSYS), _fail(errno.EPERM)]
    return b"".join(program)


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_void_p))


def install_filter() -> None:
    """Confine this process, for good.  Raises OSError when the kernel or the container's own policy refuses."""
    machine = platform.machine()
    if machine not in NUMBERS:
        raise OSError(errno.ENOSYS, f"no system-call table for {machine}")
    code = build_filter(machine, os.getpid())
    buffer = ctypes.create_string_buffer(code, len(code))
    program = _Program(len(code) // 8, ctypes.addressof(buffer))
    libc = ctypes.CDLL(None, use_errno=True)
    no_new_privileges, set_seccomp, mode_filter = 38, 22, 2
    if libc.prctl(no_new_privileges, 1, 0, 0, 0) != 0 or libc.prctl(set_seccomp, mode_filter, ctypes.byref(program), 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"seccomp filter refused: {os.strerror(number)}")
