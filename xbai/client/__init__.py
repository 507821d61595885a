"""Asking services: several copies of one behind a list of URLs, used as if they were one."""
