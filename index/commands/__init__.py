"""The commands of `radt index`, by what they are for. Each parses, makes one library call and prints."""
