"""Which rows are computed where and when: ranks, mini-batches, micro-batches."""
