"""From logits to tokens, on the device, row by row: no row can see another. See README.md."""
