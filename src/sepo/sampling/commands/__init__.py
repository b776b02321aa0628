"""The commands of sampling."""
