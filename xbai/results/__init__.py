"""The result file: its lines, and the settings that decide its contents."""
