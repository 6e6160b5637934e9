"""Ways to need less memory on the device that trains: checkpointing, offloading, stepping in the backward pass."""
