"""Conversions to the MX formats, in which 32 elements of a row share an E8M0 scale: codes stay, scales are repeated."""
