"""What a run will be like, worked out without devices."""
