"""The proof behind `dsv4 verify`. Shares no code with the rest of dsv4: it imports dsv4.errors and nothing else."""
