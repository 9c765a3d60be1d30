"""Papers, one file each."""
