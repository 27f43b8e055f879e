"""Tables and figures that the commands print and save."""
