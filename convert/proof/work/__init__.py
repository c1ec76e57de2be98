"""The work of a verification: in which order it is done, how much it is, what it has found."""
