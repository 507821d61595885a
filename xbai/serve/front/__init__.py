"""Several copies of a policy service behind one port (`--replicas`)."""
