"""The words after `coatnet`, a file each: they check what they are told and call the rest. No torch at import."""
