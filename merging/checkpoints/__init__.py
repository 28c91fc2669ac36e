"""Model directories and pools of them: opened, checked, read tensor by tensor, written."""
