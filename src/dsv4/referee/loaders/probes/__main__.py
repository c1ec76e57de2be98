"""`PYTHON probes REQUEST RESULT`: runs in the interpreter of an engine, which has no dsv4.

REQUEST is JSON: `engine` (the module `<engine>_probe` of this folder), `folder`, `shapes` (name of each weight -> shape
in elements), `block` (rows, columns of an FP8 block). RESULT is written as JSON: see
`Record`. The engine may print what it likes.
"""

import importlib
import importlib.util
import json
import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
NAME = "dsv4_probes"  # this folder as a package, so that no file of it can stand in front of an engine's own modules


def package() -> None:
    """Make this folder the package NAME, and take it off the module path."""
    sys.path[:] = [path for path in sys.path if os.path.abspath(path or ".") != HERE]
    spec = importlib.util.spec_from_file_location(NAME, f"{HERE}/__init__.py", submodule_search_locations=[HERE])
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[NAME] = module
    spec.loader.exec_module(module)


def main(request_file: str, result_file: str) -> None:
    """Run the probe that the request names, and write what it recorded."""
    package()
    with open(request_file, encoding="utf-8") as file:
        request = json.load(file)
    record = importlib.import_module(f"{NAME}.record").Record(request)
    with record.errors():
        importlib.import_module(f"{NAME}.{request['engine']}_probe").probe(request["folder"], record)
    with open(result_file, "w", encoding="utf-8") as file:
        json.dump(record.result(), file)
        file.flush()
        os.fsync(file.fileno())
    os._exit(0)  # an engine's threads and exit handlers have nothing to add


if __name__ == "__main__":
    main(*sys.argv[1:3])
