"""The threads that hash the files in flight: two files at a time where a core does both in the time of one.

The bytes of a file are hashed in order. A thread takes the file that has waited longest, and a second one that waits
too. There is a thread for every two files: with more, each would hash one file, in twice the processor time. Where a
core hashes one file at a time (sha256.py), every file has a thread.
"""

from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Condition

from . import sha256

MOST_BYTES = 2**20  # of a file at once; then the thread takes whichever files wait
LEAST_BYTES = 2**16  # unless less is left: fewer are not worth a call

Part = tuple[memoryview, str | None]
"""Bytes of a file, and the tensor that ends with them."""


@dataclass
class _Task:
    """Parts that were submitted together."""

    parts: deque[Part]
    done: Future[None] = field(default_factory=Future)


class FileHash:
    """The SHA-256 of one file, computed by the threads of `hashing`."""

    def __init__(self, hashing: "Hashing") -> None:
        self._hashing, self.sha256 = hashing, hashing.algorithm.new()
        self.prefixes: dict[str, str] = {}  # by tensor, of the file up to its last byte
        self.tasks: deque[_Task] = deque()  # the first one belongs to the thread that took the file
        self.is_taken = self.is_stopped = False

    def submit(self, parts: Iterable[Part]) -> Future[None]:
        """Hash the next bytes, which must not change until the future is done."""
        task = _Task(deque(parts))
        self._hashing.add(self, task)
        return task.done

    def hexdigest(self) -> str:
        """Of the whole file, when the last future is done."""
        return self.sha256.hexdigest()

    def stop(self) -> None:
        """Hash no more; when this returns, no thread reads the file's bytes any longer."""
        self._hashing.drop(self)

    def next_bytes(self) -> memoryview:
        """What is to be hashed next."""
        return self.tasks[0].parts[0][0]

    def advance(self, count: int) -> None:
        """The next bytes, or so many of them, are hashed."""
        task = self.tasks[0]
        data, tensor = task.parts.popleft()
        if count < len(data):
            task.parts.appendleft((data[count:], tensor))
        elif tensor is not None:
            self.prefixes[tensor] = self.hexdigest()
        if not task.parts:
            self.tasks.popleft().done.set_result(None)


def _hash_next(files: list[FileHash], algorithm: sha256.Algorithm) -> None:
    """Hash the next bytes of one or two files."""
    data = [file.next_bytes() for file in files]
    count = min(MOST_BYTES, max(LEAST_BYTES, min(map(len, data))))
    if len(files) == 1 or algorithm.update_two is None:
        files[0].sha256.update(data[0][:count])
    else:
        algorithm.update_two(files[0].sha256, data[0][:count], files[1].sha256, data[1][:count])
    for file in files:
        file.advance(count)


class Hashing:
    """Threads for the hashes of so many files at a time."""

    def __init__(self, files: int) -> None:
        self.algorithm = sha256.algorithm()
        self._at_once = 1 if self.algorithm.update_two is None else 2
        self._threads = ThreadPoolExecutor(-(-files // self._at_once), "dsv4-hash")
        self._changed = Condition()
        self._waiting: deque[FileHash] = deque()  # have tasks, and no thread took them

    def add(self, file: FileHash, task: _Task) -> None:
        """See `FileHash.submit`."""
        with self._changed:
            file.tasks.append(task)
            if file.is_taken or file in self._waiting:
                return
            self._waiting.append(file)
        self._threads.submit(self._work)

    def drop(self, file: FileHash) -> None:
        """See `FileHash.stop`."""
        with self._changed:
            file.is_stopped = True
            if file in self._waiting:
                self._waiting.remove(file)
            self._changed.wait_for(lambda: not file.is_taken)

    def _take(self) -> list[FileHash]:
        """Files to hash now; none if none waits."""
        with self._changed:
            files = [self._waiting.popleft() for _ in range(min(self._at_once, len(self._waiting)))]
            for file in files:
                file.is_taken = True
        return files

    def _put_back(self, files: list[FileHash]) -> None:
        with self._changed:
            for file in files:
                file.is_taken = False
            self._waiting.extend(file for file in files if file.tasks and not file.is_stopped)
            self._changed.notify_all()

    def _work(self) -> None:
        while files := self._take():
            try:
                _hash_next(files, self.algorithm)
            except BaseException as error:  # is raised where the result is waited for
                for file in files:
                    file.tasks.popleft().done.set_exception(error)
            self._put_back(files)

    def shutdown(self) -> None:
        """Wait until the threads have ended."""
        self._threads.shutdown(wait=True, cancel_futures=True)
