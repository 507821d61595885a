"""Where a run's metrics go, a file each."""
