"""Running Python code that nobody vouches for: `process.py` has the `Sandbox`, `job.py` what goes in and out."""
