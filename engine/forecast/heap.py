"""What the C library's allocator holds for a sequence of blocks, found by asking it for them without touching them."""

from __future__ import annotations

import ctypes
import sys

_ALIGNMENT = 64
"""Of torch's blocks on the CPU."""
_FIELDS = ["arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"]


class _Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in _FIELDS]


class Heap:
    """Aligned blocks of this process's heap, as torch takes them.

    Live blocks are not all that counts as resident: the heap keeps what is freed below a live block. Blocks that are
    never written to take address space alone, so that a run of any size can be replayed.
    """

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None)
        self._libc.mallinfo2.restype = _Info
        self._libc.free.argtypes = [ctypes.c_void_p]
        self._libc.posix_memalign.argtypes = [ctypes.POINTER(ctypes.c_void_p), ctypes.c_size_t, ctypes.c_size_t]
        self._start = self._held()
        self.peak = 0

    @staticmethod
    def available() -> bool:
        """Whether the C library is glibc 2.33 or later, which reports sizes beyond 4 GiB."""
        return sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallinfo2")

    def take(self, size: int) -> int | None:
        """The address of a new block; None for one of no bytes.

        Raises:
            MemoryError: not even the address space is to be had.
        """
        if size == 0:
            return None
        address = ctypes.c_void_p()
        if self._libc.posix_memalign(ctypes.byref(address), _ALIGNMENT, size):
            raise MemoryError(f"this machine has no room for a block of {size / 2**30:.1f} GiB")
        self.peak = max(self.peak, self._held() - self._start)
        return address.value

    def give(self, address: int | None) -> None:
        """Free a block."""
        self._libc.free(address)

    def _held(self) -> int:
        info = self._libc.mallinfo2()
        return info.arena + info.hblkhd
