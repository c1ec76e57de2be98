"""The report page of `verify`: one HTML file made from the JSON alone."""
