"""What takes memory away from the device, and the names of the phases in which it is taken."""
