"""Writer's side of the shared memory, in the worker: copies tensors into blocks, from a GPU without waiting for it."""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from harness.capture.transport import (
    FAILED,
    HEADER_BYTES,
    WORD,
    Address,
    Block,
    BlockGone,
    SegmentId,
    TransportError,
    exists,
    opened,
)


class _Copy(NamedTuple):
    """One step of a batch: bytes of `source` to the block's data if there is a source, then `stamp` to its header."""

    pages: Tensor  # of the segment
    block: Block
    stamp: int
    source: Tensor | None


class _Copier(Protocol):
    def attach(self, pages: Tensor) -> None: ...

    def detach(self, pages: Tensor) -> None: ...

    def copy(self, batch: Sequence[_Copy]) -> None: ...

    def fetch(self, pages: Tensor, data: Tensor) -> Tensor: ...

    def close(self) -> None: ...


def _data(pages: Tensor, block: Block) -> Tensor:
    start = block.offset + HEADER_BYTES
    return pages[start : start + block.nbytes]


class _HostCopier:
    """Copies at once, from any device."""

    def attach(self, pages: Tensor) -> None:
        pass

    def detach(self, pages: Tensor) -> None:
        pass

    def copy(self, batch: Sequence[_Copy]) -> None:
        for pages, block, stamp, source in batch:
            if source is not None:
                _data(pages, block).view(source.dtype).view(source.shape).copy_(source)
            pages[block.offset : block.offset + WORD].view(torch.int64).fill_(stamp)

    def fetch(self, pages: Tensor, data: Tensor) -> Tensor:
        del pages
        return data.clone()

    def close(self) -> None:
        pass


class _CudaCopier:
    """Copies on a side stream into registered (page-locked) memory; never waits for the device.

    A thread registers the memory: that takes 0.5 ms a MiB, most of it for the kernel to find pages, and torch's own
    binding would hold the interpreter meanwhile.
    """

    def __init__(self, device: torch.device) -> None:
        # By its number: in other threads another one may be the current one.
        self._device = device if device.index is not None else torch.device("cuda", torch.cuda.current_device())
        self._driver = _driver()
        self._stream = torch.cuda.Stream(self._device)
        self._fence = torch.cuda.Event()
        self._stream_writes = all(self._driver.attribute(number, self._device.index) for number in _STREAM_WRITES)
        self._registering = ThreadPoolExecutor(1, "mm-embedding-pages", initializer=self._use_device)
        # Of its own: it waits for the device, and registering must not wait behind it.
        self._dropping = ThreadPoolExecutor(1, "mm-embedding-dropped", initializer=self._use_device)
        self._registered: dict[int, Future[None]] = {}  # by address
        self._ready: set[int] = set()  # those of them that were waited for

    def _use_device(self) -> None:
        torch.cuda.set_device(self._device)
        torch.cuda.current_stream().query()  # makes the device's context current in this thread, for the driver's calls

    def attach(self, pages: Tensor) -> None:
        self._registered[pages.data_ptr()] = self._registering.submit(_register, pages)

    def detach(self, pages: Tensor) -> None:
        self._ready.discard(pages.data_ptr())
        self._dropping.submit(self._unregister, self._registered.pop(pages.data_ptr()), pages)

    def _unregister(self, registered: Future[None], pages: Tensor) -> None:
        registered.result()
        self._stream.synchronize()  # the copies to these pages were queued before they were detached
        self._driver.unregister(pages.data_ptr())

    def copy(self, batch: Sequence[_Copy]) -> None:
        # vLLM calls between the encoder and the language model, whose kernels wait for this thread: the driver is
        # called directly, because torch takes five operations for the same, of which two run on the device.
        headers = [self._registered_address(copy.pages) + copy.block.offset for copy in batch]
        sources = [copy.source if copy.source is None else self._copyable(copy.source) for copy in batch]
        self._after(torch.cuda.current_stream(self._device))
        stream = self._stream.cuda_stream
        for header, source, (_, _, stamp, _) in zip(headers, sources, batch, strict=True):
            if source is not None and source.nbytes:
                source.record_stream(self._stream)
                self._copy_rows(header + HEADER_BYTES, source, stream)
            # In the stream's order and behind a barrier, or the way of the data: it arrives after them.
            if self._stream_writes:
                self._driver.write_value(stream, header, stamp, 0)
            else:
                with torch.cuda.stream(self._stream):
                    value = torch.full((1,), stamp, dtype=torch.int64, device=self._device)
                self._driver.copy_to_host(header, value.data_ptr(), WORD, stream)

    def _copyable(self, source: Tensor) -> Tensor:
        """On the device; contiguous, or rows at a constant distance."""
        # `to` takes as long as a call of the driver where there is nothing to do.
        there = source if source.device == self._device else source.to(self._device, non_blocking=True)
        return there if there.is_contiguous() or _is_pitched(there) else there.contiguous()

    def _copy_rows(self, address: int, source: Tensor, stream: int) -> None:
        if source.is_contiguous():
            self._driver.copy_to_host(address, source.data_ptr(), source.nbytes, stream)
            return
        # Where there are levels the main rows are columns of wider ones. The copy engine takes them from there at its
        # full speed: to make them contiguous takes memory of the GPU, and this thread's time before the language model.
        width = source.shape[1] * source.itemsize
        parameters = _Memcpy2D(
            srcMemoryType=_ON_DEVICE,
            srcDevice=source.data_ptr(),
            srcPitch=source.stride(0) * source.itemsize,
            dstMemoryType=_ON_HOST,
            dstHost=address,
            dstPitch=width,
            WidthInBytes=width,
            Height=source.shape[0],
        )
        self._driver.copy_2d(parameters, stream)

    def _registered_address(self, pages: Tensor) -> int:
        address = pages.data_ptr()
        if address not in self._ready:
            self._registered[address].result()
            self._ready.add(address)
        return address

    def _after(self, stream: torch.cuda.Stream) -> None:
        self._fence.record(stream)  # the same one each time: `wait_stream` makes one and ends it
        self._stream.wait_event(self._fence)

    def fetch(self, pages: Tensor, data: Tensor) -> Tensor:
        self._registered_address(pages)
        found = data.to(self._device, non_blocking=True)
        self._after(torch.cuda.current_stream(self._device))  # for `_unregister`, which waits for the stream
        return found

    def close(self) -> None:
        self._registering.shutdown()
        self._dropping.shutdown()


def _is_pitched(tensor: Tensor) -> bool:
    return tensor.ndim == 2 and tensor.stride(1) == 1 and tensor.stride(0) >= tensor.shape[1]


def _register(pages: Tensor) -> None:
    address, nbytes = pages.data_ptr(), pages.nbytes
    # Without pages the driver finds them one by one, and holds a lock of its own meanwhile. Fails on old kernels, which
    # does not matter.
    ctypes.CDLL(None).madvise(ctypes.c_void_p(address), ctypes.c_size_t(nbytes), _MADV_POPULATE_WRITE)
    try:
        _driver().register(address, nbytes, _DEVICEMAP)
    except TransportError as error:
        raise TransportError(f"{nbytes} bytes cannot be page-locked ({error}): lower the cap") from error


_STREAM_WRITES = (91, 122)
"""CU_DEVICE_ATTRIBUTE_CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM and _CAN_USE_64_BIT_STREAM_MEM_OPS."""


_DEVICEMAP = 2  # the stream writes the stamps as the device does, and not by a copy
_MADV_POPULATE_WRITE = 23  # Linux 5.14; Python's mmap has no name for it


_ON_HOST, _ON_DEVICE = 1, 2  # CUmemorytype


class _Memcpy2D(ctypes.Structure):
    """CUDA_MEMCPY2D."""

    _fields_ = (
        ("srcXInBytes", ctypes.c_size_t),
        ("srcY", ctypes.c_size_t),
        ("srcMemoryType", ctypes.c_int),
        ("srcHost", ctypes.c_void_p),
        ("srcDevice", ctypes.c_uint64),
        ("srcArray", ctypes.c_void_p),
        ("srcPitch", ctypes.c_size_t),
        ("dstXInBytes", ctypes.c_size_t),
        ("dstY", ctypes.c_size_t),
        ("dstMemoryType", ctypes.c_int),
        ("dstHost", ctypes.c_void_p),
        ("dstDevice", ctypes.c_uint64),
        ("dstArray", ctypes.c_void_p),
        ("dstPitch", ctypes.c_size_t),
        ("WidthInBytes", ctypes.c_size_t),
        ("Height", ctypes.c_size_t),
    )


class _Driver:
    """CUDA's driver, whose functions are called without the interpreter's lock, which torch.cuda.cudart() holds.

    Raises:
        TransportError: by each function, where the driver refuses.
    """

    def __init__(self) -> None:
        self._library = ctypes.CDLL("libcuda.so.1")
        address, word, size, number = ctypes.c_void_p, ctypes.c_uint64, ctypes.c_size_t, ctypes.c_uint
        self.copy_to_host = self._function("cuMemcpyDtoHAsync_v2", address, word, size, address)
        self.copy_2d = self._function("cuMemcpy2DAsync_v2", ctypes.POINTER(_Memcpy2D), address)
        self.write_value = self._function("cuStreamWriteValue64_v2", address, word, word, number)
        self.register = self._function("cuMemHostRegister_v2", address, size, number)
        self.unregister = self._function("cuMemHostUnregister", address)
        self._get_attribute = self._function("cuDeviceGetAttribute", address, ctypes.c_int, ctypes.c_int)

    def attribute(self, number: int, device: int) -> int:
        """A CU_DEVICE_ATTRIBUTE."""
        value = ctypes.c_int()
        self._get_attribute(ctypes.byref(value), number, device)
        return value.value

    def _function(self, name: str, *arguments: Any) -> Any:
        function = getattr(self._library, name)
        function.argtypes, function.errcheck = arguments, self._check  # with types, callers pass numbers
        return function

    @staticmethod
    def _check(error: int, function: Any, _arguments: tuple[Any, ...]) -> None:
        if error:
            raise TransportError(f"the GPU's driver answers {function.__name__} with error {error}")


@functools.cache
def _driver() -> _Driver:
    return _Driver()


_LOOK_SECONDS = 5.0
"""How often the thread looks: for hundreds of segments that takes the interpreter from the step for a millisecond."""


class Writer:
    """Worker side: copies tensors into blocks. Thread-safe.

    Maps a segment at its first use. A small thread looks which the owner has given back and unmaps those: while a
    device has them registered, their memory is not free, and the owner of an idle engine has no step to say so with.

    Args:
        address: the owner's.
        device: where the tensors are. On CUDA all copies are asynchronous, ordered after the current stream.
    """

    def __init__(self, address: Address, device: torch.device | str = "cpu") -> None:
        device = torch.device(device)
        self._address = address
        self._copier: _Copier = _CudaCopier(device) if device.type == "cuda" else _HostCopier()
        self._segments: dict[SegmentId, Tensor] = {}
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._looker: threading.Thread | None = None

    def view(self, block: Block) -> Tensor:
        """The block's data: uint8, (nbytes,), shared with the other processes.

        Raises:
            BlockGone: the owner gave the segment back, or ended.
        """
        with self._lock:
            return _data(self._pages(block.segment), block)

    def write(self, block: Block, tensor: Tensor) -> None:
        """write_many() of one."""
        self.write_many([(block, tensor)])

    def write_many(self, copies: Iterable[tuple[Block, Tensor]]) -> None:
        """Copies each tensor to its block and stamps it. The bytes of both must be equally many.

        A tensor on a GPU is read later, in the order of the device's work: it may be dropped at once, and must not be
        changed in place before its stamp is there.

        A block whose segment was given back is left out: its request was aborted, nobody waits for it.
        """
        with self._lock:
            batch = []
            for block, tensor in copies:
                if tensor.nbytes != block.nbytes:
                    raise ValueError(f"a tensor of {tensor.nbytes} bytes does not fill a block of {block.nbytes}")
                batch += self._stamped(block, block.generation, tensor)
            self._copier.copy(batch)

    def fetch(self, block: Block, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """A stamped block's data on the writer's device, on CUDA by a copy on the current stream.

        Raises:
            BlockGone: the owner gave the segment back, or ended.
        """
        with self._lock:
            pages = self._pages(block.segment)
            return self._copier.fetch(pages, _data(pages, block).view(dtype).view(shape))

    def fail(self, block: Block) -> None:
        """Stamps that there is no data for the block: its reader gets CaptureFailed."""
        with self._lock:
            self._copier.copy(self._stamped(block, block.generation | FAILED, None))

    def prepare(self, segments: Iterable[SegmentId]) -> None:
        """Maps segments before their first use, which on CUDA goes on in a thread."""
        with self._lock:
            for segment in segments:
                with suppress(BlockGone):
                    self._pages(segment)

    def drop_gone(self) -> None:
        """Unmaps the segments that the owner gave back, after the copies that are under way; the thread does it too."""
        with self._lock:
            mapped = list(self._segments)
        gone = [segment for segment in mapped if not exists(self._address, segment)]
        with self._lock:
            self._drop(gone)

    def close(self) -> None:
        """Unmaps everything. Not to be called beside the other methods."""
        self._closed.set()
        if (looker := self._looker) is not None:
            looker.join()
        with self._lock:
            self._drop(list(self._segments))
        self._copier.close()

    def _keep_looking(self) -> None:
        while not self._closed.wait(_LOOK_SECONDS):
            self.drop_gone()
            with self._lock:
                if not self._segments:
                    self._looker = None
                    return

    # Below: with the lock held.

    def _drop(self, segments: Iterable[SegmentId]) -> None:
        for segment in segments:
            if (pages := self._segments.pop(segment, None)) is not None:
                self._copier.detach(pages)

    def _stamped(self, block: Block, stamp: int, source: Tensor | None) -> list[_Copy]:
        with suppress(BlockGone):
            return [_Copy(self._pages(block.segment), block, stamp, source)]
        return []

    def _pages(self, segment: SegmentId) -> Tensor:
        if (pages := self._segments.get(segment)) is None:
            with opened(self._address, segment, os.O_RDWR) as fd:
                # The tensor alone holds the mapping, which goes with it.
                pages = torch.frombuffer(mmap.mmap(fd, os.fstat(fd).st_size), dtype=torch.uint8)
            self._copier.attach(pages)
            self._segments[segment] = pages
            if self._looker is None:
                self._looker = threading.Thread(target=self._keep_looking, name="mm-embedding-looker", daemon=True)
                self._looker.start()
        return pages
