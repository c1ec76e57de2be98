"""Other tools' forms, for `verify`: their names, and checks of their configs. Shares nothing with the converter."""
