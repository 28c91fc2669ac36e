"""Quality and diversity: a determinantal point process chooses the members."""
