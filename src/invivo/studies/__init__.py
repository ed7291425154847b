"""Papers asked again: one file each, settings in, findings out, never a print."""
