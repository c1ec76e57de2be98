"""Opening a checkpoint, as every command does: each tensor's entry in a header becomes a few Python objects.

V4-Pro has 145,116 tensors in 64 shards. Reading their headers takes seconds and shows a bar; a small checkpoint is open
before the bar would appear.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from dsv4.output import Output


@contextmanager
def opening(out: Output) -> Iterator[Callable[[int, int], None]]:
    """A bar while a checkpoint is opened and planned. Yields a callback (headers read, headers to read).

    Python looks for reference cycles whenever many objects were made, and looks at all there are: half of the time
    would go there, and tables of tensors have no cycles.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        with out.progress(0, "opening", " shards", passing=True) as bar:
            yield bar.reach
    finally:
        if collects:
            gc.enable()
