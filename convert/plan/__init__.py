"""What a conversion will write, as data: settings, formats, output tensors, sizes, configs."""
