"""The stages of the method, one file each: what it checks, depends on, writes and does."""
