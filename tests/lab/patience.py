"""How long a test waits for what must happen.

Tests wait for events, not for times: a machine may be loaded, and a process may be stopped for a while. Only a fault
makes a test wait so long.
"""

LONG = 600.0  # seconds
