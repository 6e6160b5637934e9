"""The parts of ``lit-lora train``: from a folder of images to the config of a run."""
