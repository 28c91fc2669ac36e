"""What users write: campaign and recipe files."""
