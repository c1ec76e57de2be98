"""The proof behind `dsv4 verify`: does an output hold the same model as its source?

Shares no code with the converter: of dsv4 it imports errors, and how sizes and names are written. Bottom-up: `values`
compares arrays of codes; files, index and layout read a checkpoint; plan and schedule decide what is compared and when;
compare_tensor and tally compare and count; config and manifest check the other files; result draws the verdict; run
does it all; `report` makes the page.
"""
