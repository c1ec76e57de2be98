"""The facts that `dsv4 inspect` shows: parameters, cache sizes, findings, single tensors."""
