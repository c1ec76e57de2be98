"""The hot operations: reference forms, the compiled CPU library, and torch on other devices."""
