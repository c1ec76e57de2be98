"""The kinds of conversion, one file each, behind one Protocol (recipe.py); settings.py registers them for `--to`."""
