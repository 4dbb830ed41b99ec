"""Model classes that the host's registry scans for EntryClass."""
