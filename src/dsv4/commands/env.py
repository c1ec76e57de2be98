"""`dsv4 env`: what to paste into a bug report."""

from typing import Any

from dsv4 import output
from dsv4.errors import printable
from dsv4.options import Json, example


def _size(count: int | None) -> str:
    return "unknown" if count is None else output.human_bytes(count)


def _section(out: output.Output, title: str, rows: list[list[str]]) -> None:
    out.text(title)
    for line in output.aligned(rows or [["none"]]):
        out.text(f"  {line}")


def _system(facts: dict[str, Any]) -> list[list[str]]:
    cpu, memory = facts["cpu"], facts["memory"]
    limit = "" if memory["limit_bytes"] is None else f", this process may use {_size(memory['limit_bytes'])}"
    return [
        ["system", facts["system"]],
        ["python", facts["executable"]],
        ["cpu", f"{cpu['cores']} cores, {cpu['machine']}, {cpu['torch_threads']} torch threads"],
        ["memory", f"{_size(memory['available_bytes'])} free of {_size(memory['total_bytes'])}{limit}"],
        ["cuda", facts["cuda"] or "torch was built without it"],
        ["C compiler", facts["compiler"] or "none is there: dsv4 run takes its slow plain form"],
        ["compiled cast", "there" if facts["compiled_cast"] else "not there: dsv4 convert is a bit slower"],
    ]


def env(json: Json = False) -> None:
    """Show versions, devices, memory, disks and caches, for a bug report. Tokens are never shown."""
    out = output.configure(json)
    from dsv4.environment import gather
    from dsv4.model.kernels import cpu as native

    facts = gather(native.compiler(), {"compiled loops": native.cache_folder()})
    out.result(facts)
    _section(out, "Versions", [[name, number or "not installed"] for name, number in facts["versions"].items()])
    _section(out, "System", [[name, printable(text)] for name, text in _system(facts)])
    devices = [[d["device"], printable(d["name"]), _size(d["memory_bytes"])] for d in facts["devices"]]
    _section(out, "Devices besides the CPU", devices)
    folders = [[w, f"{_size(f['free_bytes'])} free", printable(f["path"])] for w, f in facts["folders"].items()]
    _section(out, "Folders", folders)
    _section(out, "Environment", [[name, printable(value)] for name, value in facts["variables"].items()])


EPILOG = example("dsv4 env", "dsv4 env --json")
