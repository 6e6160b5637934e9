"""Saves memory on the device that trains: checkpointing, offloading, optimizer steps in the backward pass."""
