"""The plan of a conversion, as data: settings, formats, output tensors, sizes, configs."""
