"""Decides which experts stay in memory: those that the router chooses most often.

Routers are trained to choose evenly, and a long prompt uses nearly every expert once per piece. The least recently used
expert is then the next to be used, and an LRU cache never hits. Here an expert's rate is the share of its
layer's calls that chose it. The lowest rate is dropped first; of equal ones the one whose layer was called last, whose
next use is the latest. Older choices count less: from time to time a layer's counts are halved.
"""

import heapq

CALLS_REMEMBERED = 256


class Layer:
    """The experts of one layer: how often each was chosen, and which of their matrices may be dropped."""

    def __init__(self) -> None:
        self.calls, self.last_call = 0, 0
        self._uses: dict[str, int] = {}
        self._droppable: dict[str, int] = {}  # name -> the number of its entry in the heap
        self._heap: list[tuple[int, int, str]] = []  # (uses, - number of the entry, name), some of them outdated

    def choose(self, names: list[str], call: int) -> None:
        """Count a call of the layer that uses these matrices; they are kept until `release`."""
        self.calls, self.last_call = self.calls + 1, call
        for name in names:
            self._uses[name] = self._uses.get(name, 0) + 1
            self.take(name)
        if self.calls == CALLS_REMEMBERED:
            self.calls //= 2
            self._uses = {name: uses // 2 for name, uses in self._uses.items()}
            self._heap = [(self._uses.get(name, 0), -number, name) for name, number in self._droppable.items()]
            heapq.heapify(self._heap)

    def release(self, name: str, number: int) -> None:
        """A matrix may be dropped from now on. `number` grows from call to call."""
        self._droppable[name] = number
        heapq.heappush(self._heap, (self._uses.get(name, 0), -number, name))

    def lowest(self) -> tuple[float, str] | None:
        """(rate, name) of the matrix to drop first; None if there is none."""
        while self._heap and self._droppable.get(self._heap[0][2]) != -self._heap[0][1]:
            heapq.heappop(self._heap)
        return (self._heap[0][0] / max(self.calls, 1), self._heap[0][2]) if self._heap else None

    def take(self, name: str) -> None:
        """Not to be dropped until `release`: a matrix is used next, or was dropped."""
        self._droppable.pop(name, None)


class Rates:
    """The layers by name."""

    def __init__(self) -> None:
        self._layers: dict[str, Layer] = {}
        self._count = 0

    def _layer(self, name: str) -> Layer:
        return self._layers.setdefault(name.partition(".experts.")[0], Layer())

    def choose(self, names: list[str]) -> None:
        """The next call of a layer uses these of its matrices, in this order."""
        self._count += 1
        if names:
            self._layer(names[0]).choose(names, self._count)

    def keep(self, name: str) -> None:
        """A matrix is probably used next: if it is in memory, it stays there until `release`."""
        self._layer(name).take(name)

    def release(self, name: str) -> None:
        """A matrix that is in memory was used, or is not used next, and may be dropped from now on."""
        self._count += 1
        self._layer(name).release(name, self._count)

    def take_lowest(self) -> str | None:
        """The matrix to drop; None if none may be dropped."""
        lowest = [(*found, layer) for layer in self._layers.values() if (found := layer.lowest()) is not None]
        if not lowest:
            return None
        _, name, layer = min(lowest, key=lambda each: (each[0], -each[2].last_call))
        layer.take(name)
        return name
