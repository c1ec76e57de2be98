"""Scripts for an engine's interpreter: torch and the engine only, nothing of dsv4. `__main__.py` starts one."""
