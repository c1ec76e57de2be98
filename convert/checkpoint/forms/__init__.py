"""Other tools' ways of storing the release's numbers exactly, one file each, read under the release's names."""
