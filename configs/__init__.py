"""Ready-to-run configurations: ``importlib.resources.files("lit_lora.configs")``."""
