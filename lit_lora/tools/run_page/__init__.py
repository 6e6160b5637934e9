"""The page of ``lit-lora report``."""

PAGE = "report.html"
"""Name of the page in the run's folder."""

PLAN = "memory_plan.json"
"""Name of the file of a run's plan, as ``lit-lora plan --json`` writes it."""
