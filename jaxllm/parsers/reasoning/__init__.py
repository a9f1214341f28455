"""One file per way of marking thoughts."""
